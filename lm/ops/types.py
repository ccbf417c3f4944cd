"""The set of ops a model is built with: each a plain callable, chosen once at start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lm.cache import PagedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """What the layers of one forward over the cache share that have the same window, made once by `plan_attention`."""

    slots: Tensor
    """(B * T,) int64: where the new keys and values go."""
    blocks: Tensor
    """(B * M,): the blocks to read, row after row."""
    mask: Tensor
    """(B, 1, T, S): which keys a query sees; boolean, or additive in the cache's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """Meaning, shapes and formulas: `lm.ops.reference`."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    apply_rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    causal_mask: Callable[[Tensor, Tensor | None, int | None], Tensor]
    causal_attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    plan_attention: Callable[[PagedBatch, Tensor, int | None], AttentionPlan]
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, AttentionPlan], None]
    paged_attention: Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor]
