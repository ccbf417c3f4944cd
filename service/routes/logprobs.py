"""Log probabilities as OpenAI's two endpoints and vLLM write them."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.token_bytes import TokenBytes
from service.engine.messages import Logprobs

LEAST = -9999.0
"""OpenAI's value for what is very unlikely. JSON has no infinity."""

_new_decoder = getincrementaldecoder("utf-8")


@dataclass(slots=True)
class TextOffsets:
    """Where in a text each of its tokens begins, token by token."""

    token_bytes: TokenBytes
    shows_special: bool
    position: int = 0
    """Where the next token begins. One that begins within a character has that character's place."""
    _decoder: Any = field(default_factory=lambda: _new_decoder("replace"))
    _in_character: bool = False

    def add(self, token_id: int) -> int:
        start = self.position
        if not self.shows_special and token_id in self.token_bytes.special:
            return start
        text = self.token_bytes.text(token_id)
        if self._in_character or "\ufffd" in text:
            text = self._decoder.decode(self.token_bytes(token_id))
            self._in_character = bool(self._decoder.getstate()[0])
        self.position += len(text)
        return start


def prompt_offsets(token_bytes: TokenBytes, ids: Sequence[int], text: str) -> list[int]:
    """Where in `text` the tokens of a prompt begin. What was put before the text, such as a BOS, begins with it."""
    offsets = TextOffsets(token_bytes, shows_special=True)
    found = [offsets.add(token_id) for token_id in ids]
    shift = len(text) - offsets.position
    return [max(0, offset + shift) for offset in found]


def text_logprobs(
    token_bytes: TokenBytes, ids: Sequence[int], logprobs: Iterable[Logprobs | None], offsets: list[int], num_top: int
) -> dict[str, Any]:
    """The object of /v1/completions. The first token of a prompt has none.

    Two tokens with the same text, such as parts of characters, share an entry, which has the larger value.
    """
    text_of = token_bytes.text
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token_id, item in zip(ids, logprobs, strict=True):
        if item is None:
            values.append(None)
            tops.append(None)
            continue
        value = max(item.logprob, LEAST)
        top: dict[str, float] = {}
        for other, logprob in (*zip(item.top_ids[:num_top], item.top_logprobs, strict=False), (token_id, value)):
            text = text_of(other)
            top[text] = max(logprob, top.get(text, LEAST))
        values.append(value)
        tops.append(top)
    return {
        "tokens": [text_of(token_id) for token_id in ids],
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(
    token_bytes: TokenBytes, ids: Sequence[int], logprobs: Iterable[Logprobs], num_top: int
) -> list[dict[str, Any]]:
    """The entries of `logprobs.content` of a chat."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = token_bytes(token_id)
        return {"token": token.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(token)}

    return [
        {
            **entry(token_id, item.logprob),
            "top_logprobs": [entry(*top) for top in zip(item.top_ids[:num_top], item.top_logprobs, strict=False)],
        }
        for token_id, item in zip(ids, logprobs, strict=True)
    ]


def prompt_logprobs(
    token_bytes: TokenBytes, ids: Sequence[int], logprobs: Sequence[Logprobs], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's form: for each token of the prompt but the first the token itself and the likeliest ones, by id."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, LEAST), "rank": rank, "decoded_token": token_bytes.text(token_id)}

    return [
        None,
        *(
            {str(token_id): entry(token_id, item.logprob, item.rank)}
            | {
                str(other): entry(other, logprob, rank)
                for rank, (other, logprob) in enumerate(
                    zip(item.top_ids[:num_top], item.top_logprobs, strict=False), start=1
                )
            }
            for token_id, item in zip(ids[1:], logprobs, strict=True)
        ),
    ]
