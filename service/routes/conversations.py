"""What a request with messages and tools means for its prompt, and what an answer to it says: text, and calls of tools."""

from __future__ import annotations

from typing import Any

from lm.template import RenderOptions
from service.asking import Chat
from service.codec import Codec
from service.generation import Piece
from service.schemas.answers import ToolCall
from service.schemas.messages import Message
from service.schemas.requests import Conversation
from service.tools.parser import ArgumentsDelta, CallStart, ContentDelta
from service.tools.plan import ToolPlan, plan_tools


def plan_chat(codec: Codec, body: Conversation) -> tuple[Chat, ToolPlan]:
    """Raises UserError for tools, and for calls in the messages, that cannot be."""
    plan = plan_tools(body.tools, body.tool_choice, body.parallel_tool_calls, codec.template)
    options = RenderOptions(
        continue_final_message=bool(body.continue_final_message), variables=body.chat_template_kwargs or {}
    )
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if (tools := plan.template_tools) is not None:
        options["tools"] = tools
    messages = plan.messages([_plain(message) for message in body.messages or ()])
    return Chat(messages=messages, options=options), plan


def _plain(message: Message) -> dict[str, Any]:
    """As `lm.messages` has them."""
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


class Turn:
    """One answer in a conversation that has tools, piece by piece."""

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._parser = plan.parser()

    def add(self, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        """The text that is certain now, and the pieces of calls, at most one of each call, in OpenAI's form."""
        deltas = self._parser.add(piece.text)
        if piece.finish_reason is not None:
            deltas += self._parser.flush()
        text = ""
        calls: dict[int, dict[str, Any]] = {}
        for delta in deltas:
            match delta:
                case ContentDelta():
                    text += delta.text
                case CallStart():
                    function = {"name": delta.name, "arguments": ""}
                    calls[delta.index] = {
                        "index": delta.index, "id": delta.id, "type": "function", "function": function
                    }  # fmt: skip
                case ArgumentsDelta():
                    call = calls.setdefault(delta.index, {"index": delta.index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += delta.text
        return text, list(calls.values())

    def finish_reason(self, reason: str) -> str:
        return self._plan.finish_reason(reason, self._parser.num_calls)


def whole_calls(pieces: list[dict[str, Any]]) -> list[ToolCall] | None:
    """Of an answer that was taken as one piece. None where nothing is called."""
    return [ToolCall.model_validate({**piece, "index": None}) for piece in pieces] or None
