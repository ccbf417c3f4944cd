"""The engine: requests and commands in, events out, one step at a time. Usable in any process; knows no socket.

One thread calls it. Life of a request: `add` refuses it, lets it wait for its weights and its grammar, or gives it to the
scheduler; each `step` computes what the scheduler chose and emits the tokens; however the request ends, its blocks are free then.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import torch

from lm.errors import UserError
from lm.model import CausalLM
from service.engine.loader import Target
from service.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    Event,
    LoadModel,
    RequestFailed,
    StepOutput,
    StepStats,
    TokenOutput,
    UnloadModel,
)
from service.engine.outputs import step_stats, tell_step
from service.engine.refusals import refusal
from service.engine.runner import Output, Runner
from service.engine.sampler import normalise
from service.engine.scheduler import Scheduler
from service.engine.sequence import Matcher, Sequence, Step
from service.engine.weights import WeightSet, WeightStore

logger = logging.getLogger(__name__)

MEMORY_INTERVAL_S = 0.5

FailureKind = Literal["invalid", "unavailable", "internal"]
Request = AddRequest | AbortRequest | LoadModel | UnloadModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an engine is made of; `service.engine.setup` chooses it."""

    ready: EngineReady
    scheduler: Scheduler
    runner: Runner
    weights: WeightStore
    target: Target
    compile_grammar: Callable[[str], Future[Matcher]]
    """Returns at once. The future raises UserError for a grammar that is none."""
    wake: Callable[[], None]
    """From any thread: `step` has something to do."""
    used_memory: Callable[[], int]
    """Bytes in use on the device."""
    seed: int
    """Seeds the requests that name no seed."""


