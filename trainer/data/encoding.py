"""From a record to what the model sees of it: token ids, and the spans of them that are trained. Torch-free."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from operator import eq
from typing import Literal, NamedTuple

from lm.errors import UserError
from lm.template import ChatTemplate
from lm.tokenizer import Tokenizer
from lm.tool_prompt import prompt_messages
from trainer.data.conversations import Messages, trained_answers, without_weight
from trainer.data.errors import DataError
from trainer.data.records import WRONG_RECIPE, Record

Tokens = tuple[list[int], list[bool]]
"""Ids, and for each whether it is trained."""


class Piece(NamedTuple):
    """An example in the form in which it is stored."""

    ids: bytes
    """int32 each."""
    spans: bytes
    """Where trained positions begin and end, int32 each: two numbers a span."""
    num_trained: int


class Encoded(NamedTuple):
    """A record as token ids."""

    pieces: list[Piece]
    """Empty where no token is trained. Of a preference two: the chosen one, then the rejected one."""
    length: int
    """Tokens before anything was cut; of a preference those of the longer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Turns records into tokens as a run's options say."""

    template: ChatTemplate
    max_seq_len: int
    masking: Literal["assistant", "last", "all"] = "assistant"
    truncation: Literal["right", "left", "split"] = "right"
    pairs: bool = False
    """Whether records are preferences."""

    def __call__(self, record: Record) -> Encoded:
        """Raises DataError that names the record."""
        if bool(record.rejected) != self.pairs:
            raise DataError(f"{record.where}: {WRONG_RECIPE[self.pairs]}")
        try:
            wholes = self._pair(record) if self.pairs else [self._alone(record)]
        except UserError as error:
            raise DataError(f"{record.where}: {error}") from error
        length = max(len(ids) for ids, _ in wholes)
        parts = [part for whole in wholes for part in self._cut(*whole, record)]
        pieces = [_piece(*part) for part in parts]
        if self.pairs and not all(piece.num_trained for piece in pieces):
            return Encoded([], length)
        return Encoded([piece for piece in pieces if piece.num_trained], length)

    def _alone(self, record: Record) -> Tokens:
        if record.text is not None:
            prompt = "" if self.masking == "all" else record.prompt
            return encode_text(record.text, len(prompt), self.template.tokenizer)
        return self._chat(record, record.messages)

    def _pair(self, record: Record) -> list[Tokens]:
        """Answers that both conversations begin with belong to the prompt."""
        shared = sum(takewhile(bool, map(eq, record.messages, record.rejected)))
        prompt = [{**message, "weight": 0} for message in record.messages[:shared]]
        return [self._chat(record, [*prompt, *messages[shared:]]) for messages in (record.messages, record.rejected)]

    def _chat(self, record: Record, messages: Messages) -> Tokens:
        """Tools and calls are written as in a prompt that is served."""
        written, tools = prompt_messages(messages, record.tools or (), self.template)
        answers = trained_answers(written)
        if self.masking == "last":
            last = max(index for index, message in enumerate(written) if message["role"] == "assistant")
            answers = [index for index in answers if index == last]
        return self.template.encode_with_mask(
            [without_weight(message) for message in written],
            train_on_input=self.masking == "all",
            answers=answers,
            tools=tools,
        )

    def _cut(self, ids: list[int], mask: list[bool], record: Record) -> list[Tokens]:
        limit = self.max_seq_len
        if len(ids) <= limit:
            return [(ids, mask)]
        if self.truncation == "right":
            return [(ids[:limit], mask[:limit])]
        if self.truncation == "left":
            keep = 1 if ids[0] == self.template.tokenizer.bos_token_id else 0  # what every text begins with
            rest = len(ids) - (limit - keep)
            return [(ids[:keep] + ids[rest:], mask[:keep] + mask[rest:])]
        if record.text is None:
            raise DataError(
                f"{record.where}: {len(ids)} tokens, more than max_seq_len={limit}, and truncation: split is for plain "
                "text; set truncation to right or left, or raise max_seq_len",
                param="truncation",
            )
        # each part begins with the token that the part before ends with, so that every token is predicted once
        starts = range(0, len(ids) - 1, limit - 1)
        return [(ids[start : start + limit], mask[start : start + limit]) for start in starts]


def encode_text(text: str, num_untrained_chars: int, tokenizer: Tokenizer) -> Tokens:
    """The text as this tokenizer begins one, with the end of sequence behind it, which it may write itself.

    A token that holds characters from both sides of `num_untrained_chars` is trained.
    """
    ids = tokenizer.encode(text)
    mask = [True] * len(ids)
    if num_untrained_chars:
        bare, ends = tokenizer.encode_with_ends(text)
        lead = next(start for start in range(len(ids)) if ids[start : start + len(bare)] == bare)
        untrained = lead + sum(end <= num_untrained_chars for end in ends)
        mask = [position >= untrained for position in range(len(ids))]
    end = list(tokenizer.eos_token_ids[:1])
    if ids[-1:] != end:
        ids, mask = ids + end, mask + [True] * len(end)
    return ids, mask


def _piece(ids: list[int], mask: Sequence[bool]) -> Piece:
    """The first token is predicted by nothing, so it is never trained."""
    spans, position = array("i"), 0
    for is_trained, group in groupby([False, *mask[1:]]):
        length = sum(1 for _ in group)
        if is_trained:
            spans.extend((position, position + length))
        position += length
    num_trained = sum(spans[1::2]) - sum(spans[::2])
    return Piece(array("i", ids).tobytes(), spans.tobytes(), num_trained)
