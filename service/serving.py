"""Which weights the engine holds, and which of them answers: the only one who asks the engine to load.

`latest`, and no model at all, is the served entry: the newest promotion of the settings' base model, or that base.
Swaps are one at a time. A promotion is written down after the engine has the weights, so a load that fails, or a crash
in the middle, leaves the old ones serving. One that is wanted while the engine wakes up is the first that it loads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from lm.errors import NotFoundError
from service.engine.messages import EngineReady
from service.engine_client import EngineUnavailable, ModelLoadError
from service.errors import conflict, unavailable
from service.gate import Gate
from service.loaded_models import Engine, LoadedModels
from service.metrics import Metrics
from service.registry import Entry, Registry
from service.settings import Settings

logger = logging.getLogger(__name__)

LATEST = "latest"
ASLEEP = ("falling asleep", "asleep")
POLL_S = 0.1


class SwapError(Exception):
    """An entry was not swapped in; the message says why. What served before still serves."""


class NoEngineError(SwapError):
    """There was no engine, or it died or was stopped meanwhile. Worth another try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A promotion for the engine that is about to come back."""

    entry: Entry
    reason: str
    outcome: asyncio.Future[None]


class Serving:
    def __init__(
        self, engine: Engine, registry: Registry, settings: Settings, metrics: Metrics, gate: Gate | None = None
    ) -> None:
        """Without a `gate` the engine never sleeps."""
        self.engine = engine
        self.registry = registry
        self.gate = gate or Gate(patience_s=0, limit=0)
        self.base = settings.model_name
        """Name of the base model whose lineage is served."""
        self.served: Entry | None = None
        """What `latest` is. None until the engine has loaded something."""
        self.since: float | None = None
        """Unix time at which `served` became it."""
        self._settings = settings
        self._metrics = metrics
        self._models = LoadedModels(engine, settings)
        self._wish: Wish | None = None
        self._lock = asyncio.Lock()

    # ---- what requests ask

    @property
    def loaded(self) -> tuple[str, ...]:
        """Ids of the entries in the engine's memory."""
        return () if self.engine.ready is None else self._models.ids

    @property
    def problems(self) -> list[str]:
        """Entries that should be served and could not be loaded, with the reason. For /health."""
        return [*self._models.problems.values()]

    def weights_hash(self, entry_id: str) -> str:
        return self._models.weights(entry_id).weights_hash

    def weight_bytes(self, entry_id: str) -> int:
        return self._models.weights(entry_id).weight_bytes

    def servable(self) -> list[Entry]:
        """The entries of the served lineage, in the order in which they were registered."""
        return [entry for entry in self.registry.entries() if entry.base == self.base]

    async def acquire(self, model: str | None) -> Entry:
        """The loaded entry that `model` names; send its request without another await in between.

        Waits while the engine sleeps. An entry that is not loaded is loaded, and the least recently used one goes.
        Raises NotFoundError for an unknown name, ApiError 503 while there is nothing to answer with, and 409 for
        weights that cannot be loaded.
        """
        while True:
            await self.gate.passed()
            entry = self._resolve(model)
            if entry.id in self._models:
                break
            async with self._lock:
                if self.gate.is_open:  # it may have been closed meanwhile
                    entry = self._resolve(model)  # and what is served may have changed
                    if entry.id not in self._models:
                        await self._load_on_request(entry)
                    break
        self._models.use(entry)
        return entry

    async def forget(self, entry: Entry) -> None:
        """The engine says that it does not hold this entry. Once this returns, `acquire` knows what it holds."""
        if self._lock.locked():
            async with self._lock:  # the load that is under way has taken its place
                return
        self._models.forget(entry)

    def _resolve(self, model: str | None) -> Entry:
        if self.served is None or self.engine.ready is None:
            raise unavailable("no model is loaded yet; GET /health says what the engine is doing", retry_after=5)
        if model in (None, LATEST, self.served.id, *self._settings.served_model_aliases):
            return self.served
        assert model is not None  # it is in the tuple above
        if model in self._models:
            return self._models.get(model)
        try:
            entry = self.registry.get(model)
        except NotFoundError:
            if self._settings.allow_unknown_model:
                return self.served
            raise
        self._check_lineage(entry)
        return entry

    def _check_lineage(self, entry: Entry) -> None:
        if entry.base != self.base:
            raise NotFoundError(
                f"{entry.id} belongs to the base model {entry.base}, and this service serves {self.base}; "
                f"start it with model={entry.base} to use it",
                param="model",
            )

    async def _load_on_request(self, entry: Entry) -> None:
        """To its end, also when the client leaves: the engine goes on, and what it holds must be written down."""
        load = asyncio.create_task(self._models.load(entry, replaces=self._idle_for(entry)))
        try:
            await asyncio.shield(load)
        except asyncio.CancelledError:
            with suppress(ModelLoadError, EngineUnavailable):
                await asyncio.shield(load)
            raise
        except ModelLoadError as error:
            raise conflict(f"{entry.id} could not be loaded: {error}", param="model") from error
        except EngineUnavailable as error:
            raise unavailable(f"{entry.id} could not be loaded: {error}", retry_after=5) from error

    def _idle_for(self, entry: Entry) -> str | None:
        """Which entry makes room: none, or the least recently used one that is not served. Raises ApiError 503."""
        if not self._models.is_full:
            return None
        idle = [entry_id for entry_id in self._models.ids if self.served is None or entry_id != self.served.id]
        if not idle:
            raise unavailable(
                f"{entry.id} is not loaded, and max_loaded_models is 1; activate it, or raise that setting",
                retry_after=60,
            )
        return idle[0]

    # ---- swaps

    @asynccontextmanager
    async def undisturbed(self) -> AsyncIterator[None]:
        """Nothing is loaded in here, and no load is under way."""
        async with self._lock:
            yield

    async def wait_until_serving(self, timeout_s: float) -> None:
        """Raises NoEngineError when the engine has not loaded what it serves after so long."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.engine.ready is None or self.served is None or self.served.id not in self._models:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise NoEngineError(f"the engine was not ready within {timeout_s:.0f} s") from None

    async def promote_when_serving(self, entry_id: str, reason: str, timeout_s: float) -> Entry:
        """`promote`, by an engine that may be on its way: where it is waking up, this is the first that it loads.

        The time in which it sleeps does not count. Tried again when it goes away meanwhile. Raises as `promote` does.
        """
        while self.gate.phase in ASLEEP:
            await asyncio.sleep(POLL_S)
        if self.gate.phase == "waking" and self.engine.ready is None:
            return await self._promote_first(entry_id, reason, timeout_s)
        await self.wait_until_serving(timeout_s)
        try:
            return await self.promote(entry_id, reason)
        except NoEngineError:
            await self.wait_until_serving(timeout_s)
            return await self.promote(entry_id, reason)

    async def promote(self, entry_id: str, reason: str) -> Entry:
        """Make an entry `latest`. Raises NotFoundError, and SwapError with the old one still serving."""
        entry = self.registry.get(entry_id)
        self._check_lineage(entry)
        async with self._lock:
            self.registry.get(entry_id)  # it may have been dropped meanwhile
            if self.served is None or entry.id != self.served.id:
                await self._swap_to(entry)
                self.registry.add_promotion(entry.id, reason)
                self._serve(entry, time.time())
        return entry

    async def drop(self, entry: Entry) -> None:
        """Forget an entry for good: nobody can name it any more, and the engine does not hold it once its last request
        has ended. Raises ApiError 409 for the served one."""
        async with self._lock:
            if self.served is not None and entry.id == self.served.id:
                raise conflict(f"{entry.id} is served; activate another one first", param="model")
            self.registry.remove(entry)
            if entry.id in self._models:
                self._models.forget(entry)
                with suppress(EngineUnavailable):
                    await self.engine.unload_model(entry.id)

    async def _promote_first(self, entry_id: str, reason: str, timeout_s: float) -> Entry:
        entry = self.registry.get(entry_id)
        self._check_lineage(entry)
        wish = self._wish = Wish(entry=entry, reason=reason, outcome=asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                await wish.outcome
        except TimeoutError:
            raise NoEngineError(f"the engine was not ready within {timeout_s:.0f} s") from None
        finally:
            if self._wish is wish:
                self._wish = None
        return entry

    async def rollback(self) -> Entry:
        """Take back the last promotion. Raises ApiError 409 when there is none, and SwapError as `promote` does."""
        async with self._lock:
            promotions = self.registry.promotions(self.base)
            served = self.served
            ids = [promotion.entry_id for promotion in promotions]
            if served is None or served.id not in ids:
                raise conflict("nothing was promoted, so there is nothing to go back from")
            before = promotions[ids.index(served.id) + 1 :]
            entry = self.registry.get(before[0].entry_id if before else self.base)
            await self._swap_to(entry)
            self.registry.undo_promotions(self.base, down_to=before[0].seq if before else 0)
            self._serve(entry, time.time())
            return entry

    async def on_engine_ready(self, ready: EngineReady) -> None:
        """Load what served before; where that cannot be loaded, the promotion before it, and the base at last.

        An engine that dies meanwhile is started again by its client, which calls this again.
        """
        async with self._lock:
            others = self._models.clear()
            try:
                await self._load_served()
                for entry in others:
                    if entry.id not in self._models and not self._models.is_full:
                        await self._models.reload(entry)
            except EngineUnavailable as error:
                logger.error("the engine died while loading: %s", error)

    async def _load_served(self) -> None:
        if await self._load_wish():
            return
        since = self.registry.last_change(self.base)
        promoted = [promotion.entry_id for promotion in self.registry.promotions(self.base)]
        for entry_id in (*promoted, self.base):
            entry = self.registry.get(entry_id)
            if await self._models.reload(entry) is None:
                self._serve(entry, since)
                return

    async def _load_wish(self) -> bool:
        """Whether there was a wish, and it is served now."""
        wish = self._wish
        if wish is None:
            return False
        start = time.monotonic()
        problem = await self._models.reload(wish.entry)
        self._wish = None
        if problem is None:
            self.registry.add_promotion(wish.entry.id, wish.reason)
            self._serve(wish.entry, time.time())
        self._metrics.swap("succeeded" if problem is None else "failed", time.monotonic() - start)
        if not wish.outcome.done():
            if problem is None:
                wish.outcome.set_result(None)
            else:
                wish.outcome.set_exception(SwapError(problem))
        return problem is None

    def _serve(self, entry: Entry, since: float | None) -> None:
        self.served = entry
        self.since = since
        self._metrics.serving(entry.id, self.weights_hash(entry.id))
        logger.info("%s is served now", entry.id)

    async def _swap_to(self, entry: Entry) -> None:
        """Raises SwapError."""
        self._refuse_asleep()
        start = time.monotonic()
        old = None if self.served is None or self.served.id not in self._models else self.served.id
        try:
            if entry.id not in self._models:
                await self._models.load(entry, replaces=old)
        except (ModelLoadError, EngineUnavailable) as error:
            self._metrics.swap("failed", time.monotonic() - start)
            kind = SwapError if isinstance(error, ModelLoadError) else NoEngineError
            raise kind(str(error)) from error
        self._metrics.swap("succeeded", time.monotonic() - start)

    def _refuse_asleep(self) -> None:
        if self.gate.phase in ASLEEP:
            raise NoEngineError(self.gate.reason)
