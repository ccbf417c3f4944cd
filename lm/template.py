"""Chat messages to text and token ids through the model's own Jinja template. Torch-free.

Rendering equals transformers' `apply_chat_template`. Serving and training use the same path: the tokens that are
trained are the difference between a rendered conversation and its own prompts.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jinja2

from lm.default_templates import choose_default
from lm.errors import UserError
from lm.jinja_template import JinjaTemplate, compile_template
from lm.messages import Message, check_messages, template_messages
from lm.tokenizer import FILES, Tokenizer, load_tokenizer, model_config
from lm.tokenizer_settings import SPECIAL_TOKENS, read_json

log = logging.getLogger(__name__)

OWN_PLACES = ("chat_template.jinja", "tokenizer_config.json")
"""Where a model's own template stands."""
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"
"""Beside chat_template.jinja: the one for conversations with tools, where a model has two."""
OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks in the rendered text where the last message ends; transformers' own."""
RESERVED = (
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("tokenize", "strftime_now", "raise_exception", *SPECIAL_TOKENS),
)
"""Variables of a template that a request does not set by name."""
MAX_VARIABLES = 64
MAX_VARIABLE_DEPTH = 8
MAX_VARIABLE_SIZE = 1 << 16
"""Characters of all names and texts, and one for each other value."""


