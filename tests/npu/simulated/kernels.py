"""The kernel behind almost every operator: look at the arguments from the host, run the CPU operator, take it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from tests.npu.simulated.graph import Recorder
from tests.npu.simulated.memory import Memory
from tests.npu.simulated.statistics import Statistics
from tests.npu.simulated.tensors import CPU, check_device, host_view, is_on_device, resize, to_device

INDEXING = {"aten::index", "aten::_index_put_impl_"}  # these take their indices from the host, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What an operator's schema and tags say about it."""

    name: str
    is_view: bool
    draws: bool
    """It draws random numbers."""
    reads_values: bool
    """The host needs values from the device to go on: it returns a number, or its output shape depends on them."""
    tensor_positions: tuple[int, ...]
    """Arguments that must be tensors, though the dispatcher hands over a plain number where one was made of it."""
    out_names: tuple[str, ...]


@cache
def traits_of(op: OpOverload) -> Traits:
    schema = op._schema
    dynamic = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    takes_numbers = torch._C._should_allow_numbers_as_tensors(schema.name.removeprefix("aten::"))
    tensors = [] if takes_numbers else [i for i, a in enumerate(schema.arguments) if str(a.type) == "Tensor"]
    out_names = [a.name for a in schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write]
    return Traits(
        name=schema.name,
        is_view=any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns),
        draws=torch.Tag.nondeterministic_seeded in op.tags,
        reads_values=bool(dynamic & set(op.tags)) and schema.name not in INDEXING,
        tensor_positions=tuple(tensors),
        out_names=tuple(out_names),
    )


class Translation:
    """The arguments of one call as the host sees them, and the way back to the device tensors they stand for."""

    def __init__(self) -> None:
        self.num_host_tensors = 0
        self._devices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the host view is kept: its id stays its own

    @property
    def has_device_tensors(self) -> bool:
        return bool(self._devices)

    def to_host(self, value: Any) -> Any:
        if is_on_device(value):
            return self.stand_in(host_view(value), value)
        if isinstance(value, torch.Tensor) and value.dim() > 0 and id(value) not in self._devices:
            self.num_host_tensors += 1  # a CPU tensor without dimensions is a number, allowed everywhere
        if isinstance(value, torch.device) and value.type == "npu":
            check_device(value)
            return CPU
        return value

    def stand_in(self, host: torch.Tensor, device: torch.Tensor) -> torch.Tensor:
        self._devices[id(host)] = host, device
        return host

    def to_device(self, memory: Memory, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        known = self._devices.get(id(value))
        return known[1] if known else to_device(memory, value)


class HostKernels:
    """Runs the operators of the device."""

    def __init__(self, memory: Memory, statistics: Statistics, recorder: Recorder, generator: torch.Generator) -> None:
        self.memory = memory
        self.statistics = statistics
        self.recorder = recorder
        self.generator = generator

    def run(self, op: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """The dispatcher's fallback. Raises RuntimeError for tensors on several devices, HostSyncError under a ban."""
        traits = traits_of(op)
        self._count(traits, args)
        translation = Translation()
        host_kwargs, unsized = self._host_kwargs(traits, kwargs, translation)
        host_args = _numbers_to_tensors(traits, tree_map(translation.to_host, args))
        self._check_devices(traits, translation)
        own_numbers = traits.draws and kwargs.get("generator") is None
        with torch.no_grad(), _stream_of(self.generator) if own_numbers else nullcontext():
            host_result = op(*host_args, **host_kwargs)
        for host, device in unsized:
            self._fill(device, host)
        result = tree_map(partial(translation.to_device, self.memory), host_result)
        self.recorder.record(partial(self.run, op), args, kwargs, result)
        return result

    def _count(self, traits: Traits, args: tuple[Any, ...]) -> None:
        if traits.is_view:
            raise NotImplementedError(f"the simulated npu has no kernel for the view {traits.name}")
        self.statistics.calls[traits.name] += 1
        if traits.reads_values or (traits.name in INDEXING and _has_mask(args[1])):
            self.statistics.sync(traits.name)

    def _host_kwargs(
        self, traits: Traits, kwargs: Mapping[str, Any], translation: Translation
    ) -> tuple[dict[str, Any], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Keyword arguments for the host, and the (host, device) pairs of `out=` tensors that the operator sizes."""
        host_kwargs, unsized = dict(kwargs), []
        for name in traits.out_names:
            out = kwargs.get(name)
            if is_on_device(out) and out.numel() == 0:
                host_kwargs[name] = translation.stand_in(torch.empty(0, dtype=out.dtype), out)
                unsized.append((host_kwargs[name], out))
        return tree_map(translation.to_host, host_kwargs), unsized

    def _check_devices(self, traits: Traits, translation: Translation) -> None:
        if not (translation.has_device_tensors and translation.num_host_tensors):
            return
        if traits.name not in INDEXING:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, npu:0 and cpu! "
                f"(in {traits.name})"
            )
        self.recorder.refuse_host_copy()
        for _ in range(translation.num_host_tensors):
            self.statistics.host_copy("upload", blocking=True)

    def _fill(self, device: torch.Tensor, host: torch.Tensor) -> None:
        resize(self.memory, device, host.size())
        if host.numel():
            host_view(device).copy_(host)


@contextmanager
def _stream_of(generator: torch.Generator) -> Iterator[None]:
    """Let the CPU operator draw from the device's stream of random numbers, not from the host's."""
    host_state = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(host_state)


def _numbers_to_tensors(traits: Traits, args: tuple[Any, ...]) -> list[Any]:
    result = list(args)
    for position in traits.tensor_positions:
        if position < len(args) and isinstance(args[position], (bool, int, float)):
            result[position] = torch.tensor(args[position])
    return result


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in tree_leaves(indices))
