"""What the routes that generate share: the frame of an answer, its usage, its chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from service.generation import Answer, Piece
from service.schemas.answers import PromptTokensDetails, Usage
from service.schemas.requests import StreamOptions
from service.services import Services
from service.sse import DONE, event

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The answer, or its events"}
}
"""What a route's documentation says beside its JSON answer."""

MANY_LOGPROBS = 500  # of which a millisecond writes about so many

encode = msgspec.json.Encoder().encode

Choices = Callable[[Piece], Iterable[bytes]]
"""The choices that tell a piece, as JSON; each goes into a chunk of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answers to one request."""

    id: str
    created: int
    services: Services
    answers: list[Answer]
    batches: AsyncGenerator[list[Piece]]

    def head(self, kind: str) -> dict[str, Any]:
        """What every form of the answer begins with. Known once the first piece is there."""
        entry = next(answer.entry for answer in self.answers if answer.entry is not None)
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": entry.id,
            "system_fingerprint": f"ts-{self.services.serving.weights_hash(entry.id)}",
        }

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, however many answers it gets."""
        return sum(len(answer.ask.prompt_ids) for answer in self.answers if answer.sampling.choice == 0)

    def usage(self) -> Usage:
        prompt = self.num_prompt_tokens
        completion = sum(answer.num_tokens for answer in self.answers)
        cached: dict[int, int] = {}
        for answer in self.answers:  # a further answer finds what the first one computed
            before = cached.get(answer.prompt_index, answer.num_cached_tokens)
            cached[answer.prompt_index] = min(before, answer.num_cached_tokens)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached.values())),
        )

    async def texts(self) -> list[str]:
        """The whole texts, by index."""
        parts: list[list[str]] = [[] for _ in self.answers]
        async with aclosing(self.batches):
            async for batch in self.batches:
                for piece in batch:
                    parts[piece.answer.index].append(piece.text)
        return ["".join(part) for part in parts]


async def answered(reply: Reply, make: Callable[[], BaseModel]) -> Response:
    """What `make` makes of a complete reply, as JSON. Where that takes long, a thread does it, and streams go on."""
    num_entries = sum(len(answer.logprobs) + len(answer.prompt_logprobs) for answer in reply.answers)
    is_long = num_entries > MANY_LOGPROBS
    body = await asyncio.to_thread(_as_json, make) if is_long else _as_json(make)
    return Response(body, media_type="application/json")


def _as_json(make: Callable[[], BaseModel]) -> str:
    return make().model_dump_json()


def new_reply(services: Services, request: Request, answers: list[Answer], *, model: str | None, prefix: str) -> Reply:
    return Reply(
        id=f"{prefix}-{request.state.request_id}",
        created=int(time.time()),
        services=services,
        answers=answers,
        batches=services.generator.run(model, answers),
    )


async def chunks(
    reply: Reply,
    kind: str,
    options: StreamOptions | None,
    choices: Choices,
    *,
    summary: Callable[[], dict[str, Any]] | None = None,
) -> AsyncGenerator[bytes]:
    """The events of a stream; then one chunk without choices, with the usage if asked for and always with the fields
    of `summary`. What came together goes out together.
    """
    options = options or StreamOptions()
    tail = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
    head = b""
    so_far = _UsageSoFar(reply.num_prompt_tokens)
    async with aclosing(reply.batches):
        async for batch in reply.batches:
            head = head or b"data: " + encode(reply.head(kind))[:-1] + b',"choices":['
            parts: list[bytes] = []
            for piece in batch:
                if options.continuous_usage_stats:
                    tail = so_far.tail(piece)
                for choice in choices(piece):
                    parts += (head, choice, tail)
            if parts:
                yield b"".join(parts)
    last = b""
    if options.include_usage or summary is not None:
        chunk = {**reply.head(kind), "choices": [], "usage": reply.usage().model_dump()}
        last = event(chunk | (summary() if summary is not None else {}))
    yield last + DONE


def whole_piece(answer: Answer, text: str) -> Piece:
    """A complete answer as one piece."""
    return Piece(
        answer=answer,
        text=text,
        token_ids=tuple(answer.token_ids),
        logprobs=tuple(answer.logprobs),
        num_tokens=answer.num_tokens,
        finish_reason=answer.finish_reason,
    )


class _UsageSoFar:
    def __init__(self, num_prompt_tokens: int) -> None:
        self._prompt = num_prompt_tokens
        self._total = num_prompt_tokens
        self._told: dict[int, int] = {}

    def tail(self, piece: Piece) -> bytes:
        """The end of a chunk that tells `piece`."""
        index = piece.answer.index
        self._total += piece.num_tokens - self._told.get(index, 0)
        self._told[index] = piece.num_tokens
        return b'],"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}\n\n' % (
            self._prompt,
            self._total - self._prompt,
            self._total,
        )