class RenderOptions(TypedDict, total=False):
    """How a conversation becomes a prompt. The first one or the second one must be there."""

    add_generation_prompt: bool
    """End where the answer of the assistant begins."""
    continue_final_message: bool
    """End where the last message ends, without what would close it, so that the answer goes on with it."""
    tools: Sequence[Mapping[str, Any]] | None
    """Functions that the answer may call, in OpenAI's form."""
    variables: Mapping[str, Any]
    """More variables for the template, such as `enable_thinking`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A compiled template with the tokenizer it writes for."""

    default: JinjaTemplate
    tool_use: JinjaTemplate
    """The one for conversations with tools; that of a model with one template is the same."""
    tokenizer: Tokenizer

    @property
    def origin(self) -> str:
        """Which file the template came from, or which default it is, for people."""
        return self.default.origin

    def render(self, messages: Sequence[Message], **options: Unpack[RenderOptions]) -> str:
        """The conversation as text.

        Raises UserError (param `messages...`) for malformed messages and for those that the template refuses, and
        (param `chat_template_kwargs...`, `continue_final_message`) for options that cannot be.
        """
        check_messages(messages, with_tools=True)
        if not options.get("continue_final_message"):
            return self._render(messages, now=datetime.now(), **options)
        if options.get("add_generation_prompt"):
            reason = "add_generation_prompt begins a new message: set one of the two"
            raise UserError(f"continue_final_message: {reason}", param="continue_final_message")
        return self._render_open(messages, **options)

    def encode(self, messages: Sequence[Message], **options: Unpack[RenderOptions]) -> list[int]:
        """Token ids of `render`. The template writes the BOS itself where the model wants one."""
        return self.tokenizer.encode(self.render(messages, **options), add_special_tokens=False)

    def encode_with_mask(
        self,
        messages: Sequence[Message],
        *,
        train_on_input: bool = False,
        answers: Container[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and for each whether its prediction is trained.

        Trained are the assistants' messages, each with the token that ends it; with `train_on_input` everything.
        `answers` are the indexes of the assistants' messages that are trained; the others are not, in either case.
        What precedes a trained span is the prompt as `encode` makes it for serving. Raises UserError where the
        template is not prefix-stable, that is where it writes a turn differently once another one follows.
        """
        check_messages(messages, with_tools=True)
        self._check_knows_tools(messages, tools)
        now = datetime.now()  # one clock for all renderings: a date in the template must not change between them
        text = self._render(messages, add_generation_prompt=False, now=now, tools=tools)
        ids, ends = self.tokenizer.encode_with_ends(text)
        mask = [train_on_input] * len(ids)
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not assistants and not train_on_input:
            raise UserError("messages: no assistant message, so there is nothing to train on", param="messages")
        for index in assistants:
            is_trained = answers is None or index in answers
            if is_trained != train_on_input:
                start, stop = self._answer_span(messages, index, text, now, tools)
                for position in self._trained_tokens(ids, ends, start, stop):
                    mask[position] = is_trained
        return ids, mask

    def _check_knows_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
        """What a template does not write cannot be trained."""
        template = self.default if tools is None else self.tool_use
        unknown = tools is not None and "tools" not in template.variables
        has_calls = any(message.get("tool_calls") for message in messages)
        if unknown or (has_calls and "tool_calls" not in template.source):
            what = "tools" if unknown else "tool_calls"
            raise UserError(
                f"messages: the chat template ({self.origin}) does not write {what}, so they cannot be learned; take a "
                "model whose template knows tools, or write them into the messages",
                param="messages",
            )

    def _answer_span(
        self,
        messages: Sequence[Message],
        index: int,
        text: str,
        now: datetime,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[int, int]:
        """Where in `text`, the rendered `messages`, the answer `messages[index]` starts and stops (characters)."""
        prompt = self._render(messages[:index], add_generation_prompt=True, now=now, tools=tools)
        is_last = index == len(messages) - 1
        answered = text if is_last else self._render(messages[: index + 1], now=now, tools=tools)
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

    def _render_open(self, messages: Sequence[Message], **options: Unpack[RenderOptions]) -> str:
        """Cut behind the last message's content, by transformers' rule: white space there stays if the template
        keeps it.
        """
        *before, last = messages
        content = last.get("content")
        if content is None:
            raise _not_continued("the last message has no content to go on with")
        marked = {**last, "content": content + OPEN_END}
        text = self._render([*before, marked], now=datetime.now(), **options)
        end = text.rfind(OPEN_END.strip())
        if end < 0 or content.strip() not in text:
            raise _not_continued(f"the chat template ({self.origin}) does not show the whole last message")
        return text[:end] if text.startswith(OPEN_END, end) else text[:end].rstrip()

    def _render(
        self,
        messages: Sequence[Message],
        *,
        now: datetime,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,  # seen to by the caller
    ) -> str:
        if variables:
            _check_variables(variables)
        template = self.default if tools is None else self.tool_use
        return template.render(
            {
                **self.tokenizer.special_tokens,
                **(variables or {}),
                "messages": template_messages(messages),
                "tools": None if tools is None else list(tools),
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "strftime_now": now.strftime,
            }
        )


def _not_continued(reason: str) -> UserError:
    return UserError(f"continue_final_message: {reason}; remove it", param="continue_final_message")


def load_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a model folder, as `find_template` finds it. The log mentions a default one.

    A second one for conversations with tools is named `tool_use`, in tokenizer_config.json or as TOOL_TEMPLATE_FILE.
    Raises UserError when a template is not valid Jinja, or when there are several and none is named `default`.
    """
    source, origin = find_template(folder, tokenizer)
    if origin not in OWN_PLACES:
        log.warning("%s has no chat template: messages are written with %s", folder, origin)
    default = _compiled(source, origin, folder)
    tool_use = _find_tool_template(folder, origin)
    return ChatTemplate(
        default=default, tool_use=_compiled(*tool_use, folder) if tool_use else default, tokenizer=tokenizer
    )


def find_template(folder: Path, tokenizer: Tokenizer | None = None) -> tuple[str, str]:
    """The text of a model folder's template and, for people, where it comes from: chat_template.jinja, else
    tokenizer_config.json (OWN_PLACES), else the default of the model's family (`lm.default_templates`).

    `tokenizer` is the one it will be used with, by default the folder's own.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path), path.name
    configured = _configured_templates(folder)
    if "default" in configured:
        return configured["default"], "tokenizer_config.json"
    if configured:
        known = f"found {sorted(map(str, configured))}"
        raise UserError(f"{folder} has several chat templates and none is named default ({known})", param="model")
    if tokenizer is None and any((folder / name).is_file() for name in FILES):
        tokenizer = load_tokenizer(folder)
    return choose_default(model_config(folder).get("model_type"), tokenizer)


def _find_tool_template(folder: Path, origin: str) -> tuple[str, str] | None:
    """As transformers finds it: beside the template that comes from `origin`."""
    if origin == "chat_template.jinja" and (path := folder / TOOL_TEMPLATE_FILE).is_file():
        return _read(path), TOOL_TEMPLATE_FILE
    configured = _configured_templates(folder) if origin == "tokenizer_config.json" else {}
    return (configured["tool_use"], f"{origin}, tool_use") if "tool_use" in configured else None


def _configured_templates(folder: Path) -> dict[Any, str]:
    """Those of tokenizer_config.json by name; a single one is the `default`."""
    entry = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(entry, list):
        named = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
        return {name: source for name, source in named.items() if isinstance(source, str)}
    return {"default": entry} if isinstance(entry, str) else {}


def _compiled(source: str, origin: str, folder: Path) -> JinjaTemplate:
    try:
        return compile_template(source, origin)
    except jinja2.TemplateSyntaxError as error:
        reason = f"the chat template in {folder} ({origin}) is not valid Jinja: line {error.lineno}: {error.message}"
        raise UserError(reason, param="model") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}", param="model") from error


def _check_variables(variables: Mapping[str, Any]) -> None:
    """Raise UserError unless they are a few plain values under names that are free."""
    size = sum(_size_of(value, f"chat_template_kwargs.{name}") + len(name) for name, value in variables.items())
    if len(variables) > MAX_VARIABLES or size > MAX_VARIABLE_SIZE:
        limit = f"at most {MAX_VARIABLES} variables of {MAX_VARIABLE_SIZE} characters in all"
        raise UserError(f"chat_template_kwargs: {limit} (got {len(variables)} of {size})", param="chat_template_kwargs")
    for name in variables:
        reason = "the service sets this variable itself; remove it" if name in RESERVED else None
        if not (name.isascii() and name.isidentifier()):
            reason = "is no name of a variable: take letters, digits and _"
        if reason is not None:
            raise UserError(f"chat_template_kwargs.{name:.80}: {reason}", param="chat_template_kwargs")


def _size_of(variable: Any, where: str) -> int:
    """Characters, and one for each other value. What is far too large is not counted to its end."""
    size = 0
    rest: list[tuple[Any, int]] = [(variable, 0)]
    while rest and size <= MAX_VARIABLE_SIZE:
        value, depth = rest.pop()
        if depth > MAX_VARIABLE_DEPTH:
            raise UserError(f"{where:.80}: nested deeper than {MAX_VARIABLE_DEPTH}", param="chat_template_kwargs")
        size += len(value) if isinstance(value, str | list | Mapping) else 1
        if size <= MAX_VARIABLE_SIZE and isinstance(value, list | Mapping):
            items = [*value, *value.values()] if isinstance(value, Mapping) else value
            rest += [(item, depth + 1) for item in items]
    return size


def _shared(left: str, right: str) -> str:
    """The last characters of what both texts begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    length = next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))
    return left[:length][-40:]
