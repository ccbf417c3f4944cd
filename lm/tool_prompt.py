"""Conversations with tools in the form that a model's template takes.

Templates that know a format of calls get tools, calls and results as they are, but for what they would refuse. For all
other templates, so that any model can be asked, the tools stand in the system message, in Hermes's form; calls of the
assistant become `<tool_call>` blocks of its text, and their results `<tool_response>` blocks of a message of the user.
Serving and training write the same. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from lm.errors import UserError
from lm.messages import Message, template_messages
from lm.template import ChatTemplate
from lm.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, ToolFormat, find_format

TOOLS_PROMPT = """\
# Tools

You may call functions to answer the user. These are the functions, one JSON object in each line:
<tools>
{tools}
</tools>

To call a function, write its name and its arguments as a JSON object between <tool_call> tags:
<tool_call>
{{"name": "function-name", "arguments": {{"argument-name": "value"}}}}
</tool_call>
The results come back between <tool_response> tags."""
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
"""Of a function without any."""
MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")
ONE_CALL_ONLY = "single tool-call"
"""In the error of Llama's templates for several calls in one message."""


def shown_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function in OpenAI's form, which templates take. Some read the parameters without asking whether there are any."""
    described = {} if description is None else {"description": description}
    function = {"name": name, **described, "parameters": dict(parameters or NO_PARAMETERS)}
    return {"type": "function", "function": function}


def prompt_messages(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], template: ChatTemplate
) -> tuple[Sequence[Message], Sequence[dict[str, Any]] | None]:
    """Messages and tools as `template` takes them. Fields that it does not know, such as a `weight`, stay where they are.

    Raises UserError for arguments of a call that are no JSON object.
    """
    has_tools = tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if not has_tools:
        return messages, None
    native = find_format(template)
    if native is None:
        return described_messages(messages, tools, template), None
    return native_messages(messages, native, template), tools or None


def native_messages(messages: Sequence[Message], format: ToolFormat, template: ChatTemplate) -> list[Message]:
    """For a template that writes `format`. Raises UserError for arguments that are no JSON object."""
    plain = template_messages(messages)
    if format in (MISTRAL, MISTRAL_ARGS):
        return [_with_mistral_ids(message) for message in plain]
    if format is LLAMA3 and ONE_CALL_ONLY in template.tool_use.source:
        return _one_call_each(plain)
    return list(plain)


def described_messages(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], template: ChatTemplate
) -> list[Message]:
    """For a template that knows no tools. Raises UserError for arguments that are no JSON object."""
    described: list[dict[str, Any]] = []
    answered = False
    for message in template_messages(messages):
        is_result = message["role"] == "tool"
        message = _described(message)
        if answered and message["role"] == "user":  # templates want user and assistant to take turns
            described[-1]["content"] += "\n" + message["content"]
        else:
            described.append(message)
        answered = is_result
    return _with_prompt(described, tools, template) if tools else list(described)


def _described(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    content = message.get("content", "")
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        content += (HERMES.separator if content else "") + HERMES.write(function["name"], arguments)
    return {**{field: value for field, value in message.items() if field != "tool_calls"}, "content": content}


def _with_prompt(
    messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], template: ChatTemplate
) -> list[Message]:
    prompt = TOOLS_PROMPT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    first, *rest = messages
    if first["role"] == "system" or not _takes_system(template):
        texts = (first["content"], prompt) if first["role"] == "system" else (prompt, first["content"])
        return [{**first, "content": "\n\n".join(text for text in texts if text)}, *rest]
    return [{"role": "system", "content": prompt}, *messages]


def _takes_system(template: ChatTemplate) -> bool:
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    try:
        template.render(asked, add_generation_prompt=True)
    except UserError:
        return False
    return True


def _with_mistral_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Mistral's templates refuse ids other than nine letters and digits."""
    if "tool_calls" in message:
        message["tool_calls"] = [{**call, "id": _mistral_id(call.get("id", ""))} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        message["tool_call_id"] = _mistral_id(message["tool_call_id"])
    return message


def _mistral_id(call_id: str) -> str:
    known = MISTRAL_ID.fullmatch(call_id) is not None
    return call_id if known else hashlib.sha256(call_id.encode("utf-8", "backslashreplace")).hexdigest()[:9]


def _one_call_each(messages: list[dict[str, Any]]) -> list[Message]:
    """Calls made at once as if each had followed the result of the one before, which is what such templates can write."""
    ordered: list[Message] = []
    for is_result, group in groupby(messages, lambda message: message["role"] == "tool"):
        results = list(group)
        if not is_result:
            ordered += results
            continue
        calls = ordered[-1].get("tool_calls", ()) if ordered else ()
        if len(calls) > 1:
            ordered += [*_taking_turns(dict(ordered.pop()), results), *results]
        else:
            ordered += results
    return ordered


def _taking_turns(message: dict[str, Any], results: list[dict[str, Any]]) -> Iterator[Message]:
    """The calls of `message`, each with its result, which is taken out of `results`."""
    for call in message.pop("tool_calls"):
        yield {**message, "tool_calls": [call]}
        message = {field: value for field, value in message.items() if field != "content"}
        for result in [result for result in results if result.get("tool_call_id") == call.get("id")]:
            results.remove(result)
            yield result
