"""Every op in the plainest torch: the meaning that each other variant is tested against.

Legend: B rows, T query tokens, S keys, M blocks a row, H query heads, KVH key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm.cache import PagedBatch
from lm.ops.types import AttentionPlan


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in fp32 (Zhang and Sennrich, 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def apply_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate (B, T, heads, D) by `cos`, `sin` (B, T, 1, D) in fp32, first half against second half.

    The first half of `sin` is negated already: x * cos + (x2, x1) * sin, with x = (x1, x2).
    """
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return (torch.cat((first, second), -1) * cos + torch.cat((second, first), -1) * sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020)."""
    return gate * torch.sigmoid(gate) * up


def causal_mask(input_ids: Tensor, documents: Tensor | None, window: int | None) -> Tensor:
    """Which tokens a token sees, where that is not simply all before it: boolean (B or 1, 1, T, T) for ids (B, T).

    `documents` (B, T) numbers the document of each token of packed rows; a token sees its own document only. With a
    `window` it sees the last `window` tokens only, itself included.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    visible = _within(index, index[:, None], window)[None]
    if documents is not None:
        visible = visible & (documents[:, None, :] == documents[:, :, None])
    return visible[:, None]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, T, H, D) over (B, T, KVH, D) where token i sees tokens 0..i, or what `mask` shows it.

    Returns (B, T, H, D).
    """
    return _attend(query, key, value, causal_mask(query, None, None) if mask is None else mask)


def plan_attention(paged: PagedBatch, positions: Tensor, window: int | None) -> AttentionPlan:
    """What the layers of one forward with this `window` share. `positions` (B, T)."""
    table = paged.block_table
    index = torch.arange(table.shape[1] * paged.cache.block_size, device=positions.device)
    return AttentionPlan(
        slots=paged.slot_mapping.long(),
        blocks=table.flatten(),
        mask=_within(index, positions[:, :, None], window)[:, None],
    )


def _within(index: Tensor, position: Tensor, window: int | None) -> Tensor:
    """Whether the key at `index` is at or before `position`, and among the last `window` tokens there."""
    visible = index <= position
    return visible if window is None else visible & (index > position - window)


def write_kv(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> None:
    """Store (B, T, KVH, D) into the slots of one layer's (num_blocks, block_size, KVH, D)."""
    keys.flatten(0, 1)[plan.slots] = key.flatten(0, 1)
    values.flatten(0, 1)[plan.slots] = value.flatten(0, 1)


def paged_attention(query: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> Tensor:
    """Attention of (B, T, H, D) over the row's blocks of one layer's cache. Returns (B, T, H, D)."""
    shape = (query.shape[0], -1, *keys.shape[2:])
    return _attend(query, keys[plan.blocks].view(shape), values[plan.blocks].view(shape), plan.mask)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    dtype, groups = query.dtype, query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2).float() for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5  # (B, H, T, S)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.matmul(weights, value).transpose(1, 2).to(dtype)
