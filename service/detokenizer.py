"""Token ids to text as they come: never half a character, and nothing of a stop string. Torch-free.

Both parts hold text back only while they must, and their pieces put together are what the whole would have been.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

INCOMPLETE = "�"
MAX_PENDING = 16
LONGEST_CHARACTER = 4  # bytes in UTF-8, so at most as many tokens

UTF8 = codecs.getincrementaldecoder("utf-8")

Decode = Callable[[Sequence[int]], str]


class Decoder(Protocol):
    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before."""

    def flush(self) -> str:
        """The rest, at the end of the answer; an unfinished character comes out as U+FFFD."""


@dataclass(slots=True)
class ByteDecoder:
    """For tokenizers whose tokens are bytes, whatever stands around them. Waits only within a character."""

    bytes_of: Mapping[int, bytes]
    utf8: codecs.IncrementalDecoder = field(default_factory=lambda: UTF8("replace"))

    def add(self, token_id: int) -> str:
        return self.utf8.decode(self.bytes_of[token_id])

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


@dataclass(slots=True)
class IncrementalDecoder:
    """Decodes a window of the last tokens: those since the last whole character, and one piece before as context.

    The context is there because some tokenizers write a token differently at the start of a text. A window that ends
    in U+FFFD may end within a character, so its text waits for the next token.
    """

    decode: Decode
    ids: list[int] = field(default_factory=list)
    context: int = 0
    """How many of `ids` are context: their text has been handed out."""
    before: str = ""
    """The text of the context alone."""

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self.ids.append(token_id)
        text = self.decode(self.ids)
        num_before = len(self.before)
        if len(text) > num_before and not text.endswith(INCOMPLETE):
            self._restart(self.context)
            return text[num_before:]
        if len(self.ids) - self.context > MAX_PENDING:
            return self._cut(text)
        return ""

    def flush(self) -> str:
        """The rest, at the end of the answer; an unfinished character comes out as U+FFFD."""
        text = self.decode(self.ids)[len(self.before) :]
        self._restart(len(self.ids))
        return text

    def _restart(self, drop: int) -> None:
        del self.ids[:drop]
        self.context = len(self.ids)
        self.before = self.decode(self.ids) if self.ids else ""

    def _cut(self, text: str) -> str:
        """Keep the window short in a long run of garbage or of silent tokens: cut it where no character is split."""
        num_before = len(self.before)
        for cut in range(len(self.ids) - 1, len(self.ids) - LONGEST_CHARACTER - 1, -1):
            done = self.decode(self.ids[:cut])
            if done + self.decode(self.ids[cut:]) == text:
                del self.ids[:cut]
                self.context, self.before = 0, ""
                return done[num_before:]
        return ""


@dataclass(slots=True)
class StopFinder:
    """Passes text on up to the first stop string to be completed in it.

    Held back is the longest end of the text that is a proper beginning of a stop string.
    """

    stop: tuple[str, ...]
    include: bool = False
    """Pass the stop string on, too."""
    held: str = ""
    found: str | None = None
    """The stop string that ended the text. Nothing behind it is passed on."""

    def add(self, text: str, *, may_end: bool = True) -> str:
        """The text that is certain now and was not before. Unless it `may_end` here, what is completed in it is none."""
        if not self.stop:
            return text
        if self.found is not None:
            return ""
        num_held = len(self.held)
        text = self.held + text
        ends = []
        for stop in self.stop if may_end else ():
            start = text.find(stop, max(0, num_held - len(stop) + 1))  # what is held was no end before
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if ends:
            end, start, self.found = min(ends)
            self.held = ""
            return text[: end if self.include else start]
        keep = max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The rest, at the end of the answer."""
        text, self.held = self.held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` with which `text` ends."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


@dataclass(slots=True)
class Detokenizer:
    """One answer: tokens in, text out, until the end or a stop string."""

    decoder: Decoder
    finder: StopFinder

    @property
    def stopped_by(self) -> str | None:
        return self.finder.found

    def add(self, token_id: int, *, may_end: bool = True) -> str:
        text = self.decoder.add(token_id)
        return self.finder.add(text, may_end=may_end) if self.finder.stop else text

    def flush(self) -> str:
        """The tail. A stop string may be completed in it, too."""
        return self.finder.add(self.decoder.flush()) + self.finder.flush()
