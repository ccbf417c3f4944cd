"""Capture and replay."""

from __future__ import annotations

import pytest
import torch

from tests.npu.simulated.device import SimulatedNpu
from tests.npu.simulated.statistics import HostSyncError


def test_a_replay_reads_the_captured_input_and_writes_the_captured_output(npu: SimulatedNpu) -> None:
    x, total = torch.ones(3, device="npu"), torch.zeros(3, device="npu")
    graph = npu.module.NPUGraph()
    with npu.module.graph(graph):
        result = (x * 2).clamp(max=5)
        total.add_(result)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    npu.statistics.reset()
    graph.replay()
    assert result.cpu().tolist() == [2.0, 4.0, 5.0]
    assert total.cpu().tolist() == [4.0, 6.0, 7.0]
    assert npu.statistics.replays == 1
    assert not npu.statistics.calls


def test_a_warm_up_runs_on_a_side_stream(npu: SimulatedNpu) -> None:
    stream, event = npu.module.Stream(), npu.module.Event(enable_timing=True)
    stream.wait_stream(npu.module.current_stream())
    with npu.module.stream(stream):
        assert npu.module.current_stream() is stream
        event.record()
    assert npu.module.current_stream() is not stream
    npu.module.current_stream().wait_event(event)
    assert event.elapsed_time(npu.module.current_stream().record_event()) >= 0


def test_a_capture_refuses_what_a_replay_cannot_repeat(npu: SimulatedNpu) -> None:
    x = torch.ones(3, device="npu")
    for forbidden in (x.sum().item, x.cpu, lambda: x.copy_(torch.ones(3)), lambda: x[x > 1]):
        with pytest.raises(HostSyncError, match="graph capture"), npu.module.graph(npu.module.NPUGraph()):
            forbidden()
    assert not npu.module.is_current_stream_capturing()
    assert x.sum().item() == 3
