"""Which weights the engine holds, and which of them answers: the only one who asks the engine to load.

`latest`, and no model at all, is the served entry: the newest promotion of the settings' base model, or that base.
Swaps are one at a time. A promotion is written down after the engine has the weights, so a load that fails, or a crash
in the middle, leaves the old ones serving.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import suppress
from typing import Protocol

from lm.errors import NotFoundError
from service.engine.messages import EngineReady, LoadModel, ModelLoaded
from service.engine_client import EngineUnavailable, ModelLoadError
from service.errors import conflict, unavailable
from service.metrics import Metrics
from service.registry import Entry, Registry
from service.settings import Settings

logger = logging.getLogger(__name__)

LATEST = "latest"
POLL_S = 0.1
MAX_DEATHS = 2
"""An entry whose load the engine did not survive so often is left out when the engine comes back."""


class SwapError(Exception):
    """An entry was not swapped in; the message says why. What served before still serves."""


class NoEngineError(SwapError):
    """There was no engine, or it died or was stopped meanwhile. Worth another try."""


class Engine(Protocol):
    """What is needed of the engine client."""

    @property
    def ready(self) -> EngineReady | None: ...

    async def load_model(self, command: LoadModel, /) -> ModelLoaded: ...


class Serving:
    def __init__(self, engine: Engine, registry: Registry, settings: Settings, metrics: Metrics) -> None:
        self.engine = engine
        self.registry = registry
        self.base = settings.model_name
        """Name of the base model whose lineage is served."""
        self.served: Entry | None = None
        """What `latest` is. None until the engine has loaded something."""
        self.since: float | None = None
        """Unix time at which `served` became it."""
        self._settings = settings
        self._metrics = metrics
        self._weights: dict[str, ModelLoaded] = {}  # also of what has left the engine: its last answers need them
        self._loaded: dict[str, Entry] = {}  # least recently used first
        self._problems: dict[str, str] = {}
        self._deaths: Counter[str] = Counter()
        self._lock = asyncio.Lock()

    # ---- what requests ask

    @property
    def loaded(self) -> tuple[str, ...]:
        """Ids of the entries in the engine's memory."""
        return tuple(self._loaded)

    @property
    def problems(self) -> list[str]:
        """Entries that should be served and could not be loaded, with the reason. For /health."""
        return [*self._problems.values()]

    def weights_hash(self, entry_id: str) -> str:
        return self._weights[entry_id].weights_hash

    def weight_bytes(self, entry_id: str) -> int:
        return self._weights[entry_id].weight_bytes

    def servable(self) -> list[Entry]:
        """The entries of the served lineage, in the order in which they were registered."""
        return [entry for entry in self.registry.entries() if entry.base == self.base]

    async def acquire(self, model: str | None) -> Entry:
        """The loaded entry that `model` names; send its request without another await in between.

        An entry that is not loaded is loaded, and the least recently used one goes. Raises NotFoundError for an
        unknown name, ApiError 503 while there is nothing to answer with, and 409 for weights that cannot be loaded.
        """
        entry = self._resolve(model)
        if entry.id not in self._loaded:
            async with self._lock:
                entry = self._resolve(model)  # what is served may have changed meanwhile
                if entry.id not in self._loaded:
                    await self._load_on_request(entry)
        self._loaded[entry.id] = self._loaded.pop(entry.id)  # the most recently used one now
        return entry

    async def forget(self, entry: Entry) -> None:
        """The engine says that it does not hold this entry. Once this returns, `acquire` knows what it holds."""
        if self._lock.locked():
            async with self._lock:  # the load that is under way has taken its place
                return
        self._loaded.pop(entry.id, None)

    def _resolve(self, model: str | None) -> Entry:
        if self.served is None or self.engine.ready is None:
            raise unavailable("no model is loaded yet; GET /health says what the engine is doing", retry_after=5)
        if model in (None, LATEST, self.served.id, *self._settings.served_model_aliases):
            return self.served
        assert model is not None  # it is in the tuple above
        if model in self._loaded:
            return self._loaded[model]
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
        load = asyncio.create_task(self._load(entry, replaces=self._idle_for(entry)))
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
        if len(self._loaded) < self._settings.max_loaded_models:
            return None
        idle = [entry_id for entry_id in self._loaded if self.served is None or entry_id != self.served.id]
        if not idle:
            raise unavailable(
                f"{entry.id} is not loaded, and max_loaded_models is 1; activate it, or raise that setting",
                retry_after=60,
            )
        return idle[0]

    # ---- swaps

    async def wait_until_serving(self, timeout_s: float) -> None:
        """Raises NoEngineError when the engine has not loaded what it serves after so long."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.engine.ready is None or self.served is None or self.served.id not in self._loaded:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise NoEngineError(f"the engine was not ready within {timeout_s:.0f} s") from None

    async def promote(self, entry_id: str, reason: str) -> Entry:
        """Make an entry `latest`. Raises NotFoundError, and SwapError with the old one still serving."""
        entry = self.registry.get(entry_id)
        self._check_lineage(entry)
        async with self._lock:
            if self.served is None or entry.id != self.served.id:
                await self._swap_to(entry)
                self.registry.add_promotion(entry.id, reason)
                self._serve(entry, time.time())
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
            others = [*self._loaded.values()]
            self._loaded.clear()
            self._problems.clear()
            try:
                await self._load_served()
                for entry in others:
                    if entry.id not in self._loaded and len(self._loaded) < self._settings.max_loaded_models:
                        await self._load_or_tell(entry)
            except EngineUnavailable as error:
                logger.error("the engine died while loading: %s", error)

    async def _load_served(self) -> None:
        since = self.registry.last_change(self.base)
        promoted = [promotion.entry_id for promotion in self.registry.promotions(self.base)]
        for entry_id in (*promoted, self.base):
            entry = self.registry.get(entry_id)
            if await self._load_or_tell(entry):
                self._serve(entry, since)
                return

    async def _load_or_tell(self, entry: Entry) -> bool:
        try:
            if self._deaths[entry.id] >= MAX_DEATHS and entry.kind != "base":
                raise ModelLoadError("the engine died while loading it")
            await self._load(entry)
        except ModelLoadError as error:
            self._problems[entry.id] = f"{entry.id} could not be loaded: {error}"
            logger.error("%s", self._problems[entry.id])
            return False
        return True

    def _serve(self, entry: Entry, since: float | None) -> None:
        self.served = entry
        self.since = since
        self._metrics.serving(entry.id, self.weights_hash(entry.id))
        logger.info("%s is served now", entry.id)

    async def _swap_to(self, entry: Entry) -> None:
        """Raises SwapError."""
        start = time.monotonic()
        old = None if self.served is None or self.served.id not in self._loaded else self.served.id
        try:
            if entry.id not in self._loaded:
                await self._load(entry, replaces=old)
        except (ModelLoadError, EngineUnavailable) as error:
            self._metrics.swap("failed", time.monotonic() - start)
            kind = SwapError if isinstance(error, ModelLoadError) else NoEngineError
            raise kind(str(error)) from error
        self._metrics.swap("succeeded", time.monotonic() - start)

    async def _load(self, entry: Entry, *, replaces: str | None = None) -> None:
        """What it replaces goes: at once, where memory does not hold both, or else afterwards.

        Raises ModelLoadError with the old one still loaded, and EngineUnavailable.
        """
        command = LoadModel(
            model_id=entry.id,
            base_dir=str(entry.base_dir),
            adapter_dir=None if entry.adapter_dir is None else str(entry.adapter_dir),
            replaces=replaces,
        )
        try:
            loaded = await self.engine.load_model(command)
        except ModelLoadError as error:
            raise ModelLoadError(self._without_paths(str(error), entry)) from error
        except EngineUnavailable:
            self._deaths[entry.id] += 1
            raise
        del self._deaths[entry.id]
        self._problems.pop(entry.id, None)
        if replaces is not None:
            del self._loaded[replaces]
        self._weights[entry.id] = loaded
        self._loaded[entry.id] = entry

    def _without_paths(self, message: str, entry: Entry) -> str:
        """For clients: folders are told relative to home, and a base model elsewhere by its name."""
        for folder in (self._settings.home, entry.base_dir.parent):
            message = message.replace(f"{folder}/", "")
        return message
