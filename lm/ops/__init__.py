"""The ops a transformer is made of. Each variant stands beside its reference; the choice is made once, at start."""

from __future__ import annotations

import torch

from lm.ops import native, reference
from lm.ops.types import AttentionPlan, Ops

__all__ = ["REFERENCE", "AttentionPlan", "Ops", "choose_ops"]

REFERENCE = Ops(
    rms_norm=reference.rms_norm,
    apply_rope=reference.apply_rope,
    swiglu=reference.swiglu,
    causal_mask=reference.causal_mask,
    causal_attention=reference.causal_attention,
    plan_attention=reference.plan_attention,
    write_kv=reference.write_kv,
    paged_attention=reference.paged_attention,
)


def choose_ops(device: torch.device, dtype: torch.dtype) -> tuple[Ops, dict[str, str]]:
    """The ops for a device, and for each the chosen variant with its reason."""
    additive = device.type == "cpu"
    matmul = device.type == "cpu" and dtype == torch.bfloat16
    ops = Ops(
        rms_norm=native.rms_norm,
        apply_rope=native.apply_rope,
        swiglu=native.swiglu,
        causal_mask=reference.causal_mask,
        causal_attention=native.causal_attention_matmul if matmul else native.causal_attention,
        plan_attention=native.plan_attention_additive if additive else reference.plan_attention,
        write_kv=native.write_kv,
        paged_attention=native.paged_attention,
    )
    return ops, {
        "rms_norm": "torch rms_norm: one call where the plain form makes six",
        "apply_rope": "roll and addcmul in fp32: three kernels where the plain form makes six",
        "swiglu": "torch silu",
        "causal_mask": "boolean, once a forward for all layers of a window; none at all where tokens just see all before",
        "causal_attention": "two bf16 products where the scores are few: 5 times as fast as the CPU's fused kernel"
        if matmul
        else "torch scaled_dot_product_attention: never holds the scores",
        "plan_attention": "additive mask: the CPU kernel would convert a boolean one in each layer"
        if additive
        else "boolean mask: the form that fused attention kernels take",
        "write_kv": "torch index_copy_",
        "paged_attention": "gather and torch scaled_dot_product_attention, one read of the keys per group of heads",
    }
