"""Lists of turns as data sets have them, brought into checked chat messages. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm.errors import UserError
from lm.messages import check_messages, template_messages
from lm.tool_prompt import shown_tool
from trainer.data.errors import DataError, kind, quoted

Messages = list[dict[str, Any]]
"""Chat messages; those of the assistant may have a `weight`, and with 0 they are not trained."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names and those that LLaMA-Factory adds for tools."""


def text_of(value: object, what: str, param: str | None) -> str:
    """`value`, checked. Raises DataError that begins with `what` unless it is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {kind(value)}", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(
            f"{what} has half of a surrogate pair ({half}) at character {error.start}", param=param
        ) from None
    return value


def checked_messages(messages: Any, where: str, param: str | None) -> Messages:
    """Messages with a `weight` here and there, one of them an assistant's. Raises DataError."""
    try:
        plain = [_plain(message, index) for index, message in enumerate(messages)] if _is_list(messages) else messages
        without = [_checkable(message) for message in plain] if _is_list(plain) else plain
        check_messages(without, with_tools=True)
        if any(message.get("tool_calls") for message in plain):
            template_messages(without)  # for the arguments of calls, which are JSON
    except UserError as error:
        raise DataError(f"{where}: {error}", param=param) from error
    if all(message["role"] != "assistant" for message in plain):
        reason = 'no message has the role "assistant", so there is nothing to learn'
        raise DataError(f"{where}: {reason}", param=param)
    for index, message in enumerate(plain):
        if message.get("content") is not None:
            text_of(message["content"], f"{where}: messages[{index}].content", param)
    return plain


def without_weight(message: Any) -> Any:
    """The message as a chat template takes it."""
    if isinstance(message, Mapping) and "weight" in message:
        return {field: value for field, value in message.items() if field != "weight"}
    return message


def trained_answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indexes of the assistants' messages whose weight is not 0."""
    return [
        index for index, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0
    ]


def turns_to_messages(turns: Any, what: str, where: str, param: str | None) -> tuple[Messages, list[str]]:
    """ShareGPT's turns {from, value} as messages, not yet checked; and the fields of turns that are not looked at."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {what} must be a list of at least one turn, not {kind(turns)}", param=param)
    name = what.strip('"')
    messages = [_turn(turn, f"{name}[{index}]", where, param) for index, turn in enumerate(turns)]
    unused = dict.fromkeys(field for turn in turns for field in turn if field not in ("from", "value", "weight"))
    return messages, [f"{name}[].{field}" for field in unused]


def read_tools(value: Any, what: str, param: str | None) -> list[dict[str, Any]] | None:
    """Functions in OpenAI's form, as a list or as JSON text; None where there are none. Raises DataError."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{what} is a text that is not JSON: {error}", param=param) from error
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list of functions, not {kind(value)}", param=param)
    return [_tool(tool, f"{what}[{index}]", param) for index, tool in enumerate(value)]


def _tool(tool: Any, what: str, param: str | None) -> dict[str, Any]:
    """Bare functions, which LLaMA-Factory's files have, are put into OpenAI's form."""
    if isinstance(tool, dict) and isinstance(tool.get("name"), str) and "function" not in tool:
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f'{what} must be {{"type": "function", "function": {{"name", "description", "parameters"}}}} '
            f"(got {tool!r:.80})",
            param=param,
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise DataError(f"{what}.function.parameters must be an object, not {kind(parameters)}", param=param)
    return shown_tool(function["name"], function.get("description"), parameters)


def _checkable(message: Any) -> Any:
    """Only an assistant's message may have a weight."""
    is_answer = isinstance(message, Mapping) and message.get("role") == "assistant"
    return without_weight(message) if is_answer else message


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _plain(message: Any, index: int) -> Any:
    """OpenAI's lists of text parts as one text; a weight of 1 left out. Raises UserError for another weight."""
    if not isinstance(message, Mapping):
        return message
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        plain["content"] = "".join(part["text"] for part in content)
    if plain.get("role") == "assistant" and "weight" in plain:
        weight = plain.pop("weight")
        if weight not in (None, 0, 1) or isinstance(weight, bool):
            where = f"messages[{index}].weight"
            raise UserError(f"{where}: must be 0 (not trained) or 1 (got {weight!r:.80})", param=where)
        if weight == 0 and weight is not None:
            plain["weight"] = 0
    return plain


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _turn(turn: object, what: str, where: str, param: str | None) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        found = quoted(turn) if isinstance(turn, dict) else kind(turn)
        hint = "; for role and content set data_format to messages" if "role" in found else ""
        raise DataError(f'{where}: {what} needs "from" and "value", found {found}{hint}', param=param)
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise DataError(f"{where}: {what}.from must be one of {known} (got {turn['from']!r:.80})", param=param)
    text = text_of(turn["value"], f"{where}: {what}.value", param)
    if turn["from"] == "function_call":
        return {"role": role, "tool_calls": _calls(text, f"{where}: {what}.value", param)}
    weight = {"weight": turn["weight"]} if role == "assistant" and "weight" in turn else {}
    return {"role": role, "content": text, **weight}


def _calls(text: str, what: str, param: str | None) -> list[dict[str, Any]]:
    """LLaMA-Factory's text of one call or a list of them, in OpenAI's form."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not the JSON of a call: {error}", param=param) from error
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise DataError(f'{what} must be {{"name", "arguments"}}, or a list of them', param=param)
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls]
