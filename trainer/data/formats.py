"""The forms in which records are written, each brought into chat messages or plain text. Torch-free.

Columns are asked for by their standard names; `ReadOptions.column_map` says what the user's file calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.data.conversations import Messages, checked_messages, read_tools, text_of, turns_to_messages
from trainer.data.errors import DataError, kind, quoted
from trainer.data.options import FORMAT_COLUMNS, OPTIONAL_COLUMNS, ReadOptions

COLUMNS = 'a record needs the columns "input" and "output", or "messages"'
OTHERS = (
    'or those of another format: "instruction" and "output", "conversations", "text", "prompt" and "completion", '
    '"chosen" and "rejected"'
)
SIGNS = {
    "openai_preference": ("preferred_output",),
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction",),
    "instruct": ("input", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns by which a format is known, in the order in which formats are looked for: Alpaca's set has a `text` beside
its columns, and sets of preferences often have the `messages` of the chosen answer, too."""
PREFERENCES = ("preference", "openai_preference")

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a record says, whatever it was written in."""

    messages: Messages = field(default_factory=list)
    """The whole conversation; of a preference the one that was chosen. Empty where there is `text`."""
    rejected: Messages = field(default_factory=list)
    """Of a preference the conversation that was not chosen."""
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    """Text without turns."""
    prompt: str = ""
    """What of `text`, at its beginning, is no answer."""
    unused_fields: tuple[str, ...] = ()


def find_format(record: Mapping[str, Any], options: ReadOptions, where: str, param: str | None) -> str:
    """The format of a record: as the options say, else by its columns. Raises DataError where those say two things."""
    has = [name for name, signs in SIGNS.items() if all(options.column(sign) in record for sign in signs)]
    if options.data_format == "preference":
        return "openai_preference" if "openai_preference" in has else "preference"
    if options.data_format != "auto":
        return options.data_format
    if has[:1] == ["messages"]:
        pair = [column for column in FORMAT_COLUMNS["instruct"] if options.column(column) in record]
        if pair or "sharegpt" in has:
            other = '"input" or "output"' if pair else '"conversations"'
            raise DataError(
                f'{where}: has "messages" beside {other}; keep one of the two, or set data_format', param=param
            )
    return next(iter(has), "instruct")


def check_has_columns(
    record: Mapping[str, Any], data_format: str, options: ReadOptions, where: str, param: str | None
) -> None:
    """Raises DataError that names the columns which the format misses, and those that are there."""
    optional = OPTIONAL_COLUMNS.get(data_format, ())
    required = [column for column in FORMAT_COLUMNS[data_format] if column not in optional]
    missing = [options.column(column) for column in required if options.column(column) not in record]
    if not missing:
        return
    lacks, found = quoted(missing), quoted(record) or "no column"
    needs = COLUMNS
    if options.data_format != "auto" or data_format != "instruct":
        needs = f"the format {public_name(data_format)} needs the columns {quoted(map(options.column, required))}"
    elif len(missing) > 1:
        needs = f"{COLUMNS}, {OTHERS}"
    hint = "" if options.column_map else "; column_map can say what yours are called"
    raise DataError(f"{where}: {needs}; {lacks} is missing, found {found}{hint}", param=param)


def public_name(data_format: str) -> str:
    """As a user writes it: both layouts of preferences have one name."""
    return "preference" if data_format in PREFERENCES else data_format


def used_columns(data_format: str, options: ReadOptions) -> tuple[str, ...]:
    return tuple(map(options.column, FORMAT_COLUMNS[data_format]))


class RecordReader:
    """One record's columns, by their standard names. Every error begins with `where`."""

    def __init__(self, record: Mapping[str, Any], options: ReadOptions, where: str, param: str | None) -> None:
        self.record, self.options, self.where, self.param = record, options, where, param

    def value(self, column: str) -> Any:
        """None where the column is missing."""
        return self.record.get(self.options.column(column))

    def named(self, column: str) -> str:
        return f'{self.where}: "{self.options.column(column)}"'

    def text(self, column: str) -> str:
        return text_of(self.value(column), self.named(column), self.param)

    def optional_text(self, column: str) -> str:
        """Empty where the column is missing or null."""
        return "" if self.value(column) is None else self.text(column)

    def tools(self) -> list[dict[str, Any]] | None:
        return read_tools(self.value("tools"), self.named("tools"), self.param)

    def instruct(self) -> Content:
        return Content(messages=_turns(self.text("input"), self.text("output")))

    def alpaca(self) -> Content:
        instruction, context = self.text("instruction"), self.optional_text("input")
        template = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
        parts = {"instruction": instruction, "input": context}
        return Content(messages=_turns(template.format_map(parts), self.text("output")))

    def messages(self) -> Content:
        return Content(messages=self._checked(self.value("messages")), tools=self.tools())

    def sharegpt(self) -> Content:
        turns, unused = self._turns()
        return Content(messages=self._checked(turns), tools=self.tools(), unused_fields=tuple(unused))

    def _turns(self) -> tuple[Messages, list[str]]:
        name = self.options.column("conversations")
        turns, unused = turns_to_messages(self.value("conversations"), f'"{name}"', self.where, self.param)
        if system := self.optional_text("system"):
            turns = [{"role": "system", "content": system}, *(turn for turn in turns if turn["role"] != "system")]
        return turns, unused

    def completion(self) -> Content:
        """Texts; or lists of messages, of which those of the completion are trained."""
        if isinstance(self.value("completion"), list):
            return Content(messages=self._completed(self.value("prompt"), self.value("completion")))
        self._refuse_chat_options()
        prompt, completion = self.text("prompt"), self.text("completion")
        if not completion:
            raise DataError(f"{self.named('completion')} is empty, so there is nothing to learn", param=self.param)
        return Content(text=prompt + completion, prompt=prompt)

    def _completed(self, prompt: Any, completion: list[Any]) -> Messages:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = self._answered(before, "completion")
        last = len(messages) - len(completion)
        asked = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in messages[:last]]
        return [*asked, *self._checked(messages[last:])]

    def plain_text(self) -> Content:
        text = self.text("text")
        self._refuse_chat_options()
        if not text:
            raise DataError(f"{self.where}: the text is empty, so there is nothing to learn", param=self.param)
        return Content(text=text)

    def preference(self) -> Content:
        """Answers are texts, which need a prompt, or messages: answers alone, which need it too, or whole chats."""
        prompt, unused = self.value("prompt"), list[str]()
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if before is None and self.value("conversations") is not None:
            before, unused = self._turns()
        chosen, rejected = (self._conversation(name, before) for name in ("chosen", "rejected"))
        return Content(messages=chosen, rejected=rejected, tools=self.tools(), unused_fields=tuple(unused))

    def openai_preference(self) -> Content:
        given = self.value("input")
        if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
            raise DataError(f'{self.named("input")} must be an object with "messages"', param=self.param)
        tools = read_tools(given.get("tools"), f"{self.named('input')}.tools", self.param)
        chosen, rejected = (
            self._answered(given["messages"], name) for name in ("preferred_output", "non_preferred_output")
        )
        return Content(messages=chosen, rejected=rejected, tools=tools)

    def _conversation(self, column: str, before: Any) -> Messages:
        answer = self._answer(column)
        is_chat = isinstance(answer, list) and bool(answer)
        first = answer[0].get("role") if is_chat and isinstance(answer[0], dict) else "assistant"
        if is_chat and first != "assistant":
            return self._checked(answer, column)
        if before is None:
            what = "holds only the answer" if is_chat else "is a text"
            raise DataError(f'{self.named(column)} {what}, so the record needs "prompt", too', param=self.param)
        return self._answered(before, column)

    def _answer(self, column: str) -> Any:
        """A single message or turn stands for a list of one."""
        answer = self.value(column)
        if isinstance(answer, dict) and "from" in answer:
            return turns_to_messages([answer], self.options.column(column), self.where, self.param)[0]
        return [answer] if isinstance(answer, dict) else answer

    def _answered(self, before: Any, column: str) -> Messages:
        answer = self._answer(column)
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        for messages, name in ((before, "prompt"), (answer, column)):
            if not isinstance(messages, list):
                needs = f"must be a text or a list of messages, not {kind(messages)}"
                raise DataError(f"{self.named(name)} {needs}", param=self.param)
        return self._checked([*before, *answer], column)

    def _checked(self, messages: Any, column: str | None = None) -> Messages:
        where = self.where if column is None else f"{self.where}, {self.options.column(column)}"
        return checked_messages(messages, where, self.param)

    def _refuse_chat_options(self) -> None:
        for option in ("new_system_prompt", "prompt_template"):
            if getattr(self.options, option) is not None:
                reason = f"{option} is for chats, and this record is plain text"
                raise DataError(f"{self.where}: {reason}", param=option)


CONVERTERS: dict[str, Callable[[RecordReader], Content]] = {
    "instruct": RecordReader.instruct,
    "alpaca": RecordReader.alpaca,
    "sharegpt": RecordReader.sharegpt,
    "messages": RecordReader.messages,
    "completion": RecordReader.completion,
    "preference": RecordReader.preference,
    "openai_preference": RecordReader.openai_preference,
    "text": RecordReader.plain_text,
}


def with_prompts(messages: Messages, options: ReadOptions) -> Messages:
    """The messages with `new_system_prompt` and `prompt_template` applied."""
    if not messages:
        return messages
    if options.new_system_prompt is not None:
        own = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": options.new_system_prompt}, *own]
    if options.prompt_template is None:
        return messages
    affixes: dict[str, tuple[str, str]] = {role: around for role, around in options.prompt_template.items()}
    return [_affixed(message, *affixes.get(message["role"], ("", ""))) for message in messages]


def _affixed(message: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    content = message.get("content")
    return message if content is None else {**message, "content": before + content + after}


def _turns(prompt: str, answer: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
