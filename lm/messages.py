"""Messages of a conversation: which ones there are, and the form in which chat templates take them. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lm.errors import UserError

Message = Mapping[str, Any]
"""`role` and `content`. With tools an assistant's message may have `tool_calls` in OpenAI's form, beside which the
content may be missing, and a message of role `tool` may have `tool_call_id` and `name`."""

ROLES = ("system", "user", "assistant")
FIELDS = ("role", "content")
MAX_ARGUMENTS_DEPTH = 100
"""Of objects and lists within each other. Writing JSON fails for a few hundred more."""
TOOL_FIELDS = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}


def check_messages(messages: Any, *, with_tools: bool = False) -> None:
    """Raise UserError, with the index of the message at fault, unless `messages` is a non-empty list of messages.

    `with_tools` takes messages of role `tool` and `tool_calls` of an assistant, too.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"messages: must be a list of at least one message (got {messages!r:.80})", param="messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", with_tools)


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked messages as transformers hands them to templates: without fields that are null.

    The arguments of calls, which OpenAI's clients send as a text, become the object that templates write.
    """
    plain = [{field: value for field, value in message.items() if value is not None} for message in messages]
    for index, message in enumerate(plain):
        if calls := message.get("tool_calls"):
            where = f"messages[{index}].tool_calls"
            message["tool_calls"] = [_with_arguments(call, f"{where}[{place}]") for place, call in enumerate(calls)]
    return plain


def parse_arguments(arguments: Any, where: str) -> dict[str, Any]:
    """The object that `arguments` are or, as a text, say; an empty text is an empty object. Raises UserError."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}", parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: must be a JSON object as a text ({error}: {arguments!r:.80})", param=where
            ) from error
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: must be a JSON object (got {arguments!r:.80})", param=where)
    if _is_deeper(arguments, MAX_ARGUMENTS_DEPTH):
        limit = f"more than {MAX_ARGUMENTS_DEPTH} objects and lists within each other"
        raise UserError(f"{where}: {limit}", param=where)
    return dict(arguments)


def _check_message(message: Any, where: str, with_tools: bool) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: must be an object with role and content (got {message!r:.80})", param=where)
    calls = message.get("tool_calls") if with_tools else None
    _check_text(message, "role", where)
    if not calls or message.get("content") is not None:
        _check_text(message, "content", where)
    role, roles = message["role"], (*ROLES, "tool") if with_tools else ROLES
    if role not in roles:
        reason = f"must be one of {', '.join(roles)} (got {role!r:.80})"
        raise UserError(f"{where}.role: {reason}", param=f"{where}.role")
    fields = (*FIELDS, *TOOL_FIELDS.get(role, ())) if with_tools else FIELDS
    if unknown := sorted(str(field) for field in message if field not in fields):
        known = f"{', '.join(fields[:-1])} and {fields[-1]}"
        raise UserError(f"{where}.{unknown[0]}: unknown field; a message has {known}", param=where)
    if calls is not None and not isinstance(calls, list | tuple):
        raise UserError(f"{where}.tool_calls: must be a list (got {calls!r:.80})", param=f"{where}.tool_calls")
    for index, call in enumerate(calls or ()):
        _check_call(call, f"{where}.tool_calls[{index}]")


def _check_text(message: Message, field: str, where: str) -> None:
    if not isinstance(message.get(field), str):
        got = f"got {message[field]!r:.80}" if field in message else "it is missing"
        raise UserError(f"{where}.{field}: must be a string ({got})", param=f"{where}.{field}")


def _check_call(call: Any, where: str) -> None:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise UserError(f"{where}: must have a function with name and arguments (got {call!r:.80})", param=where)


def _with_arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call["function"]
    arguments = parse_arguments(function["arguments"], f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _is_deeper(value: Any, depth: int) -> bool:
    """Found without recursion, which deep values would exhaust."""
    level = [value]
    for _ in range(depth):
        nested = [item for item in level if isinstance(item, Mapping | list)]
        level = [one for item in nested for one in (item.values() if isinstance(item, Mapping) else item)]
    return any(isinstance(item, Mapping | list) for item in level)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
