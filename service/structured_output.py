"""What an answer must look like, from the fields of a request to one grammar in llguidance's form. Torch-free.

What can be told at a glance is refused here, by field, value and mend; whether llguidance can follow the grammar is for
`service.grammar_checker` to find out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from lm.errors import UserError
from service.grammar_checker import GrammarChecker
from service.json_schemas import JSON_STYLE, check_schema, closed
from service.schemas.requests import BaseSampling, Sampling
from service.schemas.structured import MAX_CHOICES, ResponseFormat, StructuredOutputs

MAX_BYTES = 64 << 10
"""Of a schema, a regular expression, a grammar, or all choices together; in UTF-8."""
MAX_RULES = 500
"""Of a grammar in GBNF."""
UNENFORCEABLE = re.compile(r"Unimplemented keys: (\[.*\])")
UNKNOWN_FORMAT = re.compile(r"Unknown format: (\S+)")
GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    grammar: str
    param: str
    """The field that asked for it."""
    has_lenient_form: bool = False
    """Whether the field can also be sent so that what cannot be enforced is ignored."""


def constraint_of(options: BaseSampling) -> Constraint | None:
    """Raises UserError naming the field for what is malformed, too large, or asked for twice."""
    found = [] if options.structured_outputs is None else [of_structured_outputs(options.structured_outputs)]
    if isinstance(options, Sampling):
        if options.response_format is not None and options.response_format.type != "text":
            found.append(of_response_format(options.response_format))
        if options.guided_json is not None:
            found.append(json_schema(options.guided_json, param="guided_json"))
        if options.guided_regex is not None:
            found.append(regex(options.guided_regex, param="guided_regex"))
        if options.guided_choice is not None:
            found.append(choice(options.guided_choice, param="guided_choice"))
        if options.guided_grammar is not None:
            found.append(lark_or_gbnf(options.guided_grammar, param="guided_grammar"))
    if len(found) > 1:
        first, second = found[:2]
        raise UserError(
            f"{second.param}: {first.param} says already what the answer is: send one of them", param=second.param
        )
    return found[0] if found else None


def of_response_format(form: ResponseFormat) -> Constraint:
    """Of `json_object` or `json_schema`. Only with `strict` must the whole schema be enforceable."""
    if form.json_schema is None:
        return json_object(param="response_format")
    wanted = form.json_schema
    return json_schema(wanted.json_schema, param="response_format.json_schema.schema", strict=bool(wanted.strict))


def of_structured_outputs(wanted: StructuredOutputs) -> Constraint:
    if wanted.json_schema is not None:
        return json_schema(wanted.json_schema, param="structured_outputs.json")
    if wanted.regex is not None:
        return regex(wanted.regex, param="structured_outputs.regex")
    if wanted.choice is not None:
        return choice(wanted.choice, param="structured_outputs.choice")
    if wanted.grammar is not None:
        return lark_or_gbnf(wanted.grammar, param="structured_outputs.grammar")
    return json_object(param="structured_outputs.json_object")


def json_object(*, param: str) -> Constraint:
    return Constraint(grammar=_json_grammar({"type": "object"}), param=param)


def json_schema(schema: str | bool | Mapping[str, Any], *, param: str, strict: bool | None = None) -> Constraint:
    """`strict` False leaves out what cannot be enforced; None is True where there is no such choice."""
    if isinstance(schema, str):
        _check_text(schema, param)
        schema = _read_json(schema, param)
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise UserError(f"{param}: a JSON schema is an object (got {schema!r:.100})", param=param)
    check_schema(schema, param)
    grammar = _json_grammar(closed(schema), lenient=strict is False)
    _check_text(grammar, param)
    return Constraint(grammar=grammar, param=param, has_lenient_form=strict is True)


def regex(pattern: str, *, param: str) -> Constraint:
    """The whole answer matches `pattern`, with or without ^ and $."""
    _check_text(pattern, param)
    return Constraint(grammar=LLMatcher.grammar_from_regex(pattern), param=param)


def choice(choices: Sequence[str], *, param: str) -> Constraint:
    if not 0 < len(choices) <= MAX_CHOICES:
        raise UserError(f"{param}: between 1 and {MAX_CHOICES} texts (got {len(choices)})", param=param)
    if "" in choices:
        raise UserError(f"{param}.{choices.index('')}: an answer of no text is none: remove it", param=param)
    _check_text("".join(choices), param)
    return Constraint(grammar=LLMatcher.grammar_from_regex("|".join(map(_escape, choices))), param=param)


def lark_or_gbnf(text: str, *, param: str) -> Constraint:
    """Lark's form as llguidance has it, or GBNF (llama.cpp) and the like: rules with `::=`, of which `root` is the first."""
    _check_text(text, param)
    if text.lstrip().startswith("{"):
        raise UserError(f"{param}: a grammar in Lark's form or in GBNF is wanted; for JSON send a schema", param=param)
    num_rules = len(GBNF_RULE.findall(text))
    if not num_rules:
        return Constraint(grammar=text, param=param)
    if num_rules > MAX_RULES:
        raise UserError(f"{param}: {num_rules} rules are more than {MAX_RULES}: write it in Lark's form", param=param)
    try:
        return Constraint(grammar=gbnf_to_lark(text), param=param)
    except Exception as error:  # the library raises bare Exception for rules that are missing or there twice
        raise UserError(f"{param}: not a grammar in GBNF: {error}", param=param) from error


async def check_constraint(constraint: Constraint, checker: GrammarChecker) -> None:
    """Raises UserError naming the field, where the engine could not follow the grammar."""
    mistake = await checker.find_mistake(constraint.grammar)
    if mistake is not None:
        raise UserError(f"{constraint.param}: {_explain(mistake, constraint)}", param=constraint.param)


def _explain(mistake: str, constraint: Constraint) -> str:
    """llguidance's words, or better ones where they name a keyword of JSON schemas."""
    mend = "remove it, or leave out strict to have it ignored" if constraint.has_lenient_form else "remove it"
    if found := UNENFORCEABLE.search(mistake):
        keywords = ", ".join(json.loads(found[1]))
        return f"{keywords} cannot be enforced while an answer is made: {mend}"
    if found := UNKNOWN_FORMAT.search(mistake):
        return f"the format {found[1]} cannot be enforced: {mend}"
    if "oneOf constraints are not supported" in mistake:
        return f"oneOf cannot be enforced where its options may overlap: use anyOf; or {mend}"
    return mistake


def _json_grammar(schema: Mapping[str, Any], **options: Any) -> str:
    return json.dumps(
        {"grammars": [{"json_schema": {**schema, "x-guidance": JSON_STYLE | options}}]}, ensure_ascii=False
    )


def _read_json(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{param}: not JSON: {error}", param=param) from error


def _check_text(text: str, param: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"{param}: half a character ({found}), which is no text: send whole ones", param=param
        ) from error
    if not text.strip():
        raise UserError(f"{param}: it is empty", param=param)
    if size > MAX_BYTES:
        raise UserError(f"{param}: {size} bytes are more than {MAX_BYTES}: make it smaller", param=param)


def _escape(text: str) -> str:
    """In a regular expression of Rust's."""
    return "".join(char if char.isalnum() or char in " _" else f"\\x{{{ord(char):x}}}" for char in text)
