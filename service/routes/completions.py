"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.asking import ask
from service.generation import Piece
from service.routes.replies import STREAMED, Reply, chunks, new_reply
from service.schemas.answers import Completion, CompletionChoice
from service.schemas.requests import CompletionRequest
from service.services import ServicesDep
from service.sse import DONE, event_stream, unless_gone

KIND = "text_completion"
DEFAULT_MAX_TOKENS = 16

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def create_completion(body: CompletionRequest, request: Request, services: ServicesDep) -> Completion | Response:
    """Continue one or more prompts."""
    asks = await ask(
        services.codec,
        services.generator.ready_engine(),
        body.prompt,
        body,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        param="prompt",
    )
    answers = services.generator.answers_for(asks)
    reply = new_reply(services, request, answers, model=body.model, prefix="cmpl")
    if body.stream:
        return await event_stream(request.receive, _events(reply, body))
    texts = await unless_gone(request.receive, reply.texts())
    return Completion(**reply.head(KIND), choices=whole_choices(reply, texts), usage=reply.usage())


def whole_choices(reply: Reply, texts: list[str]) -> list[CompletionChoice]:
    return [
        CompletionChoice(index=answer.index, text=text, finish_reason=answer.outcome, stop_reason=answer.stop_reason)
        for answer, text in zip(reply.answers, texts, strict=True)
    ]


def chunk_choices(piece: Piece) -> list[dict[str, Any]]:
    """Text and finish reason together, as OpenAI's legacy stream has them."""
    choice = {"index": piece.answer.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}
    if piece.finish_reason is not None:
        choice["stop_reason"] = piece.answer.stop_reason
    return [choice]


async def _events(reply: Reply, body: CompletionRequest) -> AsyncGenerator[bytes]:
    async for item in chunks(reply, KIND, body.stream_options, chunk_choices):
        yield item
    yield DONE
