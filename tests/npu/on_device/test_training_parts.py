"""Autograd, autocast and AdamW on the device agree with the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 8),
        torch.nn.Linear(8, 16),
        torch.nn.SiLU(),
        torch.nn.RMSNorm(16),
        torch.nn.Linear(16, 11),
    )


def losses(model: torch.nn.Module, *, device: str, autocast: bool = False, steps: int = 4) -> list[float]:
    """A few AdamW steps on one batch."""
    model = copy.deepcopy(model).to(device)
    ids = torch.arange(11, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    result = []
    for _ in range(steps):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(ids), ids.roll(1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return result


def test_gradients_are_those_of_the_cpu() -> None:
    model = network()
    twin = copy.deepcopy(model).to("npu")
    ids = torch.arange(11)
    F.cross_entropy(model(ids), ids).backward()
    F.cross_entropy(twin(ids.to("npu")), ids.to("npu")).backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.device.type == "npu"
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


def test_adamw_learns_as_on_the_cpu() -> None:
    ours, theirs = losses(network(), device="npu"), losses(network(), device="cpu")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < ours[0]


def test_autocast_learns_close_to_fp32() -> None:
    ours, exact = losses(network(), device="npu", autocast=True), losses(network(), device="cpu")
    assert ours != exact
    assert ours == pytest.approx(exact, rel=2e-2)


def test_autocast_computes_matmuls_in_the_low_precision_and_softmax_in_fp32() -> None:
    x = torch.ones(2, 2, device="npu")
    with torch.autocast("npu", dtype=torch.bfloat16):
        product = x @ x
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
        assert F.linear(x, x).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_the_default_of_autocast_is_float16_as_in_torch_npu() -> None:
    x = torch.ones(2, 2, device="npu")
    with torch.autocast("npu"):
        assert (x @ x).dtype == torch.float16
