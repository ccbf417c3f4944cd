"""What the routes that generate share: the frame of an answer, its usage, its chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from service.generation import Answer, Piece
from service.schemas.answers import Usage
from service.schemas.requests import StreamOptions
from service.services import Services
from service.sse import event

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The answer, or its events"}
}
"""What a route's documentation says beside its JSON answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answers to one request."""

    id: str
    created: int
    services: Services
    answers: list[Answer]
    pieces: AsyncGenerator[list[Piece]]

    def head(self, kind: str) -> dict[str, Any]:
        """What every form of the answer begins with. Known once the first piece is there."""
        entry = self.answers[0].entry
        assert entry is not None
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
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    async def texts(self) -> list[str]:
        """The whole texts, by index."""
        parts: list[list[str]] = [[] for _ in self.answers]
        async with aclosing(self.pieces):
            async for batch in self.pieces:
                for piece in batch:
                    parts[piece.answer.index].append(piece.text)
        return ["".join(part) for part in parts]


def new_reply(services: Services, request: Request, answers: list[Answer], *, model: str | None, prefix: str) -> Reply:
    return Reply(
        id=f"{prefix}-{request.state.request_id}",
        created=int(time.time()),
        services=services,
        answers=answers,
        pieces=services.generator.run(model, answers),
    )


async def chunks(
    reply: Reply, kind: str, options: StreamOptions | None, choices: Callable[[Piece], list[dict[str, Any]]]
) -> AsyncGenerator[bytes]:
    """The events of a stream, with each of a piece's `choices` in a chunk of its own; then the usage if asked for.

    [DONE] is left to the caller, who may have more to say.
    """
    options = options or StreamOptions()
    prompt_tokens = reply.num_prompt_tokens
    num_tokens = [0] * len(reply.answers)
    async with aclosing(reply.pieces):
        async for batch in reply.pieces:
            events = []
            for piece in batch:
                num_tokens[piece.answer.index] = piece.num_tokens
                for choice in choices(piece):
                    chunk = {**reply.head(kind), "choices": [choice]}
                    if options.continuous_usage_stats:
                        chunk["usage"] = _usage_so_far(prompt_tokens, sum(num_tokens))
                    elif options.include_usage:
                        chunk["usage"] = None
                    events.append(event(chunk))
            yield b"".join(events)
    if options.include_usage:
        yield event(last_chunk(reply, kind))


def last_chunk(reply: Reply, kind: str) -> dict[str, Any]:
    return {**reply.head(kind), "choices": [], "usage": reply.usage().model_dump()}


def _usage_so_far(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
