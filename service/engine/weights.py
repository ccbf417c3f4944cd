"""The sets of weights in memory, and how they change under running requests.

Each load makes a new generation of its model id; a request is bound to the generation it was admitted with. A new set
comes beside the old one (`overlap`: read in a thread into host memory while decoding goes on, then put in place between
two steps), or, where memory does not hold both, into the old one's place after the requests that run on it (`drain`).
Loads and unloads happen one after the other, in the order in which they were asked for.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Container, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lm.adapter import check_adapter
from lm.checkpoint import weights_hash
from lm.config import ModelConfig
from lm.device import memory_figures
from lm.errors import UserError
from lm.model import CausalLM
from service.engine.loader import Source, Target, check_source, fill, in_background, place, read
from service.engine.messages import (
    LoadModel,
    ModelLoaded,
    ModelLoadFailed,
    ModelUnloaded,
    SwapMode,
    UnloadModel,
)

logger = logging.getLogger(__name__)

HEADROOM = 1.1
"""What a second set needs beside its own size: buffers while loading, fragments."""

Event = ModelLoaded | ModelLoadFailed | ModelUnloaded
Mode = Literal["overlap", "drain"]


@dataclass(slots=True, kw_only=True, eq=False)
class WeightSet:
    generation: int
    model_id: str
    source: Source
    config: ModelConfig
    model: CausalLM
    hash: str
    num_requests: int = 0
    """Admitted and not finished."""


def choose_mode(swap: SwapMode, needed: int, free: int) -> tuple[Mode, str]:
    """How weights of `needed` bytes come in the place of others, and why."""
    if swap != "auto":
        return swap, "asked for"
    reason = f"a second set takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
    return ("overlap" if _fits(needed, free) else "drain"), reason


def _fits(needed: int, free: int) -> bool:
    return needed * HEADROOM <= free


class WeightStore:
    """Call `advance` whenever something may have changed: a command came, a request ended, a thread called `wake`."""

    def __init__(self, target: Target, *, swap: SwapMode, wake: Callable[[], None]) -> None:
        self._target = target
        self._swap = swap
        self._wake = wake
        self._sets: dict[int, WeightSet] = {}
        self._current: dict[str, WeightSet] = {}
        self._draining: WeightSet | None = None
        self._queue: deque[LoadModel | UnloadModel] = deque()
        self._work: Generator[None, None, None] | None = None
        self._events: list[Event] = []
        self._num_generations = 0

    def submit(self, command: LoadModel | UnloadModel) -> None:
        self._queue.append(command)

    def find(self, model_id: str) -> WeightSet | None:
        """The set that a request for `model_id` may start on now."""
        found = self._current.get(model_id)
        return None if found is self._draining else found

    def is_coming(self, model_id: str) -> bool:
        """Whether a request for `model_id` may start later."""
        is_kept = self._draining is not None and self._draining.model_id == model_id
        return is_kept or any(isinstance(c, LoadModel) and c.model_id == model_id for c in self._queue)

    def get(self, generation: int) -> WeightSet:
        return self._sets[generation]

    @property
    def generations(self) -> Container[int]:
        """Of the sets in memory."""
        return self._sets.keys()

    def advance(self) -> list[Event]:
        """Go on with loads and unloads as far as nothing must be waited for, and drop sets that nobody uses."""
        self._drop_unused()
        while self._queue:
            self._work = self._work or self._process(self._queue[0])
            try:
                next(self._work)
                break
            except StopIteration:
                self._work = None
                self._queue.popleft()
                self._drop_unused()
        events, self._events = self._events, []
        return events

    def _drop_unused(self) -> None:
        current = list(self._current.values())
        for weights in [w for w in self._sets.values() if w not in current and not w.num_requests]:
            del self._sets[weights.generation]
            self._events.append(ModelUnloaded(model_id=weights.model_id))

    # ---- commands; each yields wherever it has to wait

    def _process(self, command: LoadModel | UnloadModel) -> Generator[None, None, None]:
        if isinstance(command, LoadModel):
            yield from self._process_load(command)
        elif self._current.pop(command.model_id, None) is None:
            self._events.append(ModelUnloaded(model_id=command.model_id))

    def _process_load(self, command: LoadModel) -> Generator[None, None, None]:
        begin = time.perf_counter()
        try:
            mode = yield from self._load(command)
        except Exception as error:
            logger.error(
                "%s could not be loaded: %s", command.model_id, error, exc_info=not isinstance(error, UserError)
            )
            self._events.append(ModelLoadFailed(model_id=command.model_id, message=_tell(error)))
            return
        loaded = self._current[command.model_id]
        event = ModelLoaded(
            model_id=command.model_id,
            weights_hash=loaded.hash,
            weight_bytes=self._target.num_bytes,
            seconds=time.perf_counter() - begin,
            mode=mode,
        )
        logger.info("%s loaded in %.2f s (%s): weights %s", event.model_id, event.seconds, mode, event.weights_hash)
        self._events.append(event)

    def _load(self, command: LoadModel) -> Generator[None, None, Mode]:
        adapter_dir = None if command.adapter_dir is None else Path(command.adapter_dir)
        source = Source(base_dir=Path(command.base_dir), adapter_dir=adapter_dir)
        if (loaded := self._current.get(command.model_id)) is not None:
            if loaded.source != source:
                raise UserError(f"{command.model_id} is loaded already, from {loaded.source.base_dir}: unload it first")
            return "overlap"
        config = check_source(source, self._target)
        old = None if command.replaces is None else self._current.get(command.replaces)
        if old is None:
            yield from self._wait_for_memory()
        elif adapter_dir is not None:
            check_adapter(old.model, adapter_dir)
        mode = self._choose_mode(command.model_id, old)
        if old is None or mode == "overlap":
            model, hash_ = yield from self._load_beside(source)
        else:
            model, hash_ = yield from self._load_in_place(source, old)
        self._num_generations += 1
        weights = WeightSet(
            generation=self._num_generations,
            model_id=command.model_id,
            source=source,
            config=config,
            model=model,
            hash=hash_,
        )
        self._sets[weights.generation] = self._current[command.model_id] = weights
        return mode

    def _choose_mode(self, model_id: str, old: WeightSet | None) -> Mode:
        if old is None:
            return "overlap"
        mode, reason = choose_mode(self._swap, self._target.num_bytes, self._free_bytes())
        logger.info("%s takes the place of %s by %s: %s", model_id, old.model_id, mode, reason)
        return mode

    def _wait_for_memory(self) -> Generator[None, None, None]:
        """For one more set; sets that were unloaded go with their last request. Raises UserError when it cannot fit."""
        needed = self._target.num_bytes
        while not _fits(needed, free := self._free_bytes()):
            if len(self._sets) == len(self._current):
                raise UserError(
                    f"these weights take {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: unload a model first"
                )
            yield

    def _load_beside(self, source: Source) -> Generator[None, None, tuple[CausalLM, str]]:
        future = in_background(lambda: read(source, self._target), self._wake)
        while not future.done():
            yield
        model, hash_ = future.result()
        return place(model, self._target), hash_

    def _load_in_place(self, source: Source, old: WeightSet) -> Generator[None, None, tuple[CausalLM, str]]:
        """Once nobody runs on the old set. If it fails, the old weights are read again."""
        self._draining = old
        try:
            while old.num_requests:
                yield
            try:
                fill(old.model, source)
            except Exception as error:
                self._restore(old, error)
                raise
        finally:
            self._draining = None
        self._forget(old)
        return old.model, weights_hash(old.model.state_dict())

    def _restore(self, old: WeightSet, cause: Exception) -> None:
        """Raises UserError when that fails too."""
        try:
            fill(old.model, old.source)
        except Exception as error:
            self._forget(old)
            raise UserError(
                f"{_tell(cause)}; then {old.model_id} could not be read again and is no longer loaded: {_tell(error)}"
            ) from error

    def _forget(self, weights: WeightSet) -> None:
        del self._sets[weights.generation], self._current[weights.model_id]

    def _free_bytes(self) -> int:
        """What torch may still take: free memory, and what its allocator holds unused."""
        figures = memory_figures(self._target.device)
        return figures.free + figures.reserved - figures.allocated


def _tell(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
