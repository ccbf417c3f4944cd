"""What the engine is asked for the answers of one HTTP request: sent together, heard together, ended together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from functools import partial
from uuid import uuid4

from service.answer import Answer
from service.engine.messages import AddRequest, TokenOutput
from service.engine_client import EngineClient, ModelUnavailable
from service.engine_stream import Mailbox
from service.errors import unavailable
from service.registry import Entry
from service.serving import Serving

MAX_ATTEMPTS = 5


class EngineRequests:
    """One for each answer, on the weights that `model` names when the engine takes it."""

    def __init__(self, engine: EngineClient, serving: Serving, model: str | None) -> None:
        self.open: dict[Answer, str] = {}
        """Answers whose last output has not come, and the ids of their requests."""
        self._engine = engine
        self._serving = serving
        self._model = model
        self.mailbox: Mailbox[Answer, TokenOutput | Exception] = Mailbox()
        """What comes for them."""
        self._attempts: Counter[Answer] = Counter()
        self._retries: set[asyncio.Task[None]] = set()

    async def submit(self, answers: Iterable[Answer]) -> None:
        """Raises what `Serving.acquire` and `EngineClient.submit` do."""
        entry = await self._serving.acquire(self._model)
        for answer in answers:  # without an await: the weights may leave in one
            self._send(answer, entry)

    def retry(self, answer: Answer, error: Exception) -> None:
        """Ask again after `error` where weights that left are no failure. Raises it otherwise."""
        if not isinstance(error, ModelUnavailable):
            raise error
        self._attempts[answer] += 1
        if self._attempts[answer] == MAX_ATTEMPTS:
            raise unavailable("the model left the engine again and again while this request waited")
        task = asyncio.create_task(self._submit_again(answer))
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    def abort(self, answer: Answer) -> None:
        """The answer is complete without the engine knowing it. Its last output still comes."""
        self._engine.abort(self.open[answer])

    def close(self) -> None:
        """End what is open."""
        for task in self._retries:
            task.cancel()
        for request_id in self.open.values():
            self._engine.abandon(request_id)

    def _send(self, answer: Answer, entry: Entry) -> None:
        request_id = uuid4().hex
        prompt_ids = answer.ask.prompt_ids
        request = AddRequest(request_id=request_id, model_id=entry.id, prompt_ids=prompt_ids, sampling=answer.sampling)
        answer.entry = entry
        self._engine.submit(request, partial(self.mailbox.put, answer))
        self.open[answer] = request_id

    async def _submit_again(self, answer: Answer) -> None:
        assert answer.entry is not None
        try:
            await self._serving.forget(answer.entry)
            await self.submit([answer])
        except Exception as error:  # noqa: BLE001 - told to who takes from the mailbox
            self.mailbox.put(answer, error)
