"""From the body of a request with messages to the conversation that is rendered."""

from __future__ import annotations

from typing import Any

from lm.template import RenderOptions
from service.asking import Chat
from service.schemas.messages import Message
from service.schemas.requests import Conversation


def chat_of(body: Conversation) -> Chat:
    messages = [_plain(message) for message in body.messages or ()]
    options = RenderOptions(continue_final_message=bool(body.continue_final_message))
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.chat_template_kwargs:
        options["variables"] = body.chat_template_kwargs
    return Chat(messages=messages, options=options)


def _plain(message: Message) -> dict[str, Any]:
    """As the chat template takes them."""
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.content is not None:
        plain["content"] = message.content
    if message.tool_calls:
        plain["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.role == "tool" and message.name is not None:
        plain["name"] = message.name
    return plain
