"""One chat template: a Jinja program that came with a model. Torch-free.

It runs in Jinja's sandbox, in the environment that transformers gives it, and the size of what it writes is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lm.errors import UserError

MAX_RENDERED_CHARS = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JinjaTemplate:
    source: str
    origin: str
    """Where it came from, for people."""
    program: jinja2.Template
    variables: frozenset[str]
    """The names that it reads and does not set itself."""

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises UserError (param `messages`) for what the template refuses, and where it writes too much."""
        pieces = self.program.generate(variables)
        text: list[str] = []
        size = 0
        try:
            while size <= MAX_RENDERED_CHARS and (piece := next(pieces, None)) is not None:
                text.append(piece)
                size += len(piece)
        except Exception as error:  # a template is a program: it can raise anything
            reason = f"messages: the chat template ({self.origin}) refuses them: {error}"
            raise UserError(reason, param="messages") from error
        if size > MAX_RENDERED_CHARS:
            limit = f"over {MAX_RENDERED_CHARS} characters"
            raise UserError(f"messages: the chat template ({self.origin}) makes {limit} of them", param="messages")
        return "".join(text)


def compile_template(source: str, origin: str) -> JinjaTemplate:
    """Raises jinja2.TemplateSyntaxError for what is not valid Jinja."""
    environment = _environment()
    return JinjaTemplate(
        source=source,
        origin=origin,
        program=environment.from_string(source),
        variables=frozenset(meta.find_undeclared_variables(environment.parse(source))),
    )


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates (`_compile_jinja_template`)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
