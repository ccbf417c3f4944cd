from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.dpo_loss import answer_log_probs, preference_loss

N, H, V, ROWS = 23, 8, 31, 4


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, torch.randint(ROWS - 1, (N,), generator=generator)  # the last row has none


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    log_probs = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), targets]
    return torch.zeros(ROWS).index_add(0, rows, log_probs)


def weighted(sums: Tensor) -> Tensor:
    """Each row counts differently, as pairs do."""
    return (sums * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum()


@pytest.mark.parametrize("rows_at_a_time", [1, 5, 100])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_log_probs_of_answers_and_their_gradients_are_those_of_all_logits_at_once(
    rows_at_a_time: int, frozen_head: bool
) -> None:
    hidden, weight, targets, rows = inputs()
    expected = plain(hidden, weight, targets, rows)
    wanted = torch.autograd.grad(weighted(expected), (hidden, weight))
    weight.requires_grad_(not frozen_head)
    options = {"num_rows": ROWS, "max_logits_bytes": rows_at_a_time * V * 4}
    found = answer_log_probs(hidden, weight, targets, rows, **options)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(answer_log_probs(hidden, weight, targets, rows, **options), expected)
    trained = (hidden,) if frozen_head else (hidden, weight)
    for gradient, theirs in zip(torch.autograd.grad(weighted(found), trained), wanted, strict=False):
        torch.testing.assert_close(gradient, theirs)


def test_the_logits_are_of_the_hidden_states_type_and_the_sums_fp32() -> None:
    hidden, weight, targets, rows = inputs()
    found = answer_log_probs(hidden.bfloat16(), weight, targets, rows, num_rows=ROWS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(hidden, weight, targets, rows), rtol=0.05, atol=0.5)
    gradients = torch.autograd.grad(weighted(found), (hidden, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_paper(label_smoothing: float) -> None:
    chosen, rejected = torch.tensor([-3.0, -10.0]), torch.tensor([-5.0, -8.0])
    reference = torch.tensor([-4.0, -9.0, -4.0, -9.0])
    preference = preference_loss(torch.cat([chosen, rejected]), reference, beta=0.5, label_smoothing=label_smoothing)
    margins = torch.tensor([0.5 * (1 - -1), 0.5 * (-1 - 1)])
    torch.testing.assert_close(preference.margins, margins)
    expected = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    torch.testing.assert_close(preference.losses, expected)


def test_the_gradient_raises_the_chosen_answer_and_lowers_the_rejected_one() -> None:
    policy = torch.zeros(4, requires_grad=True)
    preference_loss(policy, torch.zeros(4), beta=0.2).losses.sum().backward()
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, torch.tensor([-0.1, -0.1, 0.1, 0.1]))  # beta * sigmoid(0)
