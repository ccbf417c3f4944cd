"""Cross entropy of trained tokens and how many are right, without the logits of all of them in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MAX_LOGITS_BYTES = 64 << 20


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, max_logits_bytes: int = MAX_LOGITS_BYTES
) -> tuple[Tensor, Tensor]:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], and the number of rows whose target no token exceeds.

    Both are fp32 scalars; the second has no gradient.

    `hidden` (N, H) holds trained positions only, `weight` (V, H) is the output matrix, `targets` (N,) int64. At most
    `max_logits_bytes` of fp32 logits exist at a time. Matrix products run in hidden's dtype. While gradients are
    recorded they are computed in the same pass, since keeping or recomputing the logits costs more; one backward only.
    """
    rows = max(1, max_logits_bytes // (4 * weight.shape[0]))
    if torch.is_grad_enabled():
        return _CrossEntropy.apply(hidden, weight, targets, rows)  # type: ignore[no-any-return, no-untyped-call]
    head = weight.to(hidden.dtype)
    losses, counts = [], []
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = (h @ head.T).float()
        losses.append(F.cross_entropy(logits, t, reduction="sum"))
        counts.append(_num_right(logits, logits.gather(1, t[:, None])))
    return torch.stack(losses).sum(), torch.stack(counts).sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        head = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        num_right = torch.zeros_like(loss)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        pieces = zip(hidden.split(rows), targets.split(rows), grad_hidden.split(rows), strict=True)
        for h, t, grad in pieces:
            log_probs = (h @ head.T).float().log_softmax(-1)  # (rows, V)
            target = t[:, None]
            chosen = log_probs.gather(1, target)
            loss -= chosen.sum()
            num_right += _num_right(log_probs, chosen)
            ones = torch.ones_like(target, dtype=log_probs.dtype)
            grad_logits = log_probs.exp_().scatter_add_(1, target, -ones).to(h.dtype)
            torch.mm(grad_logits, head, out=grad)
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, h)
        ctx.grads = grad_hidden, grad_weight
        ctx.mark_non_differentiable(num_right)
        return loss, num_right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        return grad_hidden.mul_(grad), None if grad_weight is None else grad_weight.mul_(grad), None, None


def _num_right(scores: Tensor, chosen: Tensor) -> Tensor:
    """How many rows of `scores` (N, V) have no higher value than their `chosen` (N, 1), fp32."""
    return (chosen[:, 0] >= scores.amax(-1)).sum(dtype=torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
