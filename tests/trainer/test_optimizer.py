from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from trainer.adamw_8bit import AdamW8bit
from trainer.optimizer import UpdatesInBackward, build_optimizer, clip_gradients, set_learning_rate
from trainer.option_groups import OptimizerConfig

NAMES = ("adamw", "adamw_8bit", "sgd", "adafactor")


def parameters_with_gradients() -> list[Parameter]:
    parameters = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(3))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_decay(name: Any) -> None:
    matrix, vector = parameters_with_gradients()
    optimizer = build_optimizer([matrix, vector], OptimizerConfig(name=name), weight_decay=0.5)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.95))
    assert torch.equal(vector, torch.ones(3))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("adamw_8bit", AdamW8bit),
        ("sgd", torch.optim.SGD),
        ("adafactor", torch.optim.Adafactor),
    ],
)
def test_a_name_is_an_optimizer_with_the_numbers_given(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    config = OptimizerConfig(name=name, betas=(0.7, 0.8), eps=1e-3, momentum=0.6)
    optimizer = build_optimizer(parameters_with_gradients(), config, weight_decay=0.0)
    assert isinstance(optimizer, kind)
    for group in optimizer.param_groups:
        assert group.get("momentum", 0.6) == 0.6
        if "betas" in group:
            assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-3)


def trained(name: Any, *, in_backward: bool) -> tuple[list[Tensor], list[float], dict[str, Any]]:
    """Weights after four steps, the gradients' norms, and the optimizer's state."""
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 100)
    net = nn.Sequential(nn.Linear(100, 100), nn.LayerNorm(100))
    parameters = [*embedding.parameters(), *net.parameters()]
    optimizer = build_optimizer(parameters, OptimizerConfig(name=name, momentum=0.5), weight_decay=0.1)
    updates = UpdatesInBackward(optimizer) if in_backward else None
    norms = []
    for step in range(4):
        set_learning_rate(optimizer, 0.01 * (step + 1))
        hidden = net(embedding(torch.randint(50, (30,))))
        loss = (hidden @ embedding.weight.T).square().mean()  # tied: two gradients in one parameter
        loss.backward()
        if updates is not None:
            assert all(parameter.grad is None for parameter in parameters)
            norms.append(updates.norm().item())
        else:
            norms.append(clip_gradients(parameters, None).item())
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in parameters], norms, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_the_backward_pass_are_the_same_steps(name: str) -> None:
    plain, norms, state = trained(name, in_backward=False)
    early, early_norms, early_state = trained(name, in_backward=True)
    assert all(map(torch.equal, plain, early))
    assert early_norms == pytest.approx(norms, rel=1e-5)
    assert early_state["param_groups"] == state["param_groups"]
    for index, values in state["state"].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(early_state["state"][index][key]), torch.as_tensor(value))


def test_steps_in_the_backward_pass_hold_one_gradient_at_a_time() -> None:
    """Each layer's gradient is gone before the next one's comes."""
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    parameters = list(layers.parameters())
    alive: list[int] = []
    for parameter in parameters:  # these hooks run before the updates
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in parameters))
        )
    UpdatesInBackward(build_optimizer(parameters, OptimizerConfig(), weight_decay=0.0))
    layers(torch.ones(2, 8)).sum().backward()
    assert alive == [1] * 5


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
