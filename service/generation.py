"""The one way from a prompt to its text, for every endpoint, streamed or not.

prepare   prompts -> token ids, refused with a 400 where they cannot be served; nothing has started yet
run       answers -> pieces of text as they come, through the engine and the detokenizer
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from uuid import uuid4

from lm.errors import UserError
from service.admission import Admission
from service.codec import Codec
from service.detokenizer import Detokenizer, IncrementalDecoder, StopFinder
from service.engine.messages import AddRequest, EngineReady, FinishReason, RequestTiming, SamplingParams, TokenOutput
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
from service.schemas.requests import Sampling
from service.serving import Serving

GREEDY_BELOW = 1e-5  # a smaller temperature overflows what it divides
MAX_ATTEMPTS = 5

Prompt = str | tuple[int, ...] | list[Mapping[str, str]]
"""Text, token ids, or the messages of a conversation."""


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    """One answer, as far as it has come."""

    index: int
    prompt_ids: list[int]
    sampling: SamplingParams
    detokenizer: Detokenizer
    engine: EngineReady
    """The engine that it was prepared for."""
    started: float
    """Seconds on time.monotonic(), as are the other times."""
    entry: Entry | None = None
    """Whose weights answer. Known with the first piece."""
    num_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    finish_reason: FinishReason | None = None
    timing: RequestTiming | None = None
    """The engine's own, for a complete answer. None where the engine died as a stop string ended it."""

    @property
    def outcome(self) -> FinishReason:
        """Why it ended. Only for a complete answer."""
        assert self.finish_reason is not None
        return self.finish_reason

    @property
    def stop_reason(self) -> str | None:
        return self.detokenizer.stopped_by

    def take(self, output: TokenOutput) -> str:
        """Count the tokens of one step. Returns the text that is certain now and was not before."""
        self.num_tokens += len(output.token_ids)
        shown = output.token_ids if output.stop_token_id is None else output.token_ids[:-1]
        text = "".join(self.detokenizer.add(token_id) for token_id in shown)
        if output.finish_reason is not None:
            text += self.detokenizer.flush()
            self.finish_reason, self.timing = output.finish_reason, output.timing
        if self.detokenizer.stopped_by is not None:
            self.finish_reason = "stop"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text of one answer. The last piece has the finish reason, and maybe no text."""

    answer: Answer
    text: str
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

    async def prepare(
        self,
        prompts: Sequence[Prompt],
        options: Sampling,
        *,
        max_tokens: int | None,
        default_max_tokens: int | None = None,
        param: str,
    ) -> list[Answer]:
        """One answer for each prompt. Without a default, `max_tokens` None is the rest of the context.

        `param` is the field that the prompts stand in. Raises UserError and ApiError: 400 for what cannot be served,
        503 while there is no engine.
        """
        started = time.monotonic()
        engine = self.engine.ready
        if engine is None:
            raise unavailable("no model is loaded yet; GET /health says what the engine is doing", retry_after=5)
        answers = []
        for index, prompt in enumerate(prompts):
            prompt_ids = await self._encode(prompt, param)
            room = _room(len(prompt_ids), max_tokens, engine.max_model_len, param)
            limit = max_tokens or min(room, default_max_tokens or room)
            answers.append(
                Answer(
                    index=index,
                    prompt_ids=prompt_ids,
                    sampling=_sampling(options, limit, self.codec.tokenizer.eos_token_ids),
                    detokenizer=Detokenizer(IncrementalDecoder(self.codec.tokenizer.decode), StopFinder(options.stop)),
                    engine=engine,
                    started=started,
                )
            )
        return answers

    async def run(self, model: str | None, answers: Sequence[Answer]) -> AsyncGenerator[Piece]:
        """The pieces of all answers, as they come. Closing it aborts what is still running.

        Raises NotFoundError for an unknown model, and ApiError: 429 or 503 for a service that is full, draining or
        without an engine, 409 for a model that cannot be loaded; RequestCrashed when the engine failed in this request.
        """
        pieces: Pieces = asyncio.Queue()
        with self.admission.enter(len(answers)):
            tasks = [asyncio.create_task(self._pump(model, answer, pieces)) for answer in answers]
            try:
                num_running = len(tasks)
                while num_running:
                    item = await pieces.get()
                    if isinstance(item, Exception):
                        raise item
                    if item is None:
                        num_running -= 1
                    else:
                        yield item
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _encode(self, prompt: Prompt, param: str) -> list[int]:
        try:
            if isinstance(prompt, str):
                ids = await self.codec.encode(prompt)
            elif isinstance(prompt, tuple):
                ids = self.codec.check_ids(prompt)
            else:
                ids = await self.codec.encode_chat(prompt)
        except UserError as error:
            message = str(error)
            message = message if message.startswith(param) else f"{param}: {message}"
            raise UserError(message, param=error.param or param) from error
        if not ids:
            raise UserError(f"{param}: it is empty, and the model needs a token to start from", param=param)
        return ids

    async def _pump(self, model: str | None, answer: Answer, pieces: Pieces) -> None:
        try:
            async with aclosing(self._outputs(model, answer)) as outputs:
                async for output in outputs:
                    self._clock(answer, len(output.token_ids))
                    text = answer.take(output)
                    if text or answer.finish_reason is not None:
                        pieces.put_nowait(_piece(answer, text))
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
                request_id=uuid4().hex, model_id=entry.id, prompt_ids=answer.prompt_ids, sampling=answer.sampling
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
            self.metrics.first_token(len(answer.prompt_ids), now - answer.started)
        else:
            self.metrics.next_token(now - answer.last_token)
        answer.last_token = now
        self.metrics.generation_tokens.inc(num_tokens)

    def _finish(self, answer: Answer) -> None:
        if answer.outcome == "abort":
            self.metrics.request_aborted("shutdown")
        self.metrics.request_finished(
            answer.outcome,
            prompt_tokens=len(answer.prompt_ids),
            generated_tokens=answer.num_tokens,
            max_tokens=answer.sampling.max_tokens,
            seconds=(answer.last_token or time.monotonic()) - answer.started,
            timing=answer.timing,
        )


def _piece(answer: Answer, text: str) -> Piece:
    return Piece(answer=answer, text=text, num_tokens=answer.num_tokens, finish_reason=answer.finish_reason)


def _as_http(error: Exception) -> Exception:
    if isinstance(error, EngineUnavailable):
        return unavailable(f"the engine failed before the answer was complete: {error}")
    if isinstance(error, RequestRejected):
        return ApiError(400, str(error))
    return error


def _room(num_prompt: int, max_tokens: int | None, context: int, param: str) -> int:
    """How many tokens could be generated. Raises ApiError when prompt and answer do not fit into the context."""
    room = context - num_prompt
    if room < 1:
        raise ApiError(
            400,
            f"{param}: it has {num_prompt} tokens, and prompt and answer together may have {context}: shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise ApiError(
            400,
            f"max_tokens: {num_prompt} tokens in {param} and {max_tokens} for the answer exceed the context of "
            f"{context} tokens: lower max_tokens to {room}, or shorten {param}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room


def _sampling(options: Sampling, max_tokens: int, eos_token_ids: tuple[int, ...]) -> SamplingParams:
    """The tokenizer's end tokens end an answer beside those of the checkpoint's config: training teaches the former."""
    temperature = options.default_temperature if options.temperature is None else options.temperature
    top_p = 1.0 if options.top_p is None else options.top_p
    greedy = temperature < GREEDY_BELOW or top_p == 0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        top_p=top_p or 1.0,
        top_k=max(0, options.top_k or 0),
        seed=options.seed,
        ignore_eos=bool(options.ignore_eos),
        stop_token_ids=() if options.ignore_eos else eos_token_ids,
    )
