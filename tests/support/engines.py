"""An engine in the test's own process: drives its steps and keeps what it said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from service.engine.core import Engine
from service.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineConfig,
    Event,
    LoadModel,
    ModelLoaded,
    ModelLoadFailed,
    RequestFailed,
    SamplingParams,
    StepOutput,
    StepStats,
    TokenOutput,
    UnloadModel,
)
from service.engine.setup import build_engine

MODEL = "m"


def tiny_engine_config(base_dir: Path, **overrides: Any) -> EngineConfig:
    fields = {
        "device": "cpu",
        "dtype": "fp32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "num_threads": 1,
        **overrides,
    }
    return EngineConfig(base_dir=str(base_dir), **fields)


def request(request_id: str, prompt_ids: Sequence[int], model_id: str = MODEL, **sampling: Any) -> AddRequest:
    """Greedy, 12 tokens, no end-of-sequence, unless `sampling` says otherwise."""
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling})
    return AddRequest(request_id=request_id, model_id=model_id, prompt_ids=list(prompt_ids), sampling=params)


class Driver:
    def __init__(self, config: EngineConfig) -> None:
        self._wake = threading.Event()
        self.engine: Engine = build_engine(config, wake=self._wake.set)
        self.events: list[Event] = []
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.failed: dict[str, RequestFailed] = {}
        self.stats: list[StepStats] = []

    # ---- commands

    def load(self, folder: Path, model_id: str = MODEL, **fields: Any) -> ModelLoaded | ModelLoadFailed:
        """Load and wait for the outcome, running whatever runs meanwhile."""
        self.start_load(folder, model_id, **fields)
        self.run_until(lambda: self.load_outcome(model_id) is not None)
        outcome = self.load_outcome(model_id)
        assert outcome is not None
        return outcome

    def start_load(self, folder: Path, model_id: str = MODEL, **fields: Any) -> None:
        self.events = [event for event in self.events if getattr(event, "model_id", None) != model_id]
        self.engine.handle(LoadModel(model_id=model_id, base_dir=str(folder), **fields))

    def load_outcome(self, model_id: str) -> ModelLoaded | ModelLoadFailed | None:
        self._collect()
        outcomes = [e for e in self.events if isinstance(e, ModelLoaded | ModelLoadFailed) and e.model_id == model_id]
        return outcomes[0] if outcomes else None

    def unload(self, model_id: str) -> None:
        self.engine.handle(UnloadModel(model_id=model_id))

    def add(self, request_id: str, prompt_ids: Sequence[int], model_id: str = MODEL, **sampling: Any) -> None:
        self.engine.handle(request(request_id, prompt_ids, model_id, **sampling))

    def abort(self, request_id: str) -> None:
        self.engine.handle(AbortRequest(request_id=request_id))

    # ---- time

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.step()
            self._collect()

    def run_until(self, is_over: Callable[[], bool], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_over():
            assert time.monotonic() < deadline, "the engine does not get there"
            if not self.engine.has_work:
                self._wake.wait(0.01)
                self._wake.clear()
            self.step()

    def finish(self) -> None:
        """Run until no request is left."""
        self.run_until(lambda: not self.engine.num_requests)

    def generate(self, prompt_ids: Sequence[int], model_id: str = MODEL, **sampling: Any) -> list[int]:
        """One request alone, to its end."""
        name = f"alone-{len(self.outputs)}"
        self.add(name, prompt_ids, model_id, **sampling)
        self.run_until(lambda: self.is_finished(name))
        return self.tokens(name)

    # ---- what came

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, []) for token in output.token_ids]

    def last(self, request_id: str) -> TokenOutput:
        return self.outputs[request_id][-1]

    def is_finished(self, request_id: str) -> bool:
        outputs = self.outputs.get(request_id)
        return request_id in self.failed or bool(outputs and outputs[-1].finish_reason)

    def _collect(self) -> None:
        for event in self.engine.take_events():
            if isinstance(event, StepOutput):
                self.stats.append(event.stats)
                for output in event.outputs:
                    self.outputs.setdefault(output.request_id, []).append(output)
            elif isinstance(event, RequestFailed):
                self.failed[event.request_id] = event
            else:
                self.events.append(event)
