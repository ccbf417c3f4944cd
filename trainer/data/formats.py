"""The forms in which records are written, each brought into chat messages or plain text. Torch-free.

Columns are asked for by their standard names; `ReadOptions.column_map` says what the user's file calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lm.errors import UserError
from lm.messages import check_messages
from trainer.data.errors import DataError, kind, quoted
from trainer.data.options import FORMAT_COLUMNS, ReadOptions

Messages = list[dict[str, str]]

COLUMNS = 'a record needs the columns "input" and "output", or "messages"'
OTHERS = 'or those of another format: "instruction" and "output", "conversations", "text"'
BY_COLUMNS = ("messages", "sharegpt", "alpaca", "instruct", "text")
"""The order in which formats are looked for: Alpaca's set has a `text` beside its columns, for one."""
SIGNS = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction", "text": "text"}
"""The column by which a format is known. `instruct` is known by both of its columns, or by what is left."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}

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


def find_format(record: Mapping[str, Any], options: ReadOptions, where: str, param: str | None) -> str:
    """The format of a record: as the options say, else by its columns. Raises DataError where those say two things."""
    if options.data_format != "auto":
        return options.data_format
    has = {name for name in FORMAT_COLUMNS if name in SIGNS and options.column(SIGNS[name]) in record}
    pair = [column for column in FORMAT_COLUMNS["instruct"] if options.column(column) in record]
    if "messages" in has and (pair or "sharegpt" in has):
        other = '"conversations"' if not pair else '"input" or "output"'
        raise DataError(f'{where}: has "messages" beside {other}; keep one of the two, or set data_format', param=param)
    if len(pair) == len(FORMAT_COLUMNS["instruct"]):
        has.add("instruct")
    return next((name for name in BY_COLUMNS if name in has), "instruct")


def check_has_columns(
    record: Mapping[str, Any], data_format: str, options: ReadOptions, where: str, param: str | None
) -> None:
    """Raises DataError that names the columns which the format misses, and those that are there."""
    required = [column for column in FORMAT_COLUMNS[data_format] if (data_format, column) != ("alpaca", "input")]
    missing = [options.column(column) for column in required if options.column(column) not in record]
    if not missing:
        return
    lacks, found = quoted(missing), quoted(record) or "no column"
    needs = COLUMNS
    if options.data_format != "auto" or data_format != "instruct":
        needs = f"the format {data_format} needs the columns {quoted(map(options.column, required))}"
    elif len(missing) > 1:
        needs = f"{COLUMNS}, {OTHERS}"
    hint = "" if options.column_map else "; column_map can say what yours are called"
    raise DataError(f"{where}: {needs}; {lacks} is missing, found {found}{hint}", param=param)


def used_columns(data_format: str, options: ReadOptions) -> tuple[str, ...]:
    return tuple(map(options.column, FORMAT_COLUMNS[data_format]))


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


class RecordReader:
    """One record's columns, by their standard names. Every error begins with `where`."""

    def __init__(self, record: Mapping[str, Any], options: ReadOptions, where: str, param: str | None) -> None:
        self.record, self.options, self.where, self.param = record, options, where, param
        self.unused_fields: dict[str, None] = {}
        """Fields of turns that are not looked at, a `weight` for one."""

    def text(self, column: str) -> str:
        name = self.options.column(column)
        return text_of(self.record[name], f'{self.where}: "{name}"', self.param)

    def optional_text(self, column: str) -> str:
        """Empty where the column is missing or null."""
        return "" if self.record.get(self.options.column(column)) is None else self.text(column)

    def instruct(self) -> Messages:
        return _turns(self.text("input"), self.text("output"))

    def alpaca(self) -> Messages:
        instruction, context = self.text("instruction"), self.optional_text("input")
        template = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
        parts = {"instruction": instruction, "input": context}
        return _turns(template.format_map(parts), self.text("output"))

    def messages(self) -> Messages:
        return self._checked(self.record[self.options.column("messages")])

    def sharegpt(self) -> Messages:
        name = self.options.column("conversations")
        turns = self.record[name]
        if not isinstance(turns, list) or not turns:
            raise DataError(
                f'{self.where}: "{name}" must be a list of at least one turn, not {kind(turns)}', param=self.param
            )
        return self._checked([self._turn(turn, f"{name}[{index}]") for index, turn in enumerate(turns)])

    def _turn(self, turn: object, what: str) -> dict[str, str]:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            found = quoted(turn) if isinstance(turn, dict) else kind(turn)
            hint = "; for role and content set data_format to messages" if "role" in found else ""
            raise DataError(f'{self.where}: {what} needs "from" and "value", found {found}{hint}', param=self.param)
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise DataError(
                f"{self.where}: {what}.from must be one of {known} (got {turn['from']!r:.80})", param=self.param
            )
        if len(turn) > len(("from", "value")):
            self.unused_fields.update(
                {f"{what.split('[')[0]}[].{key}": None for key in turn.keys() - {"from", "value"}}
            )
        return {"role": role, "content": text_of(turn["value"], f"{self.where}: {what}.value", self.param)}

    def _checked(self, messages: Any) -> Messages:
        try:
            check_messages(messages)
        except UserError as error:
            raise DataError(f"{self.where}: {error}", param=self.param) from error
        if all(message["role"] != "assistant" for message in messages):
            reason = 'no message has the role "assistant", so there is nothing to learn'
            raise DataError(f"{self.where}: {reason}", param=self.param)
        for index, message in enumerate(messages):
            text_of(message["content"], f"{self.where}: messages[{index}].content", self.param)
        return list(messages)


CONVERTERS: dict[str, Callable[[RecordReader], Messages]] = {
    "instruct": RecordReader.instruct,
    "alpaca": RecordReader.alpaca,
    "sharegpt": RecordReader.sharegpt,
    "messages": RecordReader.messages,
}


def with_prompts(messages: Messages, options: ReadOptions) -> Messages:
    """The messages with `new_system_prompt` and `prompt_template` applied."""
    if options.new_system_prompt is not None:
        own = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": options.new_system_prompt}, *own]
    if options.prompt_template is None:
        return messages
    affixes: dict[str, tuple[str, str]] = {role: around for role, around in options.prompt_template.items()}
    return [_affixed(message, *affixes.get(message["role"], ("", ""))) for message in messages]


def _affixed(message: dict[str, str], before: str, after: str) -> dict[str, str]:
    return {**message, "content": before + message["content"] + after}


def _turns(prompt: str, answer: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
