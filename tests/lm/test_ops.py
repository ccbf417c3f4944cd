"""Every variant of every op against its reference."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lm.cache import KVCache, PagedBatch
from lm.config import ModelConfig
from lm.ops import REFERENCE, AttentionPlan, Ops, choose_ops, native, reference

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {FP32: 1e-5, BF16: 2e-2}
HEADS = [(4, 4), (4, 2), (8, 2), (9, 3), (4, 1)]
BLOCK_SIZE, NUM_BLOCKS, HEAD_DIM = 4, 12, 16

every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
every_heads = pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
# "cuda" stands for any accelerator: the variants run on the CPU as well
every_choice = pytest.mark.parametrize("device", ["cpu", "cuda"])


def ops_for(device: str, dtype: torch.dtype) -> Ops:
    return choose_ops(torch.device(device), dtype)[0]


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(ours: Tensor, expected: Tensor, widen: float = 1.0) -> None:
    tolerance = TOLERANCE[expected.dtype] * widen
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum of the outputs, by which each element counts differently."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((output.float() * random(*output.shape, seed=9)).sum() for output in outputs)
    return list(torch.autograd.grad(total, leaves))


def rotation(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Unrelated numbers in the two halves would not be a rotation, so take real angles."""
    angles = 10 * random(batch, length, 1, HEAD_DIM // 2, seed=3)
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)


