from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from trainer.adamw_8bit import BLOCK, CHUNK, FIRST, MIN_SIZE, SECOND, AdamW8bit, Code

MakeOptimizer = Callable[[Iterable[Parameter]], torch.optim.Optimizer]


def train(make: MakeOptimizer, num_steps: int) -> list[float]:
    """Losses of a small network that learns another one."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(32, 160), nn.GELU(), nn.Linear(160, 32))
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).requires_grad_(False)
    optimizer = make(student.parameters())
    losses = []
    for _ in range(num_steps):
        x = torch.randn(64, 32)
        loss = (student(x) - teacher(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_it_learns_as_adamw_does() -> None:
    exact = train(lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.01), 300)
    small = train(lambda p: AdamW8bit(p, lr=2e-3, weight_decay=0.01), 300)
    assert small[0] == exact[0] > 10 * exact[-1]
    assert small[-1] == pytest.approx(exact[-1], rel=0.03)
    assert small[50] == pytest.approx(exact[50], rel=0.03)


def test_the_first_step_and_small_parameters_are_those_of_adamw() -> None:
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    torch.manual_seed(0)
    for size, num_steps in ((MIN_SIZE + 300, 1), (MIN_SIZE - 1, 5)):
        ours, theirs = (Parameter(torch.linspace(-1, 1, size)) for _ in range(2))
        optimizers = AdamW8bit([ours], **options), torch.optim.AdamW([theirs], **options)  # type: ignore[arg-type]
        for _ in range(num_steps):
            gradient = torch.randn(size)
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [MIN_SIZE, CHUNK + BLOCK + 5])
def test_the_moments_take_little_more_than_a_byte_a_value(size: int) -> None:
    parameter = Parameter(torch.zeros(size))
    parameter.grad = torch.ones(size)
    optimizer = AdamW8bit([parameter], lr=0.5, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(parameter, torch.full((size,), -0.5))  # the last block, not whole, included
    num_bytes = sum(tensor.nbytes for tensor in optimizer.state[parameter].values())
    assert num_bytes <= 2 * size * (1 + 4 / BLOCK) + 2 * (BLOCK + 4) + 4


@pytest.mark.parametrize("code", [FIRST, SECOND], ids=["first", "second"])
def test_values_are_kept_on_average_and_nearly_each_time(code: Code) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(8, BLOCK, generator=generator) * torch.logspace(-3, 0, BLOCK)
    if code is FIRST:
        values *= torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    once, total = torch.zeros_like(values), torch.zeros_like(values)
    for dither in torch.linspace(0, 0.995, 200):
        once = code.decode(*code.encode(values, dither.expand_as(values)))
        total += once
    assert ((once - values).abs() <= 0.35 * values.abs() + 2e-5 * values.abs().amax(1, keepdim=True)).all()
    torch.testing.assert_close(total / 200, values, rtol=0.02, atol=1e-6)
    zeros = torch.zeros(1, BLOCK)
    assert torch.equal(code.decode(*code.encode(zeros, zeros)), zeros)


def test_a_second_moment_is_never_zero_beside_others() -> None:
    values = torch.zeros(1, BLOCK)
    values[0, 0] = 1.0
    decoded = SECOND.decode(*SECOND.encode(values, torch.zeros_like(values)))
    assert (decoded[0, 1:] > 0).all()
    assert decoded[0, 1:].max() < 1e-10
    assert decoded[0, 0] == 1


def test_a_second_moment_follows_gradients_that_change_slowly() -> None:
    """Each step moves it by a thousandth of itself: rounding to the nearest code would leave it where it is."""
    parameter = Parameter(torch.zeros(MIN_SIZE))
    optimizer = AdamW8bit([parameter], lr=0.0)
    scale = torch.linspace(0.5, 1.0, MIN_SIZE)
    exact = torch.zeros(MIN_SIZE)
    for step in range(1500):
        gradient = scale * (0.1 if step >= 300 else 1.0)
        gradient[::BLOCK] = 1.0  # keeps the blocks' scales
        exact.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        parameter.grad = gradient
        optimizer.step()
    state: dict[str, Tensor] = optimizer.state[parameter]
    found = SECOND.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"]).view(-1)
    assert exact[1] < 0.5 * exact[0]
    assert (found.mean() / exact.mean() - 1).abs() < 0.04
    assert ((found / exact - 1).abs() < 0.6).all()


def test_a_saved_state_goes_on_bit_by_bit() -> None:
    def state_after(num_steps: int, reload_at: int | None) -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(1)
        parameter = Parameter(torch.randn(100, 60))
        optimizer = AdamW8bit([parameter], lr=1e-2)
        for step in range(num_steps):
            if step == reload_at:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamW8bit([parameter], lr=1e-2)
                optimizer.load_state_dict(saved)
            parameter.grad = torch.randn(100, 60)
            optimizer.step()
        return parameter.detach(), optimizer.state_dict()["state"][0]

    (straight, state), (resumed, state_of_resumed) = state_after(7, None), state_after(7, 4)
    assert torch.equal(straight, resumed)
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "step": torch.float32,
        "exp_avg": torch.int8,
        "exp_avg_scale": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_scale": torch.float32,
    }
    assert all(torch.equal(state[name], state_of_resumed[name]) for name in state)
