"""Capacity, accounting, fresh memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.npu.simulated.device import SimulatedNpu

MEBIBYTE = 1 << 20


def test_memory_is_counted_while_a_tensor_lives(npu: SimulatedNpu) -> None:
    before = npu.module.memory_allocated()
    block = torch.empty(MEBIBYTE // 4, device="npu")
    view = block[1:]
    del block
    assert npu.module.memory_allocated() - before == MEBIBYTE
    del view
    assert npu.module.memory_allocated() == before


def test_sizes_are_rounded_to_512_bytes(npu: SimulatedNpu) -> None:
    before = npu.module.memory_allocated()
    block = torch.empty(513, dtype=torch.uint8, device="npu")
    assert npu.module.memory_allocated() - before == 1024
    del block


def test_the_peak_stays_until_it_is_reset(npu: SimulatedNpu) -> None:
    before = npu.module.memory_allocated()
    torch.empty(MEBIBYTE, dtype=torch.uint8, device="npu")
    assert npu.module.max_memory_allocated() == before + MEBIBYTE
    npu.module.reset_peak_memory_stats()
    assert npu.module.max_memory_allocated() == before


def test_freed_memory_stays_reserved_until_the_cache_is_emptied(npu: SimulatedNpu) -> None:
    npu.module.empty_cache()
    free, total = npu.module.mem_get_info()
    torch.empty(MEBIBYTE, dtype=torch.uint8, device="npu")
    assert npu.module.mem_get_info() == (free - MEBIBYTE, total)
    npu.module.empty_cache()
    assert npu.module.mem_get_info() == (free, total)


def test_beyond_the_capacity_is_an_out_of_memory_error(npu: SimulatedNpu) -> None:
    npu.memory.capacity = npu.memory.allocated + MEBIBYTE
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.zeros(MEBIBYTE, device="npu")
    assert torch.zeros(MEBIBYTE // 8, device="npu").sum().item() == 0
    assert npu.module.memory_stats()["num_ooms"] == npu.memory.num_ooms


def test_a_thread_must_choose_the_device_before_it_works_on_it(npu: SimulatedNpu) -> None:
    def choose_and_work() -> torch.Tensor:
        npu.module.set_device("npu:0")
        return torch.zeros(1, device="npu")

    with ThreadPoolExecutor(max_workers=1) as executor:
        with pytest.raises(RuntimeError, match="107002"):
            executor.submit(lambda: torch.zeros(1, device="npu")).result()
        assert executor.submit(choose_and_work).result().item() == 0


def test_fresh_memory_is_garbage() -> None:
    assert torch.empty(100, device="npu").isnan().all().item()
    assert torch.empty(100, device="npu", dtype=torch.bfloat16).isnan().all().item()
    assert torch.empty(1, device="npu", dtype=torch.int32).item() == -1
