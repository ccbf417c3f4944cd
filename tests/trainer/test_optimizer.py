from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from trainer.optimizer import build_optimizer, clip_gradients, set_learning_rate


def parameters_with_gradients() -> list[Parameter]:
    parameters = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(3))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def test_only_matrices_decay() -> None:
    matrix, vector = parameters_with_gradients()
    optimizer = build_optimizer([matrix, vector], weight_decay=0.5)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.95))
    assert torch.equal(vector, torch.ones(3))


def test_a_large_gradient_is_scaled_down_and_its_norm_before_is_returned() -> None:
    matrix, vector = parameters_with_gradients()
    matrix.grad, vector.grad = torch.full((2, 2), 2.0), torch.zeros(3)
    assert clip_gradients([matrix, vector], max_norm=1.0).item() == pytest.approx(4.0)
    assert torch.allclose(matrix.grad, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("max_norm", [None, 100.0])
def test_a_gradient_within_the_bound_stays(max_norm: float | None) -> None:
    matrix, vector = parameters_with_gradients()
    vector.grad = torch.tensor([3.0, 0.0, 4.0])
    assert clip_gradients([matrix, vector], max_norm=max_norm).item() == pytest.approx(5.0)
    assert torch.equal(vector.grad, torch.tensor([3.0, 0.0, 4.0]))


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    matrix, vector = parameters_with_gradients()
    vector.grad = torch.tensor([0.0, float("nan"), 0.0])
    assert clip_gradients([matrix, vector], max_norm=1.0).isnan()
