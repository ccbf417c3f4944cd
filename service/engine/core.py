"""The engine: requests and commands in, events out, one step at a time. Usable in any process; knows no socket.

One thread calls it. Life of a request: `add` refuses it, lets it wait for its weights, or gives it to the scheduler;
each `step` computes what the scheduler chose and emits the tokens; however the request ends, its blocks are free then.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

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
from service.engine.runner import Output, Runner
from service.engine.sampler import normalise
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence, Step
from service.engine.weights import WeightSet, WeightStore

logger = logging.getLogger(__name__)

MEMORY_INTERVAL_S = 0.5

Request = AddRequest | AbortRequest | LoadModel | UnloadModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an engine is made of; `service.engine.setup` chooses it."""

    ready: EngineReady
    scheduler: Scheduler
    runner: Runner
    weights: WeightStore
    target: Target
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
        if not self._scheduler.is_idle:
            self._run(self._scheduler.schedule())
            if self._scheduler.is_idle:
                self._scheduler.check_idle()
        self._advance_weights()

    def abort_all(self) -> None:
        for request_id in list(self._sequences):
            self._abort(request_id)

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ---- requests

    def _add(self, request: AddRequest) -> None:
        if (reason := self._refusal(request)) is not None:
            self._events.append(RequestFailed(request_id=request.request_id, message=reason, kind="invalid"))
            return
        seed = request.sampling.seed
        sequence = Sequence(
            request_id=request.request_id,
            model_id=request.model_id,
            token_ids=list(request.prompt_ids),
            num_prompt_tokens=len(request.prompt_ids),
            sampling=normalise(request.sampling, self._parts.target.config.vocab_size),
            seed=self._random.getrandbits(63) if seed is None else seed,
            arrived=time.perf_counter(),
        )
        self._sequences[sequence.request_id] = sequence
        self._route(sequence)

    def _refusal(self, request: AddRequest) -> str | None:
        """Why this request can never be served, or None."""
        num_prompt, max_tokens, limit = len(request.prompt_ids), request.sampling.max_tokens, self.ready.max_model_len
        if request.request_id in self._sequences:
            return f"request_id: {request.request_id!r} is in use"
        if not num_prompt:
            return "prompt: it is empty; at least one token is needed"
        if max_tokens < 1:
            return f"max_tokens: must be at least 1 (got {max_tokens})"
        if num_prompt + max_tokens > limit:
            return (
                f"prompt: {num_prompt} tokens, and max_tokens {max_tokens}, are together more than the {limit} tokens "
                "that fit; shorten one of them"
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self._parts.target.config.vocab_size:
            return f"prompt: token ids must be in 0..{self._parts.target.config.vocab_size - 1}"
        return None

    def _route(self, sequence: Sequence) -> None:
        """Bind the request to the weights that its model id means now, or let it wait for them."""
        weights = self._weights.find(sequence.model_id)
        if weights is not None:
            self._admit(sequence, weights)
        elif self._weights.is_coming(sequence.model_id):
            self._parked[sequence.request_id] = sequence
        else:
            del self._sequences[sequence.request_id]
            message = f"model: {sequence.model_id!r} is not loaded"
            self._events.append(RequestFailed(request_id=sequence.request_id, message=message, kind="unavailable"))

    def _admit(self, sequence: Sequence, weights: WeightSet) -> None:
        ends = () if sequence.sampling.ignore_eos else weights.config.eos_token_ids
        sequence.stop_token_ids = frozenset((*ends, *sequence.sampling.stop_token_ids))
        sequence.generation = weights.generation
        weights.num_requests += 1
        self._scheduler.add(sequence)

    def _abort(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if self._parked.pop(request_id, None) is None:
            self._scheduler.remove(sequence)
        self._end(sequence)
        timing = sequence.timing(time.perf_counter())
        output = TokenOutput(request_id=request_id, token_ids=(), finish_reason="abort", timing=timing)
        self._events.append(StepOutput(outputs=[output], stats=self._stats()))

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        if sequence.generation is not None:
            self._weights.get(sequence.generation).num_requests -= 1

    def _advance_weights(self) -> None:
        events = self._weights.advance()
        if events:
            self._events += events
            parked, self._parked = self._parked, {}
            for sequence in parked.values():
                self._route(sequence)

    # ---- steps

    def _run(self, step: Step) -> None:
        begin = time.perf_counter()
        for chunk in step.chunks:
            if chunk.sequence.scheduled is None:
                chunk.sequence.scheduled = begin
        try:
            output = self._parts.runner.run(step.chunks, self._model_of)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.exception("a step failed")
            self._fail(step, f"the engine failed in this step: {type(error).__name__}: {error}")
            return
        decode_bytes = self._decode_bytes(step, output)
        for chunk in step.chunks[: step.num_decoding]:
            chunk.sequence.decode_bytes += decode_bytes
        now = time.perf_counter()
        grown = self._scheduler.commit(step, output.token_ids, now)
        outputs = [self._output(sequence, now) for sequence in grown]
        decode_s = sum(forward.seconds for forward in output.forwards if forward.is_decode)
        stats = msgspec.structs.replace(
            self._stats(),
            prefill_tokens=sum(chunk.end - chunk.start for chunk in step.chunks[step.num_decoding :]),
            prefill_s=sum(forward.seconds for forward in output.forwards) - decode_s,
            decode_tokens=step.num_decoding,
            decode_s=decode_s,
            decode_bytes=decode_bytes,
            num_preempted=step.num_preempted,
            num_sampled=len(grown),
        )
        self._events.append(StepOutput(outputs=outputs, stats=stats))

    def _model_of(self, generation: int) -> CausalLM:
        return self._weights.get(generation).model

    def _decode_bytes(self, step: Step, output: Output) -> int:
        """What the step's decoding read: the weights of each generation once, and the keys and values."""
        target, chunks = self._parts.target, step.chunks[: step.num_decoding]
        if not chunks:
            return 0
        weights = sum(target.step_bytes(forward.num_rows) for forward in output.forwards if forward.is_decode)
        return weights + sum(chunk.end for chunk in chunks) * target.kv_token_bytes

    def _output(self, sequence: Sequence, now: float) -> TokenOutput:
        token_id = sequence.token_ids[-1]
        if sequence.finish_reason is None:
            return TokenOutput(request_id=sequence.request_id, token_ids=(token_id,))
        self._end(sequence)
        return TokenOutput(
            request_id=sequence.request_id,
            token_ids=(token_id,),
            finish_reason=sequence.finish_reason,
            stop_token_id=token_id if sequence.finish_reason == "stop" else None,
            timing=sequence.timing(now),
        )

    def _fail(self, step: Step, message: str) -> None:
        for chunk in step.chunks:
            self._scheduler.remove(chunk.sequence)
            self._end(chunk.sequence)
            request_id = chunk.sequence.request_id
            self._events.append(RequestFailed(request_id=request_id, message=message, kind="internal"))
        self._events.append(StepOutput(outputs=[], stats=self._stats()))

    def _stats(self) -> StepStats:
        """The state now, with nothing computed."""
        now = time.perf_counter()
        if now - self._memory[0] > MEMORY_INTERVAL_S:
            self._memory = (now, self._parts.used_memory())
        return StepStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._parked),
            used_blocks=self._scheduler.pool.num_used,
            prefill_tokens=0,
            prefill_s=0.0,
            decode_tokens=0,
            decode_s=0.0,
            decode_bytes=0,
            device_memory_bytes=self._memory[1],
        )
