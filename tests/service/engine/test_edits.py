from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from service.engine.edits import BAN, TokenEdits, needs_edits
from service.engine.messages import SamplingParams
from service.engine.sampler import EditInputs, edit
from service.engine.sequence import Sequence
from tests.support.sampling_reference import edited_logits

VOCAB = 12
TOKENS = st.integers(0, VOCAB - 1)


def sequence_of(
    prompt: Items[int], answer: Items[int] = (), stop_token_ids: Items[int] = (), **fields: Any
) -> Sequence:
    return Sequence(
        request_id="r",
        model_id="m",
        token_ids=[*prompt, *answer],
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=99, **fields),
        seed=0,
        arrived=0.0,
        stop_token_ids=frozenset(stop_token_ids),
    )


def apply(edits: TokenEdits, token_ids: list[int], logits: Tensor) -> Tensor:
    """As a step does, for one row."""
    words = edits.advance(token_ids).copy()
    assert len(set(words[0].tolist())) == words.shape[1]
    words[2].view(np.float32)[edits.bans(token_ids)] = BAN
    index, divisor, addend = torch.from_numpy(words)
    inputs = EditInputs(index=index, divisor=divisor.view(torch.float32), addend=addend.view(torch.float32))
    return edit(logits.unsqueeze(0), inputs)[0]


def some_logits(seed: int = 0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


sampling_fields = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 3),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
        "bad_words": st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
        "min_tokens": st.integers(0, 6),
    },
)


@settings(deadline=None)
@given(
    fields=sampling_fields,
    prompt=st.lists(TOKENS, min_size=1, max_size=10),
    answer=st.lists(TOKENS, max_size=12),
    stop=st.lists(TOKENS, max_size=3),
    begin=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_edits_are_what_the_plain_definition_says_at_every_length(
    fields: dict[str, Any], prompt: list[int], answer: list[int], stop: list[int], begin: int, seed: int
) -> None:
    """Also where the row is bound in the middle of the answer, as after a preemption."""
    begin = min(begin, len(answer))
    sequence = sequence_of(prompt, answer[:begin], stop, **fields)
    edits, logits = TokenEdits(sequence), some_logits(seed)
    for length in range(begin, len(answer) + 1):
        so_far = answer[:length]
        expected = torch.tensor(
            edited_logits(logits.tolist(), sequence.sampling, prompt, so_far, sequence.stop_token_ids)
        )
        edited = apply(edits, [*prompt, *so_far], logits)
        assert torch.equal(edited < -1e29, expected == -torch.inf)
        assert torch.allclose(edited[edited > -1e29], expected[expected > -torch.inf], rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(text=st.lists(TOKENS, min_size=1, max_size=20), penalty=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_the_repetition_penalty_is_that_of_transformers(text: list[int], penalty: float, seed: int) -> None:
    sequence = sequence_of(text[:1], text[1:], repetition_penalty=penalty)
    logits = some_logits(seed)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), logits.unsqueeze(0).clone())[0]
    ours = apply(TokenEdits(sequence), text, logits) if needs_edits(sequence.sampling) else logits
    assert torch.allclose(ours, theirs, rtol=1e-6)


@settings(deadline=None)
@given(
    text=st.lists(TOKENS, min_size=1, max_size=20),
    words=st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=5),
)
def test_bad_words_are_those_of_transformers(text: list[int], words: list[list[int]]) -> None:
    sequence = sequence_of(text[:1], text[1:], bad_words=tuple(map(tuple, words)))
    logits = some_logits()
    theirs = NoBadWordsLogitsProcessor(words)(torch.tensor([text]), logits.unsqueeze(0).clone())[0]
    ours = apply(TokenEdits(sequence), text, logits)
    assert torch.equal(ours < -1e29, theirs == -torch.inf)
    assert torch.equal(ours[ours > -1e29], logits[theirs > -torch.inf])


def test_a_request_that_asks_for_nothing_has_no_edits() -> None:
    assert not needs_edits(SamplingParams(max_tokens=1, temperature=0.5, top_k=3, seed=1, stop_token_ids=(2,)))


@pytest.mark.parametrize("bias", [0.0, 100.0, -100.0])
def test_a_ban_leaves_a_token_only_where_no_other_is_left(bias: float) -> None:
    sequence = sequence_of([0], bad_words=tuple((token,) for token in range(VOCAB - 1)), logit_bias={3: bias})
    logits = some_logits()
    assert apply(TokenEdits(sequence), [0], logits).argmax() == VOCAB - 1
    only_banned = torch.where(torch.arange(VOCAB) == 3, logits, -torch.inf)
    edited = apply(TokenEdits(sequence), [0], only_banned)
    assert edited.argmax() == 3
    assert torch.equal(edited.softmax(-1), (torch.arange(VOCAB) == 3).float())


def test_a_long_answer_of_many_tokens_keeps_every_count() -> None:
    tokens = [i * 7 % 101 for i in range(500)]
    sequence = sequence_of([0], frequency_penalty=0.5)
    edits, logits = TokenEdits(sequence), torch.zeros(101)
    for length in range(0, 501, 50):
        edited = apply(edits, [0, *tokens[:length]], logits)
        counts = torch.bincount(torch.tensor(tokens[:length], dtype=torch.int64), minlength=101)
        assert torch.equal(edited, -0.5 * counts)
