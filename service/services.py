"""The parts of the running service, how they are put together, and in which order they start and stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.admission import Admission
from service.codec import Codec, load_codec
from service.database import Database
from service.decoders import Decoders
from service.engine.messages import EngineConfig, EngineReady
from service.engine_client import EngineClient
from service.exports import Exports
from service.files import FileStore
from service.gate import Gate
from service.generation import Generator
from service.grammar_checker import GrammarChecker
from service.jobs.arbiter import DeviceArbiter, needs_by_estimate
from service.jobs.ending import Ending
from service.jobs.launch import Launcher
from service.jobs.promotion import Promoter
from service.jobs.retention import Retention
from service.jobs.store import JobStore
from service.jobs.supervisor import Supervisor
from service.jobs.webhooks import Webhooks
from service.metrics import Metrics
from service.registry import Registry
from service.result_files import ResultFiles
from service.serving import Serving
from service.settings import Settings
from service.sleep import EngineSleep


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    settings: Settings
    codec: Codec
    engine: EngineClient
    serving: Serving
    generator: Generator
    grammar_checker: GrammarChecker
    admission: Admission
    registry: Registry
    store: JobStore
    jobs: Supervisor
    arbiter: DeviceArbiter
    sleep: EngineSleep
    webhooks: Webhooks
    files: FileStore
    metrics: Metrics
    exports: Exports = field(default_factory=Exports)
    dry_run_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the dry run that is under way: they go one by one."""
    startup: asyncio.Task[None]
    """Done when the engine has loaded what it serves, or has failed to, or sleeps instead."""

    @property
    def failure(self) -> str | None:
        """Why the service never came to serve anything; None while it starts or sleeps, and once it served."""
        if not self.startup.done() or self.serving.served is not None or self.is_asleep:
            return None
        return self.engine.failure or "; ".join(self.serving.problems) or repr(self.startup.exception())

    @property
    def is_asleep(self) -> bool:
        """Whether the engine has left its device to a trainer, or is about to, or on its way back."""
        return not self.serving.gate.is_open

    @property
    def is_ready(self) -> bool:
        """Whether a request would be answered at once. Stays true while new weights are swapped in."""
        served = self.serving.served
        has_model = self.engine.ready is not None and served is not None and served.id in self.serving.loaded
        return has_model and not self.is_asleep and not self.admission.draining


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]
"""How a route gets them."""


@asynccontextmanager
async def running_services(
    settings: Settings, *, engine_type: type[EngineClient] = EngineClient
) -> AsyncIterator[Services]:
    """Everything but HTTP. The engine still loads when this yields; `is_ready` says when it is done.

    At the end no process that was started here is left. A trainer of an earlier service process goes on where this
    one never came to serve anything: the next start may be a better one. Raises UserError for a model or a home that cannot be used.
    """
    codec = await asyncio.to_thread(load_codec, settings.model_dir)
    with closing(Database(settings.database)) as database:
        services = _start(settings, codec, database, engine_type)
        try:
            await services.jobs.start()
            services.webhooks.start()
            yield services
        finally:
            await services.sleep.close()
            await services.jobs.stop(spare_adopted=services.failure is not None)
            await services.webhooks.stop()
            await services.engine.stop()
            await services.grammar_checker.close()
            await services.exports.close()
            services.startup.cancel()
            await asyncio.gather(services.startup, return_exceptions=True)


def _start(settings: Settings, codec: Codec, database: Database, engine_type: type[EngineClient]) -> Services:
    metrics = Metrics(settings.model_name)
    registry = Registry(
        database,
        home=settings.home,
        organization=settings.organization,
        base_folders={settings.model_name: settings.model_dir},
    )

    admission = Admission(settings.max_num_seqs + settings.max_queued_requests)
    engine, serving = _serving(settings, registry, metrics, engine_type, max_waiting=admission.limit)
    sleep = EngineSleep(engine, serving, metrics, drain_s=settings.drain_seconds)
    store, files = JobStore(database), FileStore(database, settings.files_dir)
    webhooks = _webhooks(database, settings)
    promoter = Promoter(store, registry, serving)
    arbiter = DeviceArbiter(engine, sleep, store, settings, needs=needs_by_estimate(registry))
    arbiter.take_up(store.with_status("running"))
    return Services(
        settings=settings,
        codec=codec,
        engine=engine,
        serving=serving,
        generator=Generator(
            engine=engine,
            serving=serving,
            decoders=Decoders(codec.tokenizer, codec.token_bytes),
            metrics=metrics,
            admission=admission,
        ),
        grammar_checker=GrammarChecker(settings.model_dir, codec.vocab_size),
        admission=admission,
        registry=registry,
        store=store,
        jobs=Supervisor(
            store,
            promoter,
            Retention(store, registry, serving, settings.runs_dir),
            Ending(store, promoter, webhooks, ResultFiles(store, files, settings.runs_dir).write),
            Launcher(registry, settings),
            arbiter,
            settings,
            metrics,
        ),
        arbiter=arbiter,
        sleep=sleep,
        webhooks=webhooks,
        files=files,
        metrics=metrics,
        startup=asyncio.create_task(arbiter.start_engine()),
    )


def _serving(
    settings: Settings, registry: Registry, metrics: Metrics, engine_type: type[EngineClient], *, max_waiting: int
) -> tuple[EngineClient, Serving]:
    """The engine, which is not started yet, and what asks it to load."""

    async def on_ready(ready: EngineReady) -> None:
        metrics.engine_ready(ready)
        await serving.on_engine_ready(ready)

    engine = engine_type(
        _engine_config(settings),
        on_ready=on_ready,
        on_stats=metrics.step,
        silence_limit_s=settings.engine_silence_seconds,
    )
    gate = Gate(patience_s=settings.sleep_wait_seconds, limit=max_waiting)
    metrics.watch(gate)
    serving = Serving(engine, registry, settings, metrics, gate)
    return engine, serving


def _webhooks(database: Database, settings: Settings) -> Webhooks:
    secret = settings.webhook_secret
    return Webhooks(
        database,
        secret=None if secret is None else secret.get_secret_value(),
        allow_private=settings.webhook_allow_private,
    )


def _engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        base_dir=str(settings.model_dir),
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_cache_bytes=settings.kv_cache_memory,
        swap=settings.swap,
        num_threads=settings.num_threads,
        memory_fraction=1 - settings.training_memory_share if settings.serving_while_training == "share" else None,
        seed=settings.seed,
    )
