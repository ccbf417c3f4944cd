"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.asking import ask
from service.generation import Piece
from service.routes.replies import STREAMED, Reply, chunks, new_reply
from service.schemas.answers import ChatChoice, ChatCompletion, ChatMessage
from service.schemas.requests import ChatRequest, Message
from service.services import ServicesDep
from service.sse import DONE, event_stream, unless_gone

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep
) -> ChatCompletion | Response:
    """Answer a conversation."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    engine = services.generator.ready_engine()
    messages = plain(body.messages)
    asks = await ask(services.codec, engine, [messages], body, max_tokens=max_tokens, param="messages")
    answers = services.generator.answers_for(asks)
    reply = new_reply(services, request, answers, model=body.model, prefix="chatcmpl")
    if body.stream:
        return await event_stream(request.receive, _events(reply, body))
    texts = await unless_gone(request.receive, reply.texts())
    choices = [
        ChatChoice(
            index=answer.index,
            message=ChatMessage(content=text),
            finish_reason=answer.outcome,
            stop_reason=answer.stop_reason,
        )
        for answer, text in zip(answers, texts, strict=True)
    ]
    return ChatCompletion(**reply.head("chat.completion"), choices=choices, usage=reply.usage())


def plain(messages: Sequence[Message]) -> list[Mapping[str, str]]:
    """As the chat template takes them."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    ]


async def _events(reply: Reply, body: ChatRequest) -> AsyncGenerator[bytes]:
    async for item in chunks(reply, "chat.completion.chunk", body.stream_options, _delta_choices()):
        yield item
    yield DONE


def _delta_choices() -> Callable[[Piece], list[dict[str, Any]]]:
    """The role once, then text, then an empty delta with the finish reason."""
    begun: set[int] = set()

    def choices(piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, str]] = []
        if piece.answer.index not in begun:
            begun.add(piece.answer.index)
            deltas.append({"role": "assistant", "content": ""})
        if piece.text:
            deltas.append({"content": piece.text})
        made = [_choice(piece, delta) for delta in deltas]
        if piece.finish_reason is not None:
            made.append(
                {**_choice(piece, {}), "finish_reason": piece.finish_reason, "stop_reason": piece.answer.stop_reason}
            )
        return made

    return choices


def _choice(piece: Piece, delta: dict[str, str]) -> dict[str, Any]:
    return {"index": piece.answer.index, "delta": delta, "logprobs": None, "finish_reason": None}
