"""The optimizers over what is trained, and the gradient's norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from trainer.adamw_8bit import AdamW8bit
from trainer.option_groups import OptimizerConfig

FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(
    parameters: Sequence[Parameter], config: OptimizerConfig, *, weight_decay: float
) -> torch.optim.Optimizer:
    """Decay is on matrices only; norms and biases are left out. The caller sets the rate each step."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match config.name:
        case "adamw":
            fused = all(p.device.type in FUSED_DEVICES for p in parameters)
            return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)
        case "adamw_8bit":
            return AdamW8bit(groups, lr=0.0, betas=config.betas, eps=config.eps)
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=0.0)


class UpdatesInBackward:
    """Makes each parameter's step as soon as its gradient is complete, and frees the gradient.

    The optimizer stays what it was, with its groups and its state; its own `step` finds nothing left to do. The rate
    has to be set before the backward pass, of which there is one a step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._squares: list[Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update, group))

    def norm(self) -> Tensor:
        """The norm of all gradients since the last call, on the device."""
        norm = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return norm

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        self._squares.append(parameter.grad.float().square().sum())
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None


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
