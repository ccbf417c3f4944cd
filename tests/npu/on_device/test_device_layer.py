"""lm.device on the device: which card, which precision, its memory, its random numbers."""

from __future__ import annotations

import pytest
import torch

from lm.device import (
    choose_dtype,
    limit_memory,
    memory_figures,
    peak_bandwidth,
    reset_peak_memory,
    resolve_device,
    seed_everything,
    synchronize,
)
from lm.errors import UserError
from tests.npu.simulated.device import SimulatedNpu

NPU = torch.device("npu", 0)


@pytest.mark.parametrize("name", ["npu", "npu:0"])
def test_a_card_asked_for_is_found(name: str) -> None:
    choice = resolve_device(name)
    assert choice.device == NPU
    assert choice.name == "Ascend910B3"
    assert choice.reason == "asked for; 1 NPU device visible"


def test_auto_takes_the_card() -> None:
    choice = resolve_device("auto")
    assert choice.device == NPU
    assert choice.reason == "auto: 1 NPU device visible"


def test_the_cpu_can_still_be_asked_for() -> None:
    assert resolve_device("cpu").device == torch.device("cpu")


def test_a_second_card_is_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"'npu:1' cannot be used: 1 NPU device visible") as caught:
        resolve_device("npu:1")
    assert caught.value.param == "device"


def test_auto_computes_in_bf16() -> None:
    choice = choose_dtype("auto", NPU)
    assert (choice.name, choice.dtype) == ("bf16", torch.bfloat16)
    assert "npu" in choice.reason


def test_memory_figures_are_the_cards(npu: SimulatedNpu) -> None:
    reset_peak_memory(NPU)
    before = memory_figures(NPU)
    block = torch.empty(1 << 20, dtype=torch.uint8, device=NPU)
    held = memory_figures(NPU)
    del block
    after = memory_figures(NPU)
    assert held.allocated - before.allocated == 1 << 20
    assert after.allocated == before.allocated
    assert after.peak_allocated == after.peak_active == held.allocated
    assert held.total == npu.memory.capacity
    assert held.free == npu.memory.capacity - held.reserved


def test_a_seed_fixes_the_cards_random_numbers() -> None:
    seed_everything(3, NPU)
    first = torch.randn(4, device=NPU)
    seed_everything(3, NPU)
    assert torch.equal(torch.randn(4, device=NPU), first)


def test_waiting_for_the_card_is_a_host_sync(npu: SimulatedNpu) -> None:
    synchronize(NPU)
    assert npu.statistics.syncs == {"torch.npu.synchronize": 1}


def test_the_bandwidth_is_assumed_from_the_name() -> None:
    assert peak_bandwidth(NPU) == (1.6e12, "assumed")


def test_a_process_takes_no_more_of_the_card_than_its_share(npu: SimulatedNpu) -> None:
    figures = memory_figures(NPU)
    share = (figures.allocated + (1 << 20)) / figures.total
    limit_memory(NPU, share)
    with pytest.raises(torch.OutOfMemoryError, match="may be taken"):
        torch.zeros(1 << 19, device=NPU)
    assert torch.ones(1 << 17, device=NPU).sum().item() == 1 << 17
    assert memory_figures(NPU).total == figures.total  # it is a limit, not a smaller card
    limit_memory(NPU, 1.0)
    assert torch.ones(1 << 19, device=NPU).sum().item() == 1 << 19
