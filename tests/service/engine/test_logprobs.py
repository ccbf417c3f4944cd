"""Log probabilities: of sampled tokens and of prompts, against torch's own over an uncached forward."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lm.cache import KVCache
from lm.checkpoint import load_weights
from lm.config import load_config
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE
from service.engine import logprobs
from service.engine.logprobs import pack_logprobs, pack_prompt_logprobs, top_size, unpack_logprobs
from service.engine.messages import Logprobs
from tests.support.bigram import BLOCK_SIZE, CPU, Desk, bigram_desk, decoding, prefilling, random_table

VOCAB = 40
TABLE = random_table(VOCAB)


def unpacked(logits: Tensor, token_ids: list[int], num_top: int, wanted: list[int | None]) -> list[Logprobs | None]:
    packed = pack_logprobs(logits, torch.tensor(token_ids, dtype=torch.int32), num_top)
    return list(unpack_logprobs(packed.numpy(), wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_log_softmax_in_fp32(dtype: torch.dtype) -> None:
    logits, token_ids = TABLE.to(dtype), [(7 * row) % VOCAB for row in range(VOCAB)]
    expected = logits.float().log_softmax(-1)
    order = expected.argsort(descending=True, stable=True)
    for row, told in enumerate(unpacked(logits, token_ids, 20, [20] * VOCAB)):
        assert told is not None
        assert told.logprob == expected[row, token_ids[row]].item()
        assert told.rank == 1 + int((expected[row] > told.logprob).sum())
        assert list(told.top_logprobs) == expected[row, order[row, :20]].tolist()
        assert [expected[row, token].item() for token in told.top_ids] == list(told.top_logprobs)
        assert len(set(told.top_ids)) == 20


def test_the_likeliest_token_has_exactly_the_first_of_the_likeliest_values() -> None:
    logits = torch.randn(500, 5000, generator=torch.Generator().manual_seed(0)) * 5
    for told in unpacked(logits, logits.argmax(-1).tolist(), 1, [1] * 500):
        assert told is not None
        assert (told.logprob, told.rank) == (told.top_logprobs[0], 1)


def test_a_row_gets_what_it_asks_for_and_no_more() -> None:
    told = unpacked(TABLE[:4], [1, 2, 3, 4], 5, [None, 0, 1, 5])
    assert told[0] is None
    assert [len(row.top_ids) for row in told[1:] if row is not None] == [0, 1, 5]
    assert [len(row.top_logprobs) for row in told[1:] if row is not None] == [0, 1, 5]


def test_few_numbers_of_alternatives_are_computed() -> None:
    assert [top_size(count, 100) for count in (0, 1, 2, 5, 6, 20)] == [0, 1, 5, 5, 20, 20]
    assert top_size(20, 16) == 16


def test_a_prompt_is_taken_in_parts_that_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "SLICE_BYTES", 7 * 4 * VOCAB)
    shapes: list[tuple[int, ...]] = []

    def logits_of(hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape))
        return TABLE.index_select(0, hidden.flatten())

    hidden, targets = torch.arange(20).unsqueeze(1), torch.arange(1, 21, dtype=torch.int32)
    parts = pack_prompt_logprobs(hidden, targets, 5, logits_of=logits_of, vocab_size=VOCAB)
    assert shapes == [(7, 1), (7, 1), (6, 1)]
    assert torch.equal(torch.cat(parts), pack_logprobs(TABLE[:20], targets, 5))


def test_they_are_of_the_model_alone_whatever_is_done_to_the_logits() -> None:
    desk = bigram_desk(TABLE)
    banned = int(TABLE[2].argmax())
    sequence = desk.sequence(
        [1, 2], temperature=0, logprobs=2, bad_words=((banned,),), logit_bias={5: 3.0}, allowed_token_ids=(5, 6, banned)
    )
    output = desk.run(decoding(sequence))
    (token_id,), (told,) = output.token_ids, output.logprobs
    assert token_id in (5, 6)
    assert told is not None
    assert told.logprob == pytest.approx(TABLE[2].log_softmax(-1)[token_id].item(), abs=1e-6)
    assert told.top_ids[0] == banned
    assert told.rank > 1


# ---- with a model


@pytest.fixture(scope="module")
def model(tiny: Path) -> CausalLM:
    built = build_model(load_config(tiny), device=CPU, dtype=torch.float32, ops=REFERENCE)
    load_weights(built, tiny)
    return built


def desk_of(model: CausalLM) -> Desk:
    cache = KVCache.allocate(model.config, 40, BLOCK_SIZE, CPU, torch.float32)
    return Desk(model, cache, vocab_size=model.config.vocab_size, max_num_batched_tokens=32)


@torch.inference_mode()
def uncached(model: CausalLM, token_ids: list[int]) -> Tensor:
    """Log probabilities (T, V) after each token."""
    hidden = model(torch.tensor([token_ids]), torch.arange(len(token_ids)).unsqueeze(0))
    return model.logits(hidden)[0].float().log_softmax(-1)


@pytest.mark.parametrize("cuts", [[], [1], [9], [4, 5, 17], [22]], ids=str)
def test_a_prompt_in_any_chunks_has_the_log_probabilities_of_an_uncached_forward(
    model: CausalLM, cuts: list[int]
) -> None:
    prompt = [3 + place * 11 % 250 for place in range(23)]
    expected, desk = uncached(model, prompt), desk_of(model)
    sequence = desk.sequence(prompt, row=1, temperature=0, prompt_logprobs=3, logprobs=0)
    told: list[Logprobs] = []
    for start, end in zip([0, *cuts], [*cuts, 23], strict=True):
        neighbour = desk.sequence(prompt[: 1 + end - start], row=0, temperature=0)
        output = desk.run(decoding(neighbour), prefilling(sequence, start, end))
        assert 0 not in output.prompt_logprobs
        told += output.prompt_logprobs.get(1, ())
    assert len(told) == 22
    for place, one in enumerate(told):
        assert one.logprob == pytest.approx(expected[place, prompt[place + 1]].item(), abs=1e-4)
        assert list(one.top_logprobs) == pytest.approx(expected[place].topk(3).values.tolist(), abs=1e-4)
    last = output.logprobs[-1]
    assert last is not None
    assert last.logprob == pytest.approx(expected[22].max().item(), abs=1e-4)


def test_an_answer_has_the_log_probabilities_of_an_uncached_forward(model: CausalLM) -> None:
    desk = desk_of(model)
    prompt = [5, 9, 42]
    sequence = desk.sequence(prompt, temperature=0, logprobs=2)
    chunk, told = prefilling(sequence), []
    for _ in range(10):
        output = desk.run(chunk)
        told += output.logprobs
        sequence.token_ids += output.token_ids
        desk.grow(sequence)
        chunk = decoding(sequence)
    expected = uncached(model, sequence.token_ids)[2:-1]
    assert not any(one is None for one in told)
    assert [one.logprob for one in told if one] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
    assert [one.top_logprobs[0] for one in told if one] == [one.logprob for one in told if one]


def test_the_sum_over_all_tokens_is_one() -> None:
    (told,) = unpacked(TABLE[:1], [0], VOCAB, [VOCAB])
    assert told is not None
    assert sum(map(math.exp, told.top_logprobs)) == pytest.approx(1, abs=1e-6)
