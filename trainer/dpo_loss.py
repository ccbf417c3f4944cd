"""The loss of Direct Preference Optimization (Rafailov et al., 2023), and the log probabilities of answers it is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer.loss import MAX_LOGITS_BYTES, add_product


@dataclass(frozen=True, slots=True)
class Preference:
    """Of P pairs; all tensors (P,), fp32."""

    losses: Tensor
    margins: Tensor
    """By how much the reward of the preferred answer is the higher one; no gradient."""


def preference_loss(policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Preference:
    """Both (2 P,) fp32: the log probabilities of the chosen answers, then those of the rejected ones.

    The reward of an answer is beta * (policy - reference). The loss is that of a classifier of which answer was
    chosen, by the difference of rewards, where a share of `label_smoothing` of the pairs is taken the other way round
    (Mitchell's conservative DPO).
    """
    chosen, rejected = (beta * (policy - reference)).chunk(2)
    margins = chosen - rejected
    losses = -F.logsigmoid(margins) * (1 - label_smoothing)
    if label_smoothing:
        losses = losses - F.logsigmoid(-margins) * label_smoothing
    return Preference(losses, margins.detach())


def answer_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    *,
    num_rows: int,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> Tensor:
    """(num_rows,) fp32: for each row the sum of log softmax(hidden @ weight.T)[target] over its trained tokens.

    `hidden` (N, H) holds the trained positions of all rows, `targets` (N,) their tokens, `rows` (N,) whose each is;
    `weight` (V, H) is the output matrix. At most `max_logits_bytes` of fp32 logits exist at a time.
    """
    size = max(1, max_logits_bytes // (4 * weight.shape[0]))
    if torch.is_grad_enabled():
        log_probs: Tensor = _LogProbs.apply(hidden, weight, targets, size)  # type: ignore[no-untyped-call]
    else:
        head = weight.to(hidden.dtype)
        pieces = zip(hidden.split(size), targets.split(size), strict=True)
        log_probs = torch.cat([_chosen((h @ head.T).float().log_softmax(-1), t) for h, t in pieces])
    return torch.zeros(num_rows, device=hidden.device).index_add(0, rows, log_probs)


class _LogProbs(torch.autograd.Function):
    """(N,) log probabilities of the targets.

    How much each token counts is known only when all of them are. A frozen output matrix needs no gradient, and then
    each token's row of the other gradient is made in the forward pass and scaled in the backward pass. Else the
    logits are computed again there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
        head = weight.to(hidden.dtype)
        recompute = ctx.needs_input_grad[1]
        grad_hidden = None if recompute else torch.empty_like(hidden)
        chosen = []
        for start in range(0, len(hidden), size):
            place = slice(start, start + size)
            log_probs = (hidden[place] @ head.T).float().log_softmax(-1)  # (size, V)
            chosen.append(_chosen(log_probs, targets[place]))
            if grad_hidden is not None:
                torch.mm(_grad_logits(log_probs, targets[place]).to(hidden.dtype), head, out=grad_hidden[place])
        ctx.size, ctx.grad_hidden = size, grad_hidden
        if recompute:
            ctx.save_for_backward(hidden, weight, targets)
        return torch.cat(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if ctx.grad_hidden is not None:
            grad_hidden, ctx.grad_hidden = ctx.grad_hidden, None
            return grad_hidden.mul_(grad[:, None]), None, None, None
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), ctx.size):
            place = slice(start, start + ctx.size)
            log_probs = (hidden[place] @ head.T).float().log_softmax(-1)
            grad_logits = (_grad_logits(log_probs, targets[place]) * grad[place, None]).to(hidden.dtype)
            torch.mm(grad_logits, head, out=grad_hidden[place])
            add_product(grad_weight, grad_logits.T, hidden[place])
        return grad_hidden, grad_weight, None, None


def _chosen(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(1, targets[:, None])[:, 0]


def _grad_logits(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the targets' log probabilities by the logits, in the memory of `log_probs`."""
    target = targets[:, None]
    return log_probs.exp_().neg_().scatter_add_(1, target, torch.ones_like(target, dtype=log_probs.dtype))
