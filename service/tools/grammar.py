"""Calls as a grammar of llguidance, so that what follows it is calls that can be made, whatever the model has learned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lm.tool_formats import ToolFormat
from lm.tool_prompt import NO_PARAMETERS
from service.json_schemas import JSON_STYLE, closed
from service.schemas.messages import Function

MAX_CALLS = 16
"""In one answer. A model that has not learned to stop would call until its tokens are used up."""
ANY_TEXT = r"TEXT: /(.|\n)*/"
JSON_PIECES = re.compile(r'"[^"]*"|[^"]+')
NO_OBJECT = r"TEXT: /[ \t\r\n]*([^ \t\r\n{](.|\n)*)?/"


def calls_grammar(
    format: ToolFormat,
    functions: Sequence[Function],
    *,
    must_call: bool,
    max_calls: int,
    special_tokens: Mapping[str, int],
) -> str:
    """An answer of 1 to `max_calls` calls and nothing else, in Lark's form; or, where it need not call, any text in
    which whatever begins as a call is one.

    `special_tokens` are parts of the format that the model has a token for; their text alone would not be that token.
    """
    literal = partial(_literal, special_tokens=special_tokens)
    opening = "" if must_call or not format.markers else format.markers[0]
    more = f"({literal(format.separator)} call){{0,{max_calls - 1}}}" if max_calls > 1 else ""
    calls = f"{literal(format.begin.removeprefix(opening))} call {more} {literal(format.end)}"
    if must_call:
        rules = [f"start: {calls}"]
    elif not opening:
        rules = [f"start: TEXT | {calls}", NO_OBJECT]
    else:
        each_opens = max_calls > 1 and not format.begin
        lazy = "" if opening in special_tokens else "[lazy]"
        rules = ["start: (opened call)* TEXT" if each_opens else f"start: TEXT | opened {calls}"]
        rules += [f"opened{lazy}: TEXT {literal(opening)}", ANY_TEXT]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        before = literal(format.before_name.removeprefix(opening) + function.name + format.before_arguments)
        rules.append(f"call_{index}: {before} arguments_{index} {literal(format.after_arguments)}")
        rules.append(f"arguments_{index}: %json {json.dumps(_arguments(function))}")
    return "\n".join(rules)


def calls_or_answer(calls: str, answer: str) -> str:
    """An answer that is either: `calls` must be of a grammar that must call, `answer` in any form of llguidance's."""
    start, *rules = calls.splitlines()
    either = "\n".join((start.replace("start: ", "start: @answer | ", 1), *rules))
    other = json.loads(answer)["grammars"][0] if answer.startswith("{") else {"lark_grammar": answer}
    return json.dumps({"grammars": [{"lark_grammar": either}, {**other, "name": "answer"}]}, ensure_ascii=False)


def _arguments(function: Function) -> dict[str, Any]:
    """Their schema: the parameters that are listed and no others, unless they say so. Of a function that is not strict,
    what cannot be enforced is ignored.
    """
    schema = closed({"type": "object", **(function.parameters or NO_PARAMETERS)})
    return {**schema, "x-guidance": JSON_STYLE | {"lenient": not function.strict}}


def _literal(text: str, special_tokens: Mapping[str, int]) -> str:
    """`text` in a rule; nothing for an empty one. SentencePiece begins a text behind a special token with a space.

    In the pieces that JSON has: where an answer in JSON may stand in place of a call, one piece must not decide.
    """
    for token, token_id in special_tokens.items():
        before, found, behind = text.partition(token)
        if found:
            parts = (_literal(before, special_tokens), f"<[{token_id}]>", '" "?', _literal(behind, special_tokens))
            return " ".join(part for part in parts if part)
    return " ".join(map(json.dumps, JSON_PIECES.findall(text)))
