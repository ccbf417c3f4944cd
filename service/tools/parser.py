"""Calls of tools in the text of an answer, found while the text comes.

Pieces of text go in, in any split; content, beginnings of calls and pieces of their arguments come out, and put together
they are the same for every split. Held back is only what may be the beginning of a call: white space and an opening, and
behind it the call up to its arguments, which come out as the model writes them. What turns out to be no call is content.
White space around calls belongs to nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from uuid import uuid4

from service.detokenizer import overlap
from service.tools.scanner import SCANNERS, SPACE, Event, NoCall, Scanner


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    index: int
    text: str


Delta = ContentDelta | CallStart | ArgumentsDelta

OPENINGS = {
    "hermes": ("<tool_call>",),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]",),
}
"""By the name of the format. Llama 3's calls also begin without one, at the beginning of the answer."""


@dataclass(slots=True)
class ToolParser:
    """One answer."""

    format: str | None
    """The name of a ToolFormat; None finds no calls."""
    names: Collection[str] = ()
    """Functions that may be called: a call of another one is content."""
    max_calls: int | None = None
    """Calls beyond are left out."""
    must_call: bool = False
    """A grammar holds the answer to calls: what is held at its end is the beginning of one, and no content."""
    num_calls: int = 0
    """Calls that have begun."""
    held: str = ""
    """What has come and is not decided."""
    opening: str = ""
    """With which `held` begins, in a call. It is content if nothing follows that makes the call certain."""
    is_certain: bool = False
    """That there is a call: one has begun behind the opening."""
    scanner: Scanner | None = None
    """Takes the characters behind an opening."""
    at_edge: bool = True
    """Only white space has come since the answer began or a call ended."""
    deltas: list[Delta] = field(default_factory=list)

    def add(self, text: str) -> list[Delta]:
        """What is certain now and was not before."""
        while text:
            text = self._read_text(text) if self.scanner is None else self._read_call(text)
        return self._take()

    def flush(self) -> list[Delta]:
        """The rest, at the end of the answer. A call that has begun stays one, as far as it came."""
        in_call = self.must_call or (self.scanner is not None and self.is_certain)
        if not in_call and (self.num_calls == 0 or self.held.strip(SPACE)):
            self._content(self.held)
        self.held, self.scanner = "", None
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, self.deltas = self.deltas, []
        return deltas

    def _read_text(self, text: str) -> str:
        """Pass on what is content. Returns what is left behind the opening of a call."""
        text, self.held = self.held + text, ""
        begin, end = self._find_opening(text)
        if begin < 0:
            size = len(text) - max((overlap(text, opening) for opening in self._openings), default=0)
            if self._is_edge(text[:size]):
                size = 0
            self._content(text[:size])
            self.held = text[size:]
            return ""
        if not self._is_edge(text[:begin]):
            self._content(text[:begin])
            text, end = text[begin:], end - begin
        self.opening = self.held = text[:end]
        self.is_certain = False
        self.scanner = SCANNERS[self.format or ""](self.names)
        next(self.scanner)
        return text[end:]

    @property
    def _openings(self) -> tuple[str, ...]:
        return OPENINGS.get(self.format or "", ())

    def _is_edge(self, text: str) -> bool:
        return bool(self._openings) and self.at_edge and not text.strip(SPACE)

    def _find_opening(self, text: str) -> tuple[int, int]:
        """Where the first one begins and ends; -1 where there is none."""
        found = [(start, start + len(opening)) for opening in self._openings if (start := text.find(opening)) >= 0]
        bare = text.lstrip(SPACE)
        if self.format == "llama3" and self.at_edge and bare.startswith("{"):
            found.append((len(text) - len(bare),) * 2)
        return min(found, default=(-1, -1))

    def _read_call(self, text: str) -> str:
        """Take the characters of a call. Returns what is left behind it, and before that what turned out to be none."""
        assert self.scanner is not None
        for position, char in enumerate(text):
            self.held += char
            try:
                event = self.scanner.send(char)
            except StopIteration:
                self.held, self.scanner, self.at_edge = "", None, True
                return text[position + 1 :]
            except NoCall:
                return self._give_up() + text[position + 1 :]
            if event is not None:
                self.held, self.is_certain = "", True
                self._tell(event)
        return ""

    def _tell(self, event: Event) -> None:
        if event.name is not None:
            self.num_calls += 1
        index = self.num_calls - 1
        if self.max_calls is not None and index >= self.max_calls:
            return
        if event.name is not None:
            self.deltas.append(CallStart(index, f"call_{uuid4().hex[:24]}", event.name))
        last = self.deltas[-1] if self.deltas else None
        if isinstance(last, ArgumentsDelta):
            self.deltas[-1] = ArgumentsDelta(index, last.text + event.arguments)
        elif event.arguments:
            self.deltas.append(ArgumentsDelta(index, event.arguments))

    def _give_up(self) -> str:
        """What was held, to be read as text again, but for an opening that opened nothing."""
        text, self.held, self.scanner, self.at_edge = self.held, "", None, self.is_certain
        if self.is_certain:
            return text
        self._content(self.opening)
        return text[len(self.opening) :]

    def _content(self, text: str) -> None:
        if not text:
            return
        self.at_edge = False
        last = self.deltas[-1] if self.deltas else None
        if isinstance(last, ContentDelta):
            self.deltas[-1] = ContentDelta(last.text + text)
        else:
            self.deltas.append(ContentDelta(text))
