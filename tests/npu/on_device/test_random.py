"""Random numbers: a stream of the device's own, seeded with the rest."""

from __future__ import annotations

import torch

from tests.npu.simulated.device import SimulatedNpu


def draw() -> torch.Tensor:
    return torch.cat([torch.randn(3, device="npu"), torch.nn.functional.dropout(torch.ones(8, device="npu"))]).cpu()


def test_one_seed_gives_the_same_numbers_again() -> None:
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_the_device_does_not_advance_the_stream_of_the_host() -> None:
    torch.manual_seed(1)
    draw()
    after_device = torch.randn(3)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(3), after_device)


def test_the_state_can_be_kept_and_set_back(npu: SimulatedNpu) -> None:
    state = npu.module.get_rng_state()
    first = draw()
    npu.module.set_rng_state(state)
    assert torch.equal(draw(), first)


def test_the_state_that_activation_checkpointing_restores_is_the_devices() -> None:
    x = torch.ones(64, device="npu", requires_grad=True)
    seen = []

    def block(x: torch.Tensor) -> torch.Tensor:
        dropped = torch.nn.functional.dropout(x * 2)
        seen.append(dropped.detach().cpu())
        return dropped.sin()

    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)
