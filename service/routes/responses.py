"""/v1/responses: OpenAI's newer form of a chat, without its memory. Nothing is stored between two requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from lm.errors import UserError
from service.asking import ask
from service.codec import Codec
from service.errors import ApiError, as_api_error
from service.generation import Piece
from service.responses.answer import begun_answer, response_usage
from service.responses.conversation import conversation_of, renamed, text_constraint
from service.responses.events import Event, ResponseEvents
from service.routes.conversations import plan_chat
from service.routes.logprobs import chat_logprobs
from service.routes.replies import STREAMED, Reply, new_reply
from service.schemas.response_answers import ResponseAnswer
from service.schemas.responses import ResponseRequest
from service.services import Services, ServicesDep
from service.sse import event, event_stream, unless_gone
from service.tools.parser import ArgumentsDelta, CallStart, ContentDelta, ToolParser

NOT_STORED = "there is no response {id!r}: nothing is stored here, and an answer is whole in the reply to its request"

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", response_model=ResponseAnswer, responses=STREAMED)
async def create_response(body: ResponseRequest, request: Request, services: ServicesDep) -> ResponseAnswer | Response:
    """Answer a conversation, whole or as typed events."""
    try:
        telling = await _begin(body, request, services)
    except (UserError, ApiError) as error:
        raise renamed(error) from error
    if body.stream:
        return await event_stream(request.receive, telling.stream())
    return await unless_gone(request.receive, telling.whole())


@router.get("/v1/responses/{response_id}", include_in_schema=False)
@router.delete("/v1/responses/{response_id}", include_in_schema=False)
@router.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
@router.get("/v1/responses/{response_id}/input_items", include_in_schema=False)
async def find_response(response_id: str) -> None:
    """Nothing is stored."""
    raise ApiError(404, NOT_STORED.format(id=response_id), param="response_id")


@dataclass(slots=True, kw_only=True)
class _Telling:
    """The answer to one request, while it comes."""

    id: str
    body: ResponseRequest
    codec: Codec
    reply: Reply
    parser: ToolParser
    events: ResponseEvents | None = None
    """From the first piece on."""
    held_logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of tokens whose text is not certain yet."""

    async def whole(self) -> ResponseAnswer:
        async with aclosing(self.reply.batches):
            async for batch in self.reply.batches:
                self._tell(batch).take()
        assert self.events is not None
        return self.events.response

    async def stream(self) -> AsyncGenerator[bytes]:
        """What came together goes out together. An error behind the first piece is an event."""
        try:
            async with aclosing(self.reply.batches):
                async for batch in self.reply.batches:
                    if events := self._tell(batch).take():
                        yield _encode(events)
        except Exception as error:
            if self.events is None:
                raise
            self.events.fail(msgspec.json.decode(as_api_error(error).body())["error"])
            yield _encode(self.events.take())

    def _tell(self, batch: list[Piece]) -> ResponseEvents:
        if self.events is None:
            self.events = ResponseEvents(self._begun())
            self.events.begin()
        for piece in batch:
            self._tell_piece(self.events, piece)
        return self.events

    def _tell_piece(self, events: ResponseEvents, piece: Piece) -> None:
        if (num_top := self.body.num_logprobs) is not None:
            self.held_logprobs += chat_logprobs(self.codec.token_bytes, piece.token_ids, piece.logprobs, num_top)
        deltas = self.parser.add(piece.text)
        if piece.finish_reason is not None:
            deltas += self.parser.flush()
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    events.add_text(text, self._take_logprobs())
                case CallStart(_, id, name):
                    self._take_logprobs()
                    events.start_call(id, name)
                case ArgumentsDelta(_, text):
                    events.add_arguments(text)
        if piece.finish_reason is not None:
            if self.held_logprobs and not events.is_in_call:  # of the token that ended the answer
                events.add_text("", self._take_logprobs())
            usage = self.reply.usage()
            events.end(
                piece.finish_reason,
                response_usage(
                    num_input=usage.prompt_tokens,
                    num_cached=usage.prompt_tokens_details.cached_tokens,
                    num_output=usage.completion_tokens,
                ),
            )

    def _take_logprobs(self) -> list[dict[str, Any]]:
        logprobs, self.held_logprobs = self.held_logprobs, []
        return logprobs

    def _begun(self) -> ResponseAnswer:
        head = self.reply.head("response")
        return begun_answer(
            self.body,
            id=self.id,
            created=head["created"],
            model=head["model"],
            system_fingerprint=head["system_fingerprint"],
        )


def _encode(events: list[Event]) -> bytes:
    return b"".join(b"event: %b\n%b" % (told["type"].encode(), event(told)) for told in events)


async def _begin(body: ResponseRequest, request: Request, services: Services) -> _Telling:
    chat, plan = plan_chat(services.codec, conversation_of(body))
    asks = await ask(
        services,
        [chat],
        body,
        max_tokens=body.max_output_tokens,
        param="input",
        plan=plan,
        constraint=text_constraint(body),
    )
    answers = services.generator.answers_for(asks)
    reply = new_reply(services, request, answers, model=body.model, prefix="resp")
    id = f"resp_{request.state.request_id}"
    return _Telling(id=id, body=body, codec=services.codec, reply=reply, parser=plan.parser())
