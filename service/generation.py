"""The one way from token ids to their answers, for every endpoint, streamed or not.

Prompts become `Ask`s in `service.asking`; nothing has started then. `Generator.run` brings the answers to them, as
pieces of text, through the engine and the detokenizer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from uuid import uuid4

import msgspec

from service.admission import Admission
from service.codec import Codec
from service.detokenizer import Detokenizer, IncrementalDecoder, StopFinder
from service.engine.messages import (
    AddRequest,
    EngineReady,
    FinishReason,
    Logprobs,
    RequestTiming,
    SamplingParams,
    TokenOutput,
)
from service.engine_client import (
    EngineClient,
    EngineError,
    EngineUnavailable,
    ModelUnavailable,
    RequestRejected,
)
from service.errors import ApiError, unavailable
from service.metrics import Metrics
from service.registry import Entry
from service.serving import Serving

MAX_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One prompt, and how `n` answers to it are made."""

    prompt_ids: list[int]
    sampling: SamplingParams
    """Final, but for `choice`."""
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Those of `sampling.stop_token_ids` that the client named: a `stop_reason` tells them."""
    include_stop: bool = False
    """Show what ended the answer, a stop string or the text of a token."""
    skip_special_tokens: bool = True
    prompt_text: str | None = None
    """If it is known."""


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    """One answer, as far as it has come."""

    index: int
    """Among the answers of the request: those to the first prompt come first."""
    prompt_index: int
    ask: Ask
    sampling: SamplingParams
    detokenizer: Detokenizer
    engine: EngineReady
    """The engine that it was prepared for."""
    started: float
    """Seconds on time.monotonic(), as are the other times."""
    entry: Entry | None = None
    """Whose weights answer. Known with the first piece."""
    token_ids: list[int] = field(default_factory=list)
    """Up to the token that ended it: an end-of-sequence token, or the one that completed a stop string."""
    logprobs: list[Logprobs] = field(default_factory=list)
    """One for each of `token_ids`, if asked for."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """From the prompt's second token on, if asked for. Complete with the first piece."""
    num_cached_tokens: int = 0
    """Of the prompt, which were not computed."""
    first_token: float | None = None
    last_token: float | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    timing: RequestTiming | None = None
    """The engine's own, for a complete answer. None where the engine died as a stop string ended it."""
    num_told: int = 0
    """Tokens that the pieces so far had."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def outcome(self) -> FinishReason:
        """Why it ended. Only for a complete answer."""
        assert self.finish_reason is not None
        return self.finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        """What of the request's own stop strings or tokens ended it."""
        if self.stop_token_id in self.ask.stop_token_ids:
            return self.stop_token_id
        return self.detokenizer.stopped_by

    def take(self, output: TokenOutput) -> str:
        """Take the tokens of one step. Returns the text that is certain now and was not before."""
        self.prompt_logprobs += output.prompt_logprobs
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        text = ""
        for number, token_id in enumerate(output.token_ids):
            self.token_ids.append(token_id)
            self.logprobs += output.logprobs[number : number + 1]
            ends = output.stop_token_id is not None and number == len(output.token_ids) - 1
            if not ends or self.ask.include_stop:
                text += self.detokenizer.add(token_id, may_end=self.num_tokens >= self.sampling.min_tokens)
            if self.detokenizer.stopped_by is not None:
                self.finish_reason = "stop"
                return text
        if output.finish_reason is not None:
            text += self.detokenizer.flush()
            self.finish_reason, self.timing = output.finish_reason, output.timing
            self.stop_token_id = output.stop_token_id
        if self.detokenizer.stopped_by is not None:
            self.finish_reason, self.stop_token_id = "stop", None
        return text

    def piece(self, text: str) -> Piece:
        """With all that has come since the last one."""
        told, self.num_told = self.num_told, self.num_tokens
        return Piece(
            answer=self,
            text=text,
            token_ids=tuple(self.token_ids[told:]),
            logprobs=tuple(self.logprobs[told:]),
            num_tokens=self.num_tokens,
            finish_reason=self.finish_reason,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text of one answer. Where there is none, the finish reason or log probabilities have come."""

    answer: Answer
    text: str
    token_ids: tuple[int, ...]
    """Those since the piece before."""
    logprobs: tuple[Logprobs, ...]
    num_tokens: int
    """Of the answer, this piece's included."""
    finish_reason: FinishReason | None


Pieces = asyncio.Queue[Piece | Exception | None]
"""None when an answer is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    engine: EngineClient
    serving: Serving
    codec: Codec
    metrics: Metrics
    admission: Admission

    def ready_engine(self) -> EngineReady:
        """Raises ApiError 503 while there is none."""
        if self.engine.ready is None:
            raise unavailable("no model is loaded yet; GET /health says what the engine is doing", retry_after=5)
        return self.engine.ready

    def answers_for(self, asks: Sequence[Ask]) -> list[Answer]:
        """The answers that `run` will bring, in order. Raises ApiError 503 while there is no engine."""
        engine, started = self.ready_engine(), time.monotonic()
        return [
            Answer(
                index=index,
                prompt_index=prompt_index,
                ask=ask,
                sampling=msgspec.structs.replace(ask.sampling, choice=choice),
                detokenizer=self._detokenizer(ask),
                engine=engine,
                started=started,
            )
            for index, (prompt_index, ask, choice) in enumerate(
                (prompt_index, ask, choice) for prompt_index, ask in enumerate(asks) for choice in range(ask.n)
            )
        ]

    def _detokenizer(self, ask: Ask) -> Detokenizer:
        decode = partial(self.codec.tokenizer.decode, skip_special_tokens=ask.skip_special_tokens)
        return Detokenizer(IncrementalDecoder(decode), StopFinder(ask.stop, include=ask.include_stop))

    async def run(self, model: str | None, answers: Sequence[Answer]) -> AsyncGenerator[list[Piece]]:
        """The pieces of all answers, as they come: each time all that are there. Closing it aborts what still runs.

        Raises NotFoundError for an unknown model, and ApiError: 429 or 503 for a service that is full, draining or
        without an engine, 409 for a model that cannot be loaded; RequestCrashed when the engine failed in this request.
        """
        pieces: Pieces = asyncio.Queue()
        with self.admission.enter(len(answers)):
            tasks = [asyncio.create_task(self._pump(model, answer, pieces)) for answer in answers]
            try:
                num_running = len(tasks)
                while num_running:
                    items = [await pieces.get()]
                    while not pieces.empty():
                        items.append(pieces.get_nowait())
                    num_running -= items.count(None)
                    if batch := [item for item in items if isinstance(item, Piece)]:
                        yield batch
                    for item in items:
                        if isinstance(item, Exception):
                            raise item
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, model: str | None, answer: Answer, pieces: Pieces) -> None:
        try:
            async with aclosing(self._outputs(model, answer)) as outputs:
                async for output in outputs:
                    before = answer.num_tokens
                    text = answer.take(output)
                    self._clock(answer, answer.num_tokens - before)
                    if text or answer.finish_reason is not None or (output.token_ids and answer.logprobs):
                        pieces.put_nowait(answer.piece(text))
            self._finish(answer)
            pieces.put_nowait(None)
        except asyncio.CancelledError:
            self.metrics.request_aborted("client")
            raise
        except Exception as error:  # noqa: BLE001 - raised again by `run`
            self.metrics.request_aborted("engine" if isinstance(error, EngineError) else "error")
            pieces.put_nowait(_as_http(error))

    async def _outputs(self, model: str | None, answer: Answer) -> AsyncGenerator[TokenOutput]:
        """What the engine answers on the weights that `model` names when it takes the request.

        Weights that leave before that are no failure: the name is asked again.
        """
        for _ in range(MAX_ATTEMPTS):
            entry = answer.entry = await self.serving.acquire(model)
            request = AddRequest(
                request_id=uuid4().hex, model_id=entry.id, prompt_ids=answer.ask.prompt_ids, sampling=answer.sampling
            )
            try:
                async with aclosing(self.engine.submit(request)) as outputs:
                    async for output in outputs:
                        yield output
                        if answer.finish_reason is not None and output.finish_reason is None:
                            answer.timing = await outputs.abort()  # a stop string: the engine does not know it
            except ModelUnavailable:
                await self.serving.forget(entry)
                continue
            return
        raise unavailable("the model left the engine again and again while this request waited")

    def _clock(self, answer: Answer, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now = time.monotonic()
        if answer.last_token is None:
            answer.first_token = now
            self.metrics.first_token(len(answer.ask.prompt_ids), now - answer.started)
        else:
            self.metrics.next_token(now - answer.last_token)
        answer.last_token = now
        self.metrics.generation_tokens.inc(num_tokens)

    def _finish(self, answer: Answer) -> None:
        if answer.outcome == "abort":
            self.metrics.request_aborted("shutdown")
        self.metrics.request_finished(
            answer.outcome,
            prompt_tokens=len(answer.ask.prompt_ids),
            generated_tokens=answer.num_tokens,
            max_tokens=answer.sampling.max_tokens,
            seconds=(answer.last_token or time.monotonic()) - answer.started,
            timing=answer.timing,
        )


def _as_http(error: Exception) -> Exception:
    if isinstance(error, EngineUnavailable):
        return unavailable(f"the engine failed before the answer was complete: {error}")
    if isinstance(error, RequestRejected):
        return ApiError(400, str(error))
    return error
