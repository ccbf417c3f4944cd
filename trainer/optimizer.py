"""AdamW over what is trained, and the gradient's norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(parameters: Sequence[Parameter], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decoupled decay on matrices only; norms and biases are left out. The caller sets the rate each step."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED_DEVICES for p in parameters)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients down to the global norm `max_norm`, if given. Returns the norm before, on the device."""
    trained = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in trained if p.grad is not None])
    if max_norm is not None:
        clip_grads_with_norm_(trained, max_norm, norm)
    return norm
