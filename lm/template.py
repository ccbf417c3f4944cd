"""Chat messages to text and token ids through the model's own Jinja template. Torch-free.

Rendering equals transformers' `apply_chat_template`. Templates come with downloaded models, so they run in Jinja's
sandbox and the size of what they write is bounded. Serving and training use the same path: the tokens that are
trained are the difference between a rendered conversation and its own prompts.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lm.default_templates import choose_default
from lm.errors import UserError
from lm.tokenizer import FILES, Tokenizer, load_tokenizer, model_config
from lm.tokenizer_settings import read_json

log = logging.getLogger(__name__)

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

ROLES = ("system", "user", "assistant")
MAX_RENDERED_CHARS = 16 << 20
OWN_PLACES = ("chat_template.jinja", "tokenizer_config.json")
"""Where a model's own template stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A compiled template with the tokenizer it writes for."""

    template: jinja2.Template
    tokenizer: Tokenizer
    origin: str
    """Which file the template came from, or which default it is, for people."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text; with `add_generation_prompt` it ends where the answer of the assistant begins.

        Raises UserError (param `messages...`) for malformed messages and for those that the template refuses.
        """
        check_messages(messages)
        return self._render(messages, add_generation_prompt=add_generation_prompt, now=datetime.now())

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Token ids of `render`. The template writes the BOS itself where the model wants one."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_with_mask(self, messages: Sequence[Message], *, train_on_input: bool) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and for each whether its prediction is trained.

        Trained are the assistants' contents, each with the token that ends it; with `train_on_input` everything.
        What precedes a trained span is the prompt as `encode` makes it for serving. Raises UserError where the
        template is not prefix-stable, that is where it writes a turn differently once another one follows.
        """
        check_messages(messages)
        now = datetime.now()  # one clock for all renderings: a date in the template must not change between them
        text = self._render(messages, add_generation_prompt=False, now=now)
        ids, ends = self.tokenizer.encode_with_ends(text)
        if train_on_input:
            return ids, [True] * len(ids)
        mask = [False] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start, stop = self._answer_span(messages, index, text, now)
                for position in self._trained_tokens(ids, ends, start, stop):
                    mask[position] = True
        if not any(mask):
            raise UserError("messages: no assistant message, so there is nothing to train on", param="messages")
        return ids, mask

    def _answer_span(self, messages: Sequence[Message], index: int, text: str, now: datetime) -> tuple[int, int]:
        """Where in `text`, the rendered `messages`, the answer `messages[index]` starts and stops (characters)."""
        prompt = self._render(messages[:index], add_generation_prompt=True, now=now)
        answered = self._render(messages[: index + 1], add_generation_prompt=False, now=now)
        for rendered, what in ((prompt, "the prompt before"), (answered, "the conversation up to")):
            if not text.startswith(rendered):
                raise UserError(
                    f"messages[{index}]: the chat template ({self.origin}) is not prefix-stable: {what} this message "
                    f"is not how the whole conversation begins; they part after {_shared(rendered, text)!r}. "
                    "Split the conversation so that it ends with this message, or set train_on_input",
                    param=f"messages[{index}]",
                )
        return len(prompt), len(answered)

    def _trained_tokens(self, ids: list[int], ends: list[int], start: int, stop: int) -> range:
        """Positions of the tokens of text[start:stop] up to its last end-of-sequence token, if it has one.

        A token that reaches over `start` holds the answer's first character and belongs to it.
        """
        first, last = bisect_right(ends, start), bisect_right(ends, stop)
        eos = [position for position in range(first, last) if ids[position] in self.tokenizer.eos_token_ids]
        return range(first, eos[-1] + 1 if eos else last)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, now: datetime) -> str:
        pieces = self.template.generate(
            **self.tokenizer.special_tokens,
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=now.strftime,
        )
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


def load_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a model folder, as `find_template` finds it. The log mentions a default one.

    Raises UserError when the template is not valid Jinja, or when there are several and none is named `default`.
    """
    source, origin = find_template(folder, tokenizer)
    if origin not in OWN_PLACES:
        log.warning("%s has no chat template: messages are written with %s", folder, origin)
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        reason = f"the chat template in {folder} ({origin}) is not valid Jinja: line {error.lineno}: {error.message}"
        raise UserError(reason, param="model") from error
    return ChatTemplate(template=template, tokenizer=tokenizer, origin=origin)


def find_template(folder: Path, tokenizer: Tokenizer | None = None) -> tuple[str, str]:
    """The text of a model folder's template and, for people, where it comes from: chat_template.jinja, else
    tokenizer_config.json (OWN_PLACES), else the default of the model's family (`lm.default_templates`).

    `tokenizer` is the one it will be used with, by default the folder's own.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.name
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}", param="model") from error
    if (source := _configured_template(folder)) is not None:
        return source, "tokenizer_config.json"
    if tokenizer is None and any((folder / name).is_file() for name in FILES):
        tokenizer = load_tokenizer(folder)
    return choose_default(model_config(folder).get("model_type"), tokenizer)


def _configured_template(folder: Path) -> str | None:
    entry = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(entry, list):
        entry = {named.get("name"): named.get("template") for named in entry if isinstance(named, dict)}
        if "default" not in entry:
            known = f"found {sorted(map(str, entry))}"
            raise UserError(f"{folder} has several chat templates and none is named default ({known})", param="model")
        entry = entry["default"]
    return entry if isinstance(entry, str) else None


def check_messages(messages: Any) -> None:
    """Raise UserError, with the index of the message at fault, unless `messages` is a non-empty list of messages."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"messages: must be a list of at least one message (got {messages!r:.80})", param="messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: must be an object with role and content (got {message!r:.80})", param=where)
    for field in ("role", "content"):
        if not isinstance(message.get(field), str):
            got = f"got {message[field]!r:.80}" if field in message else "it is missing"
            raise UserError(f"{where}.{field}: must be a string ({got})", param=f"{where}.{field}")
    if message["role"] not in ROLES:
        reason = f"must be one of {', '.join(ROLES)} (got {message['role']!r:.80})"
        raise UserError(f"{where}.role: {reason}", param=f"{where}.role")
    if unknown := sorted(str(field) for field in message if field not in ("role", "content")):
        raise UserError(f"{where}.{unknown[0]}: unknown field; a message has role and content", param=where)


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


def _shared(left: str, right: str) -> str:
    """The last characters of what both texts begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    length = next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))
    return left[:length][-40:]
