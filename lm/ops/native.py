"""Forms of the ops that use torch's own fused kernels. Signatures and meaning: `lm.ops.reference`."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.cache import PagedBatch
from lm.ops import reference
from lm.ops.types import AttentionPlan

MAX_SCORES = 1 << 22
"""8 MiB a layer in bf16: four sequences of 340 tokens with 9 heads."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def apply_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # cos and sin are fp32, so a bf16 x is rotated in fp32 without a copy of its own
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    groups = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    # With a mask the fused kernels take no shared heads, and the one that does would hold the scores
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def causal_attention_matmul(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """By two products, holding the scores; above MAX_SCORES of them as `causal_attention`, which does not."""
    batch, length, heads, head_dim = query.shape
    if batch * heads * length**2 > MAX_SCORES:
        return causal_attention(query, key, value, mask)
    kv_heads = key.shape[2]
    # The heads that share keys stand below each other, as query tokens of one head
    query = (
        query.view(batch, length, kv_heads, -1, head_dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(-1, heads // kv_heads * length, head_dim)
    )
    key, value = (x.transpose(1, 2).reshape(-1, length, head_dim) for x in (key, value))
    if mask is None:
        bias = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
        bias = bias.repeat(heads // kv_heads, 1)
    else:  # zeros, since the mask differs by row and the products do not
        bias = query.new_zeros(())
    scores = torch.baddbmm(bias, query, key.mT, alpha=head_dim**-0.5)
    if mask is not None:
        scores = scores.view(batch, heads, length, length).masked_fill(~mask, -torch.inf).view(scores.shape)
    attended = torch.bmm(scores.softmax(-1), value).view(batch, kv_heads, -1, length, head_dim)
    return attended.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def plan_attention_additive(paged: PagedBatch, positions: Tensor, window: int | None) -> AttentionPlan:
    """For a kernel that would turn a boolean mask into an additive one in every layer."""
    plan = reference.plan_attention(paged, positions, window)
    zero = torch.zeros((), dtype=paged.cache.keys[0].dtype, device=positions.device)
    return replace(plan, mask=torch.where(plan.mask, zero, -torch.inf))


def write_kv(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> None:
    keys.flatten(0, 1).index_copy_(0, plan.slots, key.flatten(0, 1))
    values.flatten(0, 1).index_copy_(0, plan.slots, value.flatten(0, 1))


def paged_attention(query: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> Tensor:
    batch, length, heads, head_dim = query.shape
    key, value = _gather(keys, plan.blocks, batch), _gather(values, plan.blocks, batch)
    if length > 1:
        query = query.transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=plan.mask, enable_gqa=True)
        return attended.transpose(1, 2)
    # Decoding: the heads that share keys become the query tokens of one head, so each key is read once
    grouped = query.view(batch, key.shape[1], -1, head_dim)  # (B, KVH, H / KVH, D)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=plan.mask)
    return attended.reshape(batch, 1, heads, head_dim)


def _gather(stored: Tensor, blocks: Tensor, batch: int) -> Tensor:
    """One layer's blocks as (B, KVH, S, D)."""
    return stored.index_select(0, blocks).view(batch, -1, *stored.shape[2:]).transpose(1, 2)