@every_choice
@every_dtype
def test_rms_norm(device: str, dtype: torch.dtype) -> None:
    x, weight = 7 * random(3, 5, 48, dtype=dtype), random(48, dtype=dtype, seed=1)
    ours = ops_for(device, dtype).rms_norm
    assert_same(ours(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for got, expected in zip(
        gradients(lambda x, weight: ours(x, weight, 1e-5), x, weight),
        gradients(lambda x, weight: reference.rms_norm(x, weight, 1e-5), x, weight),
        strict=True,
    ):
        assert_same(got, expected, widen=3)


def test_rms_norm_reference_equals_transformers() -> None:
    theirs = LlamaRMSNorm(48, eps=1e-5)
    x = random(2, 3, 48)
    torch.testing.assert_close(reference.rms_norm(x, theirs.weight, 1e-5), theirs(x))


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    """One rounding, of the result: a second one would show in a third of the numbers."""
    x, weight = 7 * random(30, 5, 48, dtype=BF16), random(48, dtype=BF16, seed=1)
    exact = reference.rms_norm(x.float(), weight.float(), 1e-5).to(BF16)
    for ops in (REFERENCE, ops_for("cpu", BF16)):
        assert (ops.rms_norm(x, weight, 1e-5) == exact).float().mean() > 0.99


@every_choice
@every_dtype
def test_apply_rope(device: str, dtype: torch.dtype) -> None:
    query, key = random(2, 5, 4, HEAD_DIM, dtype=dtype), random(2, 5, 2, HEAD_DIM, dtype=dtype, seed=1)
    cos, sin = rotation(2, 5)
    ours = ops_for(device, dtype).apply_rope
    for got, expected in zip(ours(query, key, cos, sin), reference.apply_rope(query, key, cos, sin), strict=True):
        assert_same(got, expected)
    for got, expected in zip(
        gradients(lambda q, k: ours(q, k, cos, sin), query, key),
        gradients(lambda q, k: reference.apply_rope(q, k, cos, sin), query, key),
        strict=True,
    ):
        assert_same(got, expected)


def test_apply_rope_reference_equals_transformers() -> None:
    query, key = random(2, 5, 4, HEAD_DIM), random(2, 5, 2, HEAD_DIM, seed=1)
    cos, sin = rotation(2, 5)
    plain_sin = torch.cat((-sin[..., : HEAD_DIM // 2], sin[..., HEAD_DIM // 2 :]), -1)
    theirs = apply_rotary_pos_emb(query, key, cos.squeeze(2), plain_sin.squeeze(2), unsqueeze_dim=2)
    for got, expected in zip(reference.apply_rope(query, key, cos, sin), theirs, strict=True):
        torch.testing.assert_close(got, expected)


def test_apply_rope_rotates_bf16_in_fp32() -> None:
    """One rounding, of the result: not one of cosine, sine and products as well."""
    query, key = random(2, 5, 4, HEAD_DIM, dtype=BF16), random(2, 5, 2, HEAD_DIM, dtype=BF16, seed=1)
    cos, sin = rotation(2, 5)
    exact = reference.apply_rope(query.float(), key.float(), cos, sin)
    for ops in (REFERENCE, ops_for("cpu", BF16)):
        for got, expected in zip(ops.apply_rope(query, key, cos, sin), exact, strict=True):
            assert (got == expected.to(BF16)).float().mean() > 0.99


@every_choice
@every_dtype
def test_swiglu(device: str, dtype: torch.dtype) -> None:
    gate, up = random(3, 5, 24, dtype=dtype), random(3, 5, 24, dtype=dtype, seed=1)
    ours = ops_for(device, dtype).swiglu
    assert_same(ours(gate, up), reference.swiglu(gate, up))
    for got, expected in zip(gradients(ours, gate, up), gradients(reference.swiglu, gate, up), strict=True):
        assert_same(got, expected)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 5]])
MASKS = {
    "causal": None,
    "window": reference.causal_mask(DOCUMENTS, None, 3),
    "documents": reference.causal_mask(DOCUMENTS, DOCUMENTS, None),
    "documents and window": reference.causal_mask(DOCUMENTS, DOCUMENTS, 2),
}


@every_heads
@every_choice
@every_dtype
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_causal_attention(device: str, dtype: torch.dtype, heads: int, kv_heads: int, mask: Tensor | None) -> None:
    query = random(2, 7, heads, HEAD_DIM, dtype=dtype)
    key, value = (random(2, 7, kv_heads, HEAD_DIM, dtype=dtype, seed=seed) for seed in (1, 2))
    chosen = ops_for(device, dtype).causal_attention

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return chosen(query, key, value, mask)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.causal_attention(query, key, value, mask)

    assert_same(ours(query, key, value), theirs(query, key, value))
    for got, expected in zip(gradients(ours, query, key, value), gradients(theirs, query, key, value), strict=True):
        assert_same(got, expected, widen=3)


def test_a_mask_shows_the_last_tokens_of_the_own_document_only() -> None:
    """By definition, pair by pair."""
    for documents, window in [(None, None), (None, 3), (DOCUMENTS, None), (DOCUMENTS, 2), (DOCUMENTS, 100)]:
        mask = reference.causal_mask(DOCUMENTS, documents, window)
        assert mask.shape == (1 if documents is None else 2, 1, 7, 7)
        for row, i, j in itertools.product(range(mask.shape[0]), range(7), range(7)):
            is_own = documents is None or bool(documents[row, i] == documents[row, j])
            assert bool(mask[row, 0, i, j]) is (i - (window or 7) < j <= i and is_own)


def test_bf16_attention_on_the_cpu_keeps_the_scores_up_to_a_bound_only(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (random(2, 64, heads, HEAD_DIM, dtype=BF16, seed=heads) for heads in (9, 3, 3))
    query.requires_grad_()
    ours, num_scores = ops_for("cpu", BF16).causal_attention, 2 * 9 * 64 * 64
    expected = reference.causal_attention(query, key, value, None)
    for bound in (num_scores, num_scores - 1):
        monkeypatch.setattr(native, "MAX_SCORES", bound)
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            assert_same(ours(query, key, value, None), expected)
        assert (max(kept) == num_scores) is (bound == num_scores)


def test_causal_attention_does_not_look_ahead() -> None:
    query, key, value = (random(1, 6, 2, HEAD_DIM, seed=seed) for seed in range(3))
    before = reference.causal_attention(query, key, value, None)[:, :4]
    key[:, 4:], value[:, 4:] = 99.0, 99.0
    assert torch.equal(reference.causal_attention(query, key, value, None)[:, :4], before)


def paged_batch(heads: int, kv_heads: int, length: int, dtype: torch.dtype) -> tuple[PagedBatch, Tensor]:
    """Three rows at different positions and a padding row, over a cache full of random numbers."""
    config = ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": HEAD_DIM,
        }
    )
    cache = KVCache.allocate(config, NUM_BLOCKS, BLOCK_SIZE, CPU, dtype)
    for seed, stored in enumerate((*cache.keys, *cache.values)):
        stored.copy_(random(*stored.shape, dtype=dtype, seed=seed))
    table = torch.tensor([[4, 7, 2], [9, 1, 0], [3, 0, 0], [0, 0, 0]], dtype=torch.int32)
    starts = torch.tensor([12 - length, 4, 0, 0])
    positions = starts[:, None] + torch.arange(length)
    positions[3] = 0
    slots = table.gather(1, positions // BLOCK_SIZE) * BLOCK_SIZE + positions % BLOCK_SIZE
    return PagedBatch(cache=cache, slot_mapping=slots.flatten().int(), block_table=table), positions.int()


@every_heads
@every_choice
@every_dtype
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("length", [1, 4])
def test_paged_attention(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, length: int, window: int | None
) -> None:
    ops = ops_for(device, dtype)
    paged, positions = paged_batch(heads, kv_heads, length, dtype)
    query = random(4, length, heads, HEAD_DIM, dtype=dtype)
    keys, values = paged.cache.keys[0], paged.cache.values[0]
    expected = reference.paged_attention(query, keys, values, reference.plan_attention(paged, positions, window))
    ours = ops.paged_attention(query, keys, values, ops.plan_attention(paged, positions, window))
    assert ours.shape == query.shape
    assert_same(ours, expected)


def test_paged_attention_reference_equals_causal_attention_over_the_same_keys() -> None:
    paged, positions = paged_batch(4, 2, 4, FP32)
    query = random(4, 4, 4, HEAD_DIM)
    keys, values = paged.cache.keys[0], paged.cache.values[0]
    paged_result = reference.paged_attention(query, keys, values, reference.plan_attention(paged, positions, None))
    key, value = (stored[[4, 7, 2]].flatten(0, 1)[None] for stored in (keys, values))
    ahead = random(1, 8, 4, HEAD_DIM, seed=5)  # queries of positions 0 to 7, before those of row 0
    causal = reference.causal_attention(torch.cat((ahead, query[:1]), 1), key, value, None)
    torch.testing.assert_close(paged_result[0], causal[0, 8:])


@every_choice
@every_dtype
def test_write_kv(device: str, dtype: torch.dtype) -> None:
    paged, positions = paged_batch(4, 2, 4, dtype)
    key, value = (random(4, 4, 2, HEAD_DIM, dtype=dtype, seed=seed) for seed in (5, 6))
    key[3], value[3] = key[3, 0], value[3, 0]  # the padding tokens share a slot: which one stays is open
    results = []
    for ops in (REFERENCE, ops_for(device, dtype)):
        keys, values = paged.cache.keys[0].clone(), paged.cache.values[0].clone()
        ops.write_kv(key, value, keys, values, ops.plan_attention(paged, positions, None))
        results.append((keys, values))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    keys, values = results[0]
    assert torch.equal(keys[2], key[0]), "positions 8 to 11 of row 0 are its third block"
    assert torch.equal(values[1], value[1]), "positions 4 to 7 of row 1 are its second block"


@every_choice
@pytest.mark.parametrize("window", [None, 3])
def test_the_plan_shows_a_query_the_keys_up_to_its_position(device: str, window: int | None) -> None:
    paged, positions = paged_batch(4, 2, 4, FP32)
    plan = ops_for(device, FP32).plan_attention(paged, positions, window)
    assert isinstance(plan, AttentionPlan)
    visible = plan.mask if plan.mask.dtype == torch.bool else plan.mask == 0
    first = visible.flatten(0, 2).int().argmax(-1)
    assert torch.equal(visible.sum(-1).squeeze(1), (positions + 1).clamp(max=window or 99))
    assert torch.equal(first, (positions.flatten() + 1 - (window or 99)).clamp(min=0))


def test_the_choice_gives_a_reason_for_each_op() -> None:
    for device in ("cpu", "cuda"):
        _, reasons = choose_ops(torch.device(device), FP32)
        assert set(reasons) == {field.name for field in fields(Ops)}
        assert all(reasons.values())
