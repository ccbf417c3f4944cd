"""What the engine holds: which entries, with what hash and size, and what could not be loaded. Chooses nothing."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Protocol

from service.engine.messages import EngineReady, LoadModel, ModelLoaded
from service.engine_client import EngineUnavailable, ModelLoadError
from service.registry import Entry
from service.settings import Settings

logger = logging.getLogger(__name__)

MAX_DEATHS = 2
"""An entry whose load the engine did not survive so often is left out when the engine comes back."""


class Engine(Protocol):
    """What is needed of the engine client."""

    @property
    def ready(self) -> EngineReady | None: ...

    async def load_model(self, command: LoadModel, /) -> ModelLoaded: ...

    async def unload_model(self, model_id: str, /) -> None: ...


class LoadedModels:
    """Entries by id, the least recently used first. Two loads at once are the caller's mistake."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.problems: dict[str, str] = {}
        """Why an entry could not be loaded."""
        self._settings = settings
        self._weights: dict[str, ModelLoaded] = {}  # also of what has left the engine: its last answers need them
        self._entries: dict[str, Entry] = {}
        self._deaths: Counter[str] = Counter()

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._entries

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def is_full(self) -> bool:
        return len(self._entries) >= self._settings.max_loaded_models

    def get(self, entry_id: str) -> Entry:
        return self._entries[entry_id]

    def weights(self, entry_id: str) -> ModelLoaded:
        """Also of one that is no longer there."""
        return self._weights[entry_id]

    def use(self, entry: Entry) -> None:
        """It is the most recently used one now."""
        self._entries[entry.id] = self._entries.pop(entry.id)

    def forget(self, entry: Entry) -> None:
        """The engine does not hold it."""
        self._entries.pop(entry.id, None)

    def clear(self) -> list[Entry]:
        """A new engine holds nothing. Returns what the old one held."""
        entries = [*self._entries.values()]
        self._entries.clear()
        self.problems.clear()
        return entries

    async def load(self, entry: Entry, *, replaces: str | None = None) -> None:
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
        self.problems.pop(entry.id, None)
        if replaces is not None:
            del self._entries[replaces]
        self._weights[entry.id] = loaded
        self._entries[entry.id] = entry

    async def reload(self, entry: Entry) -> str | None:
        """Into an engine that came back. Returns why it could not be loaded, which is a problem then.

        Raises EngineUnavailable.
        """
        try:
            if self._deaths[entry.id] >= MAX_DEATHS and entry.kind != "base":
                raise ModelLoadError("the engine died while loading it")
            await self.load(entry)
        except ModelLoadError as error:
            self.problems[entry.id] = f"{entry.id} could not be loaded: {error}"
            logger.error("%s", self.problems[entry.id])
            return str(error)
        return None

    def _without_paths(self, message: str, entry: Entry) -> str:
        """For clients: folders are told relative to home, and a base model elsewhere by its name."""
        for folder in (self._settings.home, entry.base_dir.parent):
            message = message.replace(f"{folder}/", "")
        return message
