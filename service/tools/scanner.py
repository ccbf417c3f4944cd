"""The body of calls, character by character, as each format writes them.

A scanner is a generator. Each `send` gives it a character and returns what that made certain; None while what has come
since the last event may still be no part of a call. It raises NoCall at a character that a call does not have there, and
returns behind the last one of calls that have an end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypeVar

SPACE = " \t\r\n"
ARGUMENT_KEYS = ("arguments", "parameters")
KEYS = ("name", "type", "id", *ARGUMENT_KEYS)
ID_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
MAX_ID_CHARS = 64


class NoCall(Exception):
    """What came since the last event is no part of a call."""


class Event(NamedTuple):
    """All text up to here is part of a call."""

    name: str | None = None
    """Of the function, where a call begins."""
    arguments: str = ""
    """The next piece of them, as the model wrote it."""


ReturnT = TypeVar("ReturnT")
Names = Collection[str]
Steps = Generator[Event | None, str, ReturnT]
Scanner = Steps[None]


def scan_hermes(names: Names) -> Scanner:
    event = yield from _object(names, (yield from _next()))
    yield from _word("</tool_call>", (yield from _next(event)))


def scan_llama3(names: Names) -> Scanner:
    while True:
        event = yield from _object(names, (yield from _next()))
        _expect((yield from _next(event)), ";")


def scan_mistral(names: Names) -> Scanner:
    """A list of objects, or the later form without one."""
    char = yield from _next()
    if char != "[":
        yield from _named_arguments(names, char)
    char = ","
    while char == ",":
        event = yield from _object(names, (yield from _next()))
        char = yield from _next(event)
    _expect(char, "]")


SCANNERS: dict[str, Callable[[Names], Scanner]] = {
    "hermes": scan_hermes,
    "llama3": scan_llama3,
    "mistral": scan_mistral,
    "mistral_args": scan_mistral,
}
"""By the name of the ToolFormat."""


def _named_arguments(names: Names, char: str) -> Steps[NoReturn]:
    """`f[ARGS]{...}`, or with the id that some models write, `f[CALL_ID]id[ARGS]{...}`."""
    name = yield from _one_of(names, char, end="[")
    char = yield None
    if char == "C":
        yield from _word("CALL_ID]", char)
        _expect((yield from _id((yield None))), "[")
        char = yield None
    yield from _word("ARGS]", char)
    yield (yield from _streamed(name, (yield from _next())))
    raise NoCall


def _object(names: Names, char: str) -> Steps[Event]:
    """`{"name": ..., "arguments": {...}}` in any order, with `type` or `id`. Returns the event of its last character.

    Arguments are streamed where the name stands before them.
    """
    _expect(char, "{")
    keys, name, arguments = set(KEYS), "", ""
    while char != "}":
        key = yield from _string(keys, (yield from _next()))
        keys -= {*ARGUMENT_KEYS} if key in ARGUMENT_KEYS else {key}
        _expect((yield from _next()), ":")
        char, told = (yield from _next()), None
        if key == "name":
            name = yield from _string(names, char)
        elif key not in ARGUMENT_KEYS:
            yield from _aside(key, char)
        elif name:
            told = yield from _streamed(name, char)
            name = ""
        else:
            arguments = yield from _buffered(char)
        char = yield from _next(told)
        if char not in ",}":
            raise NoCall
    if "name" in keys:
        raise NoCall
    return Event(name, arguments or "{}") if name else Event()


def _aside(key: str, char: str) -> Steps[None]:
    """The value of a key that says nothing new."""
    if key == "type":
        yield from _string(("function",), char)
    else:
        _expect(char, '"')
        _expect((yield from _id((yield None))), '"')


def _streamed(name: str, char: str) -> Steps[Event]:
    """An object, told as it comes. Returns the event of its last character."""
    inside, event = _Nesting(), Event(name, char)
    while inside.goes_on(char):
        char = yield event
        event = Event(None, char)
    return event


def _buffered(char: str) -> Steps[str]:
    """An object."""
    inside, text = _Nesting(), char
    while inside.goes_on(char):
        char = yield None
        text += char
    return text


@dataclass(slots=True)
class _Nesting:
    """Finds the end of a JSON object, whatever stands in it."""

    depth: int = 0
    in_string: bool = False
    escaped: bool = False

    def goes_on(self, char: str) -> bool:
        """Whether the object, which `char` is a part of, has more characters."""
        if self.depth == 0:
            _expect(char, "{")
        if self.escaped:
            self.escaped = False
        elif char == '"':
            self.in_string = not self.in_string
        elif self.in_string:
            self.escaped = char == "\\"
        else:
            self.depth += (char in "{[") - (char in "}]")
        return self.depth > 0


def _next(event: Event | None = None) -> Steps[str]:
    """The next character that is no space. `event` is what the last character made certain."""
    char = yield event
    while char in SPACE:
        char = yield None
    return char


def _string(options: Names, char: str) -> Steps[str]:
    """One of `options` in quotes."""
    _expect(char, '"')
    return (yield from _one_of(options, (yield None), end='"'))


def _one_of(options: Names, char: str, *, end: str) -> Steps[str]:
    text = ""
    while char != end:
        text += char
        if not any(option.startswith(text) for option in options):
            raise NoCall
        char = yield None
    if text not in options:
        raise NoCall
    return text


def _word(word: str, char: str) -> Steps[None]:
    _expect(char, word[0])
    for expected in word[1:]:
        _expect((yield None), expected)


def _id(char: str) -> Steps[str]:
    """A short id. Returns the character behind it."""
    for _ in range(MAX_ID_CHARS):
        if char not in ID_CHARS:
            break
        char = yield None
    return char


def _expect(char: str, expected: str) -> None:
    if char != expected:
        raise NoCall
