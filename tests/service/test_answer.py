"""An answer from the engine's outputs: what its text, tokens, log probabilities and end are, however they are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.answer import Answer, Ask, Piece
from service.detokenizer import Detokenizer, StopFinder
from service.engine.messages import Logprobs, RequestTiming, SamplingParams, TokenOutput
from tests.support.scripted_engine import READY

ALPHABET = "abc是"
END, STOP_TOKEN = 100, 101
"""Ids that end an answer: the model's own, and one that the request names."""
TIMING = RequestTiming(queue_s=0.0, prefill_s=0.0, decode_s=1.0, decode_tokens=1, decode_bytes=1)

token_texts = st.lists(st.text(ALPHABET, max_size=3), max_size=12)
stop_strings = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


@dataclass(slots=True)
class Words:
    """A decoder whose token `i` is `texts[i]`."""

    texts: Sequence[str]

    def add(self, token_id: int) -> str:
        return self.texts[token_id] if token_id < len(self.texts) else "<end>"

    def flush(self) -> str:
        return ""


def answer_of(
    texts: Sequence[str], *, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
) -> Answer:
    sampling = SamplingParams(max_tokens=100, min_tokens=min_tokens, logprobs=0)
    ask = Ask(
        prompt_ids=[1], sampling=sampling, stop=tuple(stop), stop_token_ids=(STOP_TOKEN,), include_stop=include_stop
    )
    return Answer(
        index=0,
        prompt_index=0,
        ask=ask,
        sampling=sampling,
        detokenizer=Detokenizer(Words(texts), StopFinder(ask.stop, include=include_stop)),
        engine=READY,
        started=0.0,
    )


def logprobs(token_id: int) -> Logprobs:
    return Logprobs(logprob=-float(token_id), top_ids=(), top_logprobs=(), rank=1)


def outputs(ids: Sequence[int], sizes: Sequence[int]) -> list[TokenOutput]:
    """`ids` in steps of these sizes, the rest one by one; the last says how it ended."""
    steps, start = [], 0
    for size in (*sizes, *[1] * len(ids)):
        steps += [tuple(ids[start : start + size])] if start < len(ids) else []
        start += size
    steps = steps or [()]
    ended = bool(ids) and ids[-1] >= END
    return [
        TokenOutput(
            request_id="a",
            token_ids=step,
            logprobs=tuple(map(logprobs, step)),
            finish_reason=None if number < len(steps) - 1 else "stop" if ended else "length",
            stop_token_id=ids[-1] if ended and number == len(steps) - 1 else None,
            timing=TIMING if number == len(steps) - 1 else None,
        )
        for number, step in enumerate(steps)
    ]


def take(answer: Answer, ids: Sequence[int], sizes: Sequence[int] = ()) -> list[Piece]:
    pieces: list[Piece] = []
    for output in outputs(ids, sizes):
        if answer.finish_reason is None and (piece := answer.take(output)) is not None:
            pieces.append(piece)
    return pieces


def expected(
    texts: Sequence[str], stop: Sequence[str], min_tokens: int, include_stop: bool
) -> tuple[str, int, str | None]:
    """Text, number of tokens and stop string: the first to be completed ends it, the longest of several."""
    text = ""
    for number, token in enumerate(texts, start=1):
        for character in token:
            text += character
            found = [string for string in stop if text.endswith(string) and number >= min_tokens]
            if found:
                longest = max(found, key=len)
                return text if include_stop else text[: -len(longest)], number, longest
    return text, len(texts), None


@given(
    texts=token_texts,
    stop=stop_strings,
    sizes=st.lists(st.integers(0, 4), max_size=8),
    min_tokens=st.integers(0, 6),
    include_stop=st.booleans(),
)
def test_a_stop_string_cuts_text_tokens_and_log_probabilities_however_they_come(
    texts: list[str], stop: list[str], sizes: list[int], min_tokens: int, include_stop: bool
) -> None:
    answer = answer_of(texts, stop=stop, min_tokens=min_tokens, include_stop=include_stop)
    pieces = take(answer, range(len(texts)), sizes)
    text, num_tokens, found = expected(texts, stop, min_tokens, include_stop)
    assert "".join(piece.text for piece in pieces) == text
    assert answer.token_ids == list(range(num_tokens))
    assert answer.logprobs == list(map(logprobs, range(num_tokens)))
    assert (answer.finish_reason, answer.stop_reason) == (("stop", found) if found else ("length", None))
    assert [token for piece in pieces for token in piece.token_ids] == answer.token_ids
    assert [item for piece in pieces for item in piece.logprobs] == answer.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [answer.finish_reason]
    assert pieces[-1].num_tokens == num_tokens


@given(texts=token_texts, stop=stop_strings)
def test_no_more_is_held_back_than_a_stop_string_could_need(texts: list[str], stop: list[str]) -> None:
    answer, shown, whole = answer_of(texts, stop=stop), "", ""
    for token_id, text in enumerate(texts):
        piece = answer.take(TokenOutput(request_id="a", token_ids=(token_id,)))
        if answer.finish_reason is not None:
            return
        shown, whole = shown + (piece.text if piece else ""), whole + text
        heads = ["", *(string[:size] for string in stop for size in range(1, len(string)))]
        assert whole == shown + max((head for head in heads if whole.endswith(head)), key=len)


@pytest.mark.parametrize(
    ("token_id", "include_stop", "text", "stop_reason"),
    [
        (END, False, "ab", None),
        (END, True, "ab<end>", None),
        (STOP_TOKEN, False, "ab", STOP_TOKEN),
        (STOP_TOKEN, True, "ab<end>", STOP_TOKEN),
    ],
)
def test_a_token_that_ends_the_answer_counts_and_is_shown_on_request(
    token_id: int, include_stop: bool, text: str, stop_reason: int | None
) -> None:
    answer = answer_of(["a", "b"], stop=["zz"], include_stop=include_stop)
    pieces = take(answer, [0, 1, token_id])
    assert "".join(piece.text for piece in pieces) == text
    assert (answer.token_ids, answer.outcome, answer.stop_reason) == ([0, 1, token_id], "stop", stop_reason)


def test_the_beginning_of_a_stop_string_is_told_when_the_answer_ends_without_the_rest() -> None:
    pieces = take(answer_of(["say", " ST", "O"], stop=["STOP"]), [0, 1, 2])
    assert [piece.text for piece in pieces] == ["say", " ", "STO"]


def test_log_probabilities_are_told_at_once_also_where_their_text_is_held_back() -> None:
    pieces = take(answer_of(["S", "T", "x"], stop=["STOP"]), [0, 1, 2])
    assert [(piece.text, piece.token_ids) for piece in pieces] == [("", (0,)), ("", (1,)), ("STx", (2,))]


def test_a_prompt_alone_has_its_log_probabilities_and_no_text() -> None:
    answer = answer_of([])
    first, second = logprobs(1), logprobs(2)
    assert answer.take(TokenOutput(request_id="a", token_ids=(), prompt_logprobs=(first,))) is None
    last = TokenOutput(request_id="a", token_ids=(), prompt_logprobs=(second,), finish_reason="length", timing=TIMING)
    piece = answer.take(last)
    assert piece is not None
    assert (piece.text, piece.finish_reason, answer.prompt_logprobs) == ("", "length", [first, second])
