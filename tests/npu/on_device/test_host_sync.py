"""Every way to make the host wait is counted, and stopped where a test forbids it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.npu.simulated.device import SimulatedNpu
from tests.npu.simulated.statistics import HostSyncError

WAYS_TO_WAIT: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.argmax()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu", torch.float64),
    "copy into a host tensor": lambda x: torch.empty(4).copy_(x),
    "tensor of numbers": lambda x: torch.tensor([1.0], device=x.device),
    "to the device": lambda x: torch.ones(3).to(x.device),
    "index on the host": lambda x: x[torch.tensor([1, 2])],
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 1),
    "read by mask": lambda x: x[x > 1],
    "write by mask": lambda x: x.index_put_((x > 1,), torch.ones(2, device="npu")),
    "where without branches": lambda x: torch.where(x > 1),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
    "synchronize": lambda x: torch.get_device_module("npu").synchronize(),
    "stream": lambda x: torch.get_device_module("npu").current_stream().synchronize(),
    "event": lambda x: torch.get_device_module("npu").current_stream().record_event().synchronize(),
    "print": repr,
}


def four() -> torch.Tensor:
    return torch.arange(4.0).to("npu")


@pytest.mark.parametrize("name", WAYS_TO_WAIT)
def test_a_host_sync_is_counted_and_can_be_forbidden(name: str, npu: SimulatedNpu) -> None:
    x = four()
    WAYS_TO_WAIT[name](x)
    assert npu.statistics.syncs.total() >= 1
    with pytest.raises(HostSyncError), npu.statistics.forbid_host_sync("a test"):
        WAYS_TO_WAIT[name](x)


def test_work_on_the_device_is_no_host_sync(npu: SimulatedNpu) -> None:
    x = four()
    host = torch.ones(4)
    npu.statistics.reset()
    with npu.statistics.forbid_host_sync("a test", uploads=1):
        y = torch.where(x > 1, x * x.sum(), x.argmax())
        x[torch.zeros(1, dtype=torch.int64, device="npu")] = y[:1]
        torch.topk(y.softmax(-1).cumsum(-1), 2).indices.gather(0, torch.zeros(1, dtype=torch.int64, device="npu"))
        x.copy_(host, non_blocking=True)
    assert not npu.statistics.syncs


def test_a_ban_leaves_as_many_copies_as_it_says(npu: SimulatedNpu) -> None:
    x, host = four(), torch.ones(4)
    npu.statistics.reset()
    with npu.statistics.forbid_host_sync("a step", uploads=1, downloads=1):
        x.copy_(host)
        x.cpu()
        with pytest.raises(HostSyncError, match="one download more than allowed in a step"):
            x.cpu()
        with pytest.raises(HostSyncError, match="one upload more than allowed in a step"):
            x.copy_(host)
    assert npu.statistics.copies == {"upload": 1, "download": 1}


def test_copies_are_counted_by_direction(npu: SimulatedNpu) -> None:
    x = four()
    x.clone()
    torch.empty(4).copy_(x, non_blocking=True)
    assert npu.statistics.copies == {"upload": 1, "move": 1, "download": 1}
    assert npu.statistics.syncs == {"upload": 1}


def test_calls_are_counted_by_operator(npu: SimulatedNpu) -> None:
    x = four()
    npu.statistics.reset()
    (x + x).mul_(2).view(2, 2).t()
    assert npu.statistics.calls == {"aten::add": 1, "aten::mul": 1}
