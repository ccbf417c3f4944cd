"""A stand-in for the engine client where only the loading of weights matters."""

from __future__ import annotations

import asyncio

from service.engine.messages import EngineReady, LoadModel, ModelLoaded
from service.engine_client import EngineUnavailable, ModelLoadError

READY = EngineReady(
    device="cpu",
    device_name="cpu",
    device_reason="test",
    dtype="fp32",
    dtype_reason="test",
    ops={},
    max_model_len=64,
    max_num_seqs=4,
    block_size=16,
    num_blocks=8,
    peak_bandwidth=1e9,
    peak_bandwidth_source="assumed",
    torch_version="2",
)


class StubEngine:
    """Keeps what it was told to load. `broken` entries are refused, `deadly` ones kill it."""

    def __init__(self) -> None:
        self.ready: EngineReady | None = READY
        self.commands: list[LoadModel] = []
        self.held: list[str] = []
        self.broken: set[str] = set()
        self.deadly: set[str] = set()
        self._loading = 0

    async def load_model(self, command: LoadModel, /) -> ModelLoaded:
        assert self._loading == 0, "two loads at once"
        self.commands.append(command)
        self._loading += 1
        await asyncio.sleep(0.01)
        self._loading -= 1
        if self.ready is None or command.model_id in self.deadly:
            self.ready, self.held = None, []
            raise EngineUnavailable("the engine died")
        if command.model_id in self.broken:
            raise ModelLoadError("missing tensor")
        if command.replaces is not None:
            self.held.remove(command.replaces)
        self.held.append(command.model_id)
        weights_hash = f"hash of {command.model_id}"
        return ModelLoaded(
            model_id=command.model_id, weights_hash=weights_hash, weight_bytes=10, seconds=0.01, mode="overlap"
        )

    async def unload_model(self, model_id: str, /) -> None:
        self.held.remove(model_id)
