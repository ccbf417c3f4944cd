"""Graphs: a capture records the device calls of its body with the very same tensors; a replay runs them again.

Simulated: fixed addresses (a replay reads what was copied into the captured tensors, and overwrites the captured
results), the ban on host syncs and on host copies during a capture.
Not simulated: a memory pool of the graph's own, `update()` of host-side lengths, capture of other streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tests.npu.simulated.statistics import HostSyncError, Statistics
from tests.npu.simulated.tensors import host_view, is_on_device

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class RecordedCall:
    kernel: Kernel
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    def repeat(self) -> None:
        """Compute anew and write over the captured result, where the call did not work in place."""
        fresh = self.kernel(*self.args, **self.kwargs)
        for new, captured in zip(tree_leaves(fresh), tree_leaves(self.result), strict=True):
            if is_on_device(captured) and new is not captured:
                host_view(captured).copy_(host_view(new))


class Recorder:
    """Which graph is being captured, if any."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] | None = None

    @property
    def is_capturing(self) -> bool:
        return self.calls is not None

    def record(self, kernel: Kernel, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if self.calls is not None:
            self.calls.append(RecordedCall(kernel, args, kwargs, result))

    def refuse_host_copy(self) -> None:
        if self.is_capturing:
            raise HostSyncError("a copy between host and device is forbidden in a graph capture")


class NPUGraph:
    """`torch.npu.NPUGraph`, for one stream."""

    def __init__(self, recorder: Recorder, statistics: Statistics) -> None:
        self.calls: list[RecordedCall] = []
        self._recorder = recorder
        self._statistics = statistics
        self._capture = ExitStack()

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        if self._recorder.is_capturing:
            raise RuntimeError("a graph capture is under way already")
        self.calls = self._recorder.calls = []
        self._capture.enter_context(self._statistics.forbid_host_sync("a graph capture"))

    def capture_end(self) -> None:
        self._recorder.calls = None
        self._capture.close()

    def replay(self) -> None:
        self._statistics.replays += 1
        calls_before = self._statistics.calls.copy()
        with torch.no_grad():
            for call in self.calls:
                call.repeat()
        self._statistics.calls = calls_before

    def reset(self) -> None:
        self.calls = []


class graph:
    """`torch.npu.graph`: capture the body."""

    def __init__(self, npu_graph: NPUGraph, pool: object = None, capture_error_mode: str = "global") -> None:
        self._graph = npu_graph

    def __enter__(self) -> None:
        self._graph.capture_begin()

    def __exit__(self, *exception: object) -> None:
        self._graph.capture_end()
