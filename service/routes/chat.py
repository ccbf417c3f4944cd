"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.asking import ask
from service.routes.chat_choices import ChatChoices
from service.routes.conversations import plan_chat
from service.routes.replies import STREAMED, answered, chunks, new_reply
from service.schemas.answers import ChatCompletion
from service.schemas.requests import ChatRequest
from service.services import ServicesDep
from service.sse import event_stream, unless_gone

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def create_chat_completion(body: ChatRequest, request: Request, services: ServicesDep) -> Response:
    """Answer a conversation."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    chat, plan = plan_chat(services.codec, body)
    asks = await ask(
        services,
        [chat],
        body,
        max_tokens=max_tokens,
        param="messages",
        plan=plan,
    )
    reply = new_reply(services, request, services.generator.answers_for(asks), model=body.model, prefix="chatcmpl")
    choices = ChatChoices(services.codec, body, plan)
    if body.stream:
        return await event_stream(request.receive, chunks(reply, "chat.completion.chunk", body.stream_options, choices))
    texts = await unless_gone(request.receive, reply.texts())

    def whole() -> ChatCompletion:
        told = [choices.whole(answer, text) for answer, text in zip(reply.answers, texts, strict=True)]
        return ChatCompletion(**reply.head("chat.completion"), choices=told, usage=reply.usage())

    return await answered(reply, whole)
