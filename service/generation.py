"""The one way from token ids to their answers, for every endpoint, streamed or not.

Prompts become `Ask`s in `service.asking`; nothing has started then. `Generator.run` brings the answers to them, as
pieces of text, through the engine and the detokenizer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby

import msgspec

from service.admission import Admission
from service.answer import Answer, Ask, Piece
from service.decoders import Decoders
from service.detokenizer import Detokenizer, StopFinder
from service.engine.messages import EngineReady, TokenOutput
from service.engine_client import EngineClient, EngineError, EngineUnavailable, RequestRejected
from service.engine_requests import EngineRequests
from service.errors import ApiError, unavailable
from service.metrics import AbortCause, Metrics
from service.serving import Serving

__all__ = ["Answer", "Ask", "Generator", "Piece"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    engine: EngineClient
    serving: Serving
    decoders: Decoders
    metrics: Metrics
    admission: Admission

    def ready_engine(self) -> EngineReady:
        """Of one that sleeps, what it was; its requests wait. Raises ApiError 503 while there is none."""
        gate = self.serving.gate
        ready = self.engine.ready if gate.is_open else self.engine.known
        if ready is None and not gate.is_open:
            raise gate.refusal()
        if ready is None:
            raise unavailable("no model is loaded yet; GET /health says what the engine is doing", retry_after=5)
        return ready

    def answers_for(self, asks: Sequence[Ask]) -> list[Answer]:
        """The answers that `run` will bring, in order. Raises ApiError 503 while there is no engine."""
        engine, started = self.ready_engine(), time.monotonic()
        choices = [(index, ask, choice) for index, ask in enumerate(asks) for choice in range(ask.n)]
        return [
            Answer(
                index=index,
                prompt_index=prompt_index,
                ask=ask,
                sampling=msgspec.structs.replace(ask.sampling, choice=choice),
                detokenizer=Detokenizer(
                    self.decoders.new(skip_special_tokens=ask.skip_special_tokens),
                    StopFinder(ask.stop, include=ask.include_stop),
                ),
                engine=engine,
                started=started,
            )
            for index, (prompt_index, ask, choice) in enumerate(choices)
        ]

    async def run(self, model: str | None, answers: Sequence[Answer]) -> AsyncGenerator[list[Piece]]:
        """The pieces of all answers, as they come: each time all that are there. Closing it aborts what still runs.

        Raises NotFoundError for an unknown model, and ApiError: 429 or 503 for a service that is full, draining or
        without an engine, 409 for a model that cannot be loaded; RequestCrashed when the engine failed in this request.
        """
        requests = EngineRequests(self.engine, self.serving, model)
        with self.admission.enter(len(answers)), closing(requests), self._accounting(requests, answers):
            await requests.submit(answers)
            while requests.open:
                pieces, error = self._take(requests, await requests.mailbox.take())
                if pieces:
                    yield pieces
                if error is not None:
                    raise error

    # ---- what comes from the engine

    def _take(
        self, requests: EngineRequests, items: Iterable[tuple[Answer, TokenOutput | Exception]]
    ) -> tuple[list[Piece], Exception | None]:
        """The pieces that `items` make, up to an error that ends the request."""
        now = time.monotonic()
        pieces: list[Piece] = []
        num_tokens = 0
        try:
            for answer, item in items:
                if not isinstance(item, TokenOutput):
                    self._fail(requests, answer, item)
                elif answer.finish_reason is not None:
                    self._hear_last(requests, answer, item)
                else:
                    num_before = len(answer.token_ids)
                    if (piece := answer.take(item)) is not None:
                        pieces.append(piece)
                    if (num_new := len(answer.token_ids) - num_before) > 0:
                        num_tokens += num_new
                        self._clock(answer, now)
                    if answer.finish_reason is not None:
                        self._end(requests, answer, item)
        except Exception as error:  # noqa: BLE001 - raised when the pieces before it have been told
            return pieces, error
        finally:
            self.metrics.generation_tokens.inc(num_tokens)
        return pieces, None

    def _end(self, requests: EngineRequests, answer: Answer, output: TokenOutput) -> None:
        """The answer is complete with `output`. That a stop string ended it the engine does not know."""
        if output.finish_reason is None:
            requests.abort(answer)
        else:
            self._hear_last(requests, answer, output)

    def _hear_last(self, requests: EngineRequests, answer: Answer, output: TokenOutput) -> None:
        if output.finish_reason is not None:
            answer.timing = output.timing
            self._finish(requests, answer)

    def _fail(self, requests: EngineRequests, answer: Answer, error: Exception) -> None:
        """Raises `error` unless the answer was complete before, or is asked for again."""
        if answer.finish_reason is None:
            requests.retry(answer, error)
        else:
            self._finish(requests, answer)

    # ---- metrics

    def _clock(self, answer: Answer, now: float) -> None:
        """Tokens have come."""
        if answer.last_token is not None:
            self.metrics.next_token(now - answer.last_token)
        else:
            answer.first_token = now
            num_prompt = len(answer.ask.prompt_ids)
            self.metrics.first_token(num_prompt, now - answer.started, cached_tokens=answer.num_cached_tokens)
        answer.last_token = now

    def _finish(self, requests: EngineRequests, answer: Answer) -> None:
        del requests.open[answer]
        if answer.outcome == "abort":
            self.metrics.request_aborted("shutdown")
        self.metrics.request_finished(
            answer.outcome,
            prompt_tokens=len(answer.ask.prompt_ids),
            generated_tokens=answer.num_tokens,
            max_tokens=answer.sampling.max_tokens,
            seconds=(answer.last_token or time.monotonic()) - answer.started,
            timing=answer.timing,
            cached_tokens=answer.num_cached_tokens,
        )

    @contextmanager
    def _accounting(self, requests: EngineRequests, answers: Sequence[Answer]) -> Iterator[None]:
        """Count how the answers end, and raise what the engine says as an HTTP error."""
        try:
            yield
        except BaseException as error:
            self._count_aborted(requests, answers, error)
            if isinstance(error, EngineUnavailable):
                reason = f"the engine failed before the answer was complete: {error}"
                raise unavailable(reason) from error
            if isinstance(error, RequestRejected):
                raise ApiError(400, str(error)) from error
            raise
        for _, group in groupby(answers, key=lambda answer: answer.prompt_index):
            lengths = [answer.num_tokens for answer in group]
            self.metrics.prompt_finished(n=len(lengths), longest_answer=max(lengths))

    def _count_aborted(self, requests: EngineRequests, answers: Sequence[Answer], error: BaseException) -> None:
        """What was refused before the engine had it is not counted; a client that did not wait for it is."""
        cause: AbortCause = "error" if isinstance(error, Exception) else "client"
        if isinstance(error, EngineError):
            cause = "engine"
        for answer in answers if requests.open or cause == "client" else ():
            if answer.finish_reason is None:
                self.metrics.request_aborted(cause)
            elif answer in requests.open:
                self._finish(requests, answer)
