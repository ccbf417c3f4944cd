"""Whole steps of the runner over a model whose logits are known: what each row gets, and in how many forwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.engine.random_numbers import stream_key, uniforms
from service.engine.rows import pack_mask
from service.engine.sequence import Sequence
from tests.support.bigram import Desk, bigram_desk, decoding, prefilling, random_table
from tests.support.sampling_reference import distribution, edited_logits, possible_tokens

VOCAB = 40
TABLE = random_table(VOCAB)
TOKENS = st.integers(0, VOCAB - 1)


class FixedMatcher:
    """Always the same tokens may come; notes what it was asked."""

    is_over = False
    failure = None

    def __init__(self, allowed: set[int], before: Callable[[], None] = lambda: None) -> None:
        self._mask = pack_mask(allowed, VOCAB)
        self._before = before

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        self._before()
        words[:] = self._mask

    def accept(self, token_id: int) -> bool:
        return True


def reference_tokens(sequence: Sequence, num_prompt_tokens: int, allowed: set[int] | None = None) -> set[int]:
    """What the next token may be, by the plain definition."""
    text = sequence.token_ids
    logits = edited_logits(
        TABLE[text[-1]].tolist(),
        sequence.sampling,
        text[:num_prompt_tokens],
        text[num_prompt_tokens:],
        sequence.stop_token_ids,
    )
    if allowed is not None:
        logits = [logit if token in allowed else -np.inf for token, logit in enumerate(logits)]
    key = np.array([stream_key(sequence.seed, sequence.sampling.choice)], dtype=np.uint64)
    number = float(uniforms(key, np.array([len(text)], dtype=np.int32))[0])
    return possible_tokens(distribution(logits, sequence.sampling), number)


fields_of_a_request = st.fixed_dictionaries(
    {"seed": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.8]),
        "top_k": st.integers(0, VOCAB + 5),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 0.5),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-5, 5), max_size=4),
        "bad_words": st.lists(st.lists(TOKENS, min_size=1, max_size=2).map(tuple), max_size=4).map(tuple),
        "min_tokens": st.integers(0, 6),
        "allowed_token_ids": st.sets(TOKENS, min_size=12).map(lambda ids: tuple(sorted(ids))),
        "choice": st.integers(0, 5),
        "logprobs": st.integers(0, 20),
    },
)
requests = st.fixed_dictionaries(
    {
        "fields": fields_of_a_request,
        "prompt": st.lists(TOKENS, min_size=1, max_size=12),
        "answer": st.lists(TOKENS, max_size=8),
        "stop": st.lists(TOKENS, max_size=3),
        "grammar": st.none() | st.sets(TOKENS, min_size=25),
    }
)


@settings(deadline=None)
@given(st.lists(requests, min_size=1, max_size=8))
def test_every_row_gets_the_token_of_the_plain_definition_and_the_same_one_alone(batch: list[dict[str, Any]]) -> None:
    desk, alone = bigram_desk(TABLE), bigram_desk(TABLE)

    def place(desk: Desk, request: dict[str, Any], row: int) -> Sequence:
        matcher = None if request["grammar"] is None else FixedMatcher(request["grammar"])
        return desk.sequence(
            request["prompt"],
            request["answer"],
            row=row,
            stop_token_ids=request["stop"],
            matcher=matcher,
            **request["fields"],
        )

    rows = [place(desk, request, row) for row, request in enumerate(batch)]
    together = desk.next_tokens(*rows)
    for request, sequence, token_id in zip(batch, rows, together, strict=True):
        expected = reference_tokens(sequence, len(request["prompt"]), request["grammar"])
        assert not expected or token_id in expected  # empty: grammar, allowed and bad words leave nothing
        assert alone.next_tokens(place(alone, request, 0)) == [token_id]


def test_a_seeded_request_draws_the_same_answer_alone_and_in_a_full_batch() -> None:
    kinds: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 1, "choice": 1},
        {"seed": 2, "top_p": 0.8, "frequency_penalty": 0.7},
        {"seed": 3, "top_k": 7, "repetition_penalty": 1.4},
        {"temperature": 0.0},
        {"seed": 4, "min_p": 0.1, "allowed_token_ids": tuple(range(0, VOCAB, 2))},
        {"seed": 5, "bad_words": ((3,), (4, 5)), "min_tokens": 9},
        {"seed": 6, "logprobs": 3},
    ]
    desk = bigram_desk(TABLE)
    rows = [desk.sequence([5, 9], row=row, stop_token_ids=[1], **kind) for row, kind in enumerate(kinds)]
    together = desk.continue_by(12, *rows)
    for kind, answer in zip(kinds, together, strict=True):
        alone = bigram_desk(TABLE)
        assert alone.continue_by(12, alone.sequence([5, 9], stop_token_ids=[1], **kind)) == [answer]
    assert together[0] != together[1]


def test_a_row_that_another_request_takes_over_is_written_anew() -> None:
    desk = bigram_desk(TABLE)
    first = desk.sequence([1, 2, 3], row=2, temperature=0, logit_bias={7: 100.0}, allowed_token_ids=(7, 8), logprobs=1)
    second = desk.sequence([4], row=2, temperature=0)
    assert desk.next_tokens(first) == [7]
    output = desk.run(decoding(second))
    assert output.token_ids == [int(TABLE[4].argmax())]
    assert output.logprobs == [None]


# ---- forwards


def test_chunks_of_one_padded_size_share_a_forward_and_only_the_last_of_a_prompt_samples() -> None:
    desk = bigram_desk(TABLE)
    old, done, half, other = (desk.sequence(range(1, 9), row=row, temperature=0) for row in range(4))
    output = desk.run(
        decoding(old), prefilling(done, start=1), prefilling(half, end=7), prefilling(other, start=2, end=5)
    )
    assert desk.model.shapes == [(1, 1), (2, 8), (1, 3)]
    assert output.token_ids == [int(TABLE[8].argmax())] * 2
    assert [figures[:3] for figures in output.forwards] == [(0, 1, 1), (0, 2, 14), (0, 1, 3)]
    assert all(figures.seconds > 0 for figures in output.forwards)


def test_each_generation_has_a_forward_of_its_own() -> None:
    desk = bigram_desk(TABLE)
    rows = [desk.sequence([1, 2], row=row, temperature=0) for row in range(4)]
    rows[1].generation = rows[3].generation = 1
    output = desk.run(*map(decoding, rows))
    assert [figures[:3] for figures in output.forwards] == [(0, 2, 2), (1, 2, 2)]
    assert output.token_ids == [int(TABLE[2].argmax())] * 4


def test_tokens_come_in_the_order_of_the_chunks_whatever_the_forwards() -> None:
    desk = bigram_desk(TABLE)
    rows = [desk.sequence([row, row + 1], row=row, temperature=0) for row in range(6)]
    for sequence in rows[::2]:
        sequence.generation = 1
    output = desk.run(*map(decoding, rows), prefilling(desk.sequence([1, 2, 30], row=6, temperature=0)))
    assert output.token_ids == [int(TABLE[token].argmax()) for token in (1, 2, 3, 4, 5, 6, 30)]


def test_a_chunk_that_samples_nothing_gives_no_token() -> None:
    desk = bigram_desk(TABLE)
    output = desk.run(prefilling(desk.sequence([1, 2, 3]), end=2))
    assert (output.token_ids, output.logprobs, output.prompt_logprobs) == ([], [], {})


def test_a_prompt_of_one_token_decodes_beside_the_others() -> None:
    desk = bigram_desk(TABLE)
    chunks = [
        decoding(desk.sequence([1, 2], row=0, temperature=0)),
        prefilling(desk.sequence([9], temperature=0, row=1)),
    ]
    output = desk.run(*chunks, prefilling(desk.sequence([3, 4], row=2), end=1))
    assert desk.model.shapes == [(3, 1)]
    assert output.token_ids == [int(TABLE[2].argmax()), int(TABLE[9].argmax())]


# ---- masks


def test_masks_are_filled_while_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward ends only after the mask was filled: one after the other, they would wait for ever."""
    desk, filled = bigram_desk(TABLE), threading.Event()
    logits = desk.model.logits
    monkeypatch.setattr(desk.model, "logits", lambda hidden: logits(hidden) if filled.wait(30) else None)
    sequence = desk.sequence([1, 2], matcher=FixedMatcher({11}, before=filled.set), temperature=0)
    assert desk.next_tokens(sequence) == [11]


def test_a_matcher_that_fails_fails_the_step_and_leaves_the_next_alone() -> None:
    desk = bigram_desk(TABLE)

    def fail() -> None:
        raise ValueError("no such state")

    broken = desk.sequence([1, 2], row=0, matcher=FixedMatcher({11}, before=fail), temperature=0)
    with pytest.raises(ValueError, match="no such state"):
        desk.next_tokens(broken)
    assert desk.next_tokens(desk.sequence([1, 2], row=1, temperature=0)) == [int(TABLE[2].argmax())]