class Engine:
    def __init__(self, parts: Parts) -> None:
        self.ready = parts.ready
        self._parts = parts
        self._scheduler = parts.scheduler
        self._weights = parts.weights
        self._random = random.Random(parts.seed)
        self._sequences: dict[str, Sequence] = {}
        self._parked: dict[str, Sequence] = {}
        """Those among them that wait for their weights."""
        self._compiling: dict[str, Future[Matcher]] = {}
        """Those among them that wait for their grammar."""
        self._compiled: deque[tuple[Sequence, Future[Matcher]]] = deque()
        self._events: list[Event] = []
        self._memory = (0.0, 0)

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute something."""
        return not self._scheduler.is_idle

    def handle(self, request: Request) -> None:
        """Never raises for what a request says; a refusal is an event."""
        match request:
            case AddRequest():
                self._add(request)
            case AbortRequest():
                self._abort(request.request_id)
            case LoadModel() | UnloadModel():
                self._weights.submit(request)
                self._advance_weights()

    def step(self) -> None:
        """One forward for everybody, then whatever loads and unloads were waiting for.

        A failure inside fails the requests of this step and no others. Raises torch.AcceleratorError when the device
        is lost to this process, and RuntimeError when KV blocks are.
        """
        self._take_compiled()
        if not self._scheduler.is_idle:
            self._run(self._scheduler.schedule())
            if self._scheduler.is_idle:
                self._scheduler.check_idle()
        self._advance_weights()

    @property
    def num_requests(self) -> int:
        """Those that wait for weights or for a grammar included."""
        return len(self._sequences)

    def abort_all(self) -> None:
        for request_id in list(self._sequences):
            self._abort(request_id)

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ---- requests

    def _add(self, request: AddRequest) -> None:
        vocab_size = self._parts.target.config.vocab_size
        reason = refusal(request, self.ready, vocab_size)
        if request.request_id in self._sequences:
            reason = f"request_id: {request.request_id!r} is in use"
        if reason is not None:
            self._events.append(RequestFailed(request_id=request.request_id, message=reason, kind="invalid"))
            return
        seed = request.sampling.seed
        sequence = Sequence(
            request_id=request.request_id,
            model_id=request.model_id,
            token_ids=list(request.prompt_ids),
            num_prompt_tokens=len(request.prompt_ids),
            sampling=normalise(request.sampling, vocab_size),
            seed=self._random.getrandbits(63) if seed is None else seed,
            arrived=time.perf_counter(),
        )
        self._sequences[sequence.request_id] = sequence
        self._route(sequence)

    def _route(self, sequence: Sequence) -> None:
        """Bind the request to the weights that its model id means now, or let it wait for them."""
        weights = self._weights.find(sequence.model_id)
        if weights is not None:
            self._admit(sequence, weights)
        elif self._weights.is_coming(sequence.model_id):
            self._parked[sequence.request_id] = sequence
        else:
            self._fail(sequence, f"model: {sequence.model_id!r} is not loaded", "unavailable")

    def _admit(self, sequence: Sequence, weights: WeightSet) -> None:
        ends = () if sequence.sampling.ignore_eos else weights.config.eos_token_ids
        sequence.stop_token_ids = frozenset((*ends, *sequence.sampling.stop_token_ids))
        sequence.generation = weights.generation
        weights.num_requests += 1
        if sequence.sampling.grammar is None:
            self._scheduler.add(sequence)
        else:
            self._compile(sequence, sequence.sampling.grammar)

    def _compile(self, sequence: Sequence, grammar: str) -> None:
        def done(future: Future[Matcher]) -> None:  # in any thread
            self._compiled.append((sequence, future))
            self._parts.wake()

        future = self._compiling[sequence.request_id] = self._parts.compile_grammar(grammar)
        future.add_done_callback(done)

    def _take_compiled(self) -> None:
        while self._compiled:
            sequence, future = self._compiled.popleft()
            if self._compiling.get(sequence.request_id) is not future:
                continue  # aborted meanwhile
            del self._compiling[sequence.request_id]
            error = future.exception()
            if error is None:
                sequence.matcher = future.result()
                self._scheduler.add(sequence)
            elif isinstance(error, UserError):
                self._fail(sequence, str(error), "invalid")
            else:
                logger.error("a grammar could not be compiled", exc_info=error)
                self._fail(sequence, f"the engine failed with this grammar: {_tell(error)}", "internal")

    def _abort(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if (future := self._compiling.pop(request_id, None)) is not None:
            future.cancel()
        elif self._parked.pop(request_id, None) is None:
            self._scheduler.remove(sequence)
        self._end(sequence)
        timing = sequence.timing(time.perf_counter())
        output = TokenOutput(request_id=request_id, token_ids=(), finish_reason="abort", timing=timing)
        self._events.append(StepOutput(outputs=[output], stats=self._stats()))

    def _fail(self, sequence: Sequence, message: str, kind: FailureKind) -> None:
        """The scheduler does not know it, or no longer."""
        self._end(sequence)
        self._events.append(RequestFailed(request_id=sequence.request_id, message=message, kind=kind))

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        if sequence.generation is not None:
            self._weights.get(sequence.generation).num_requests -= 1

    def _advance_weights(self) -> None:
        events = self._weights.advance()
        if events:
            self._events += events
            self._scheduler.forget_others(self._weights.generations)
            parked, self._parked = self._parked, {}
            for sequence in parked.values():
                self._route(sequence)

    # ---- steps

    def _run(self, step: Step) -> None:
        begin = time.perf_counter()
        started = [chunk for chunk in step.chunks[step.num_decoding :] if chunk.sequence.scheduled is None]
        for chunk in started:
            chunk.sequence.scheduled = begin
        try:
            output = self._parts.runner.run(step.chunks, self._model_of)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.exception("a step failed")
            self._fail_step(step, f"the engine failed in this step: {_tell(error)}")
            return
        decode_bytes = self._decode_bytes(step, output)
        for chunk in step.chunks[: step.num_decoding]:
            chunk.sequence.decode_bytes += decode_bytes
        now = time.perf_counter()
        self._scheduler.commit(step, output.token_ids, now)
        outputs, failures = tell_step(step, output, now)
        for chunk in step.chunks:
            if chunk.sequence.finish_reason is not None:
                self._end(chunk.sequence)
        stats = step_stats(self._stats(), step, output, started, decode_bytes)
        self._events.append(StepOutput(outputs=outputs, stats=stats))
        self._events += failures

    def _fail_step(self, step: Step, message: str) -> None:
        for chunk in step.chunks:
            self._scheduler.remove(chunk.sequence)
            self._fail(chunk.sequence, message, "internal")
        self._events.append(StepOutput(outputs=[], stats=self._stats()))

    def _decode_bytes(self, step: Step, output: Output) -> int:
        """What the step's decoding read: the weights once for each forward, and the keys and values."""
        if not step.num_decoding:
            return 0
        target = self._parts.target
        weights = sum(target.step_bytes(forward.num_rows) for forward in output.forwards if forward.is_decode)
        return weights + sum(chunk.end for chunk in step.chunks[: step.num_decoding]) * target.kv_token_bytes

    def _model_of(self, generation: int) -> CausalLM:
        return self._weights.get(generation).model

    def _stats(self) -> StepStats:
        """The state now, with nothing computed."""
        now = time.perf_counter()
        if now - self._memory[0] > MEMORY_INTERVAL_S:
            self._memory = (now, self._parts.used_memory())
        num_deferred = len(self._parked) + len(self._compiling)
        return StepStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + num_deferred,
            num_deferred=num_deferred,
            used_blocks=self._scheduler.pool.num_used,
            prefill_tokens=0,
            prefill_s=0.0,
            decode_tokens=0,
            decode_s=0.0,
            decode_bytes=0,
            device_memory_bytes=self._memory[1],
        )


def _tell(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
