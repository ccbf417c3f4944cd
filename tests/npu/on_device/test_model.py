"""lm on the device: a checkpoint loads whole, the forward is that of the CPU, a decode step is capturable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lm.cache import KVCache, PagedBatch
from lm.checkpoint import load_weights, weights_hash
from lm.config import load_config
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE, Ops, choose_ops
from tests.npu.simulated.device import SimulatedNpu

BLOCK_SIZE = 4
NPU, CPU = torch.device("npu", 0), torch.device("cpu")
TOKENS = [[5, 9, 42, 7, 3, 100, 41], [8, 77, 6, 5, 20, 21, 22]]


def load(folder: Path, device: torch.device, ops: Ops = REFERENCE, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = build_model(load_config(folder), device=device, dtype=dtype, ops=ops)
    load_weights(model, folder)
    return model.eval()


def positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def test_every_weight_arrives(tiny_llama: Path) -> None:
    ours, theirs = load(tiny_llama, NPU), load(tiny_llama, CPU)
    assert {parameter.device for parameter in ours.parameters()} == {NPU}
    assert weights_hash(ours.state_dict()) == weights_hash(theirs.state_dict())


@pytest.mark.parametrize("chosen", [False, True], ids=["reference ops", "chosen ops"])
def test_the_forward_is_that_of_the_cpu(chosen: bool, tiny_llama: Path, npu: SimulatedNpu) -> None:
    tokens = torch.tensor(TOKENS)
    reference = load(tiny_llama, CPU)
    model = load(tiny_llama, NPU, choose_ops(NPU, torch.float32)[0] if chosen else REFERENCE)
    on_device = tokens.to(NPU)
    places = positions(on_device)
    with torch.no_grad(), npu.statistics.forbid_host_sync("a forward"):
        logits = model.logits(model(on_device, places))
    torch.testing.assert_close(logits.cpu(), reference.logits(reference(tokens, positions(tokens))), atol=1e-5, rtol=0)


def test_bf16_weights_give_bf16_logits_near_the_cpus(tiny_llama: Path) -> None:
    tokens = torch.tensor(TOKENS)
    ours, theirs = load(tiny_llama, NPU, dtype=torch.bfloat16), load(tiny_llama, CPU, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = ours.logits(ours(tokens.to(NPU), positions(tokens.to(NPU))))
        expected = theirs.logits(theirs(tokens, positions(tokens)))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.cpu(), expected, atol=2e-2, rtol=2e-2)


class Decoder:
    """One decode step over static buffers, as a runner captures it."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        cache = KVCache.allocate(model.config, 8, BLOCK_SIZE, NPU, torch.float32)
        self.ids, self.places, self.slots = (torch.zeros(2, 1, dtype=torch.int32, device=NPU) for _ in range(3))
        table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32, device=NPU)
        self.table = table.cpu()
        self.batch = PagedBatch(cache=cache, slot_mapping=self.slots.view(-1), block_table=table)

    def fill(self, ids: Sequence[int], position: int) -> None:
        blocks = self.table[:, position // BLOCK_SIZE]
        self.ids.copy_(torch.tensor(ids).view(2, 1))
        self.places.fill_(position)
        self.slots.copy_((blocks * BLOCK_SIZE + position % BLOCK_SIZE).view(2, 1))

    def step(self) -> torch.Tensor:
        return self.model.logits(self.model(self.ids, self.places, self.batch))


@torch.inference_mode()
def test_a_captured_decode_step_replays_to_the_logits_of_a_full_forward(tiny_llama: Path) -> None:
    model = load(tiny_llama, NPU, choose_ops(NPU, torch.float32)[0])
    tokens = torch.tensor(TOKENS, device=NPU)
    expected = model.logits(model(tokens, positions(tokens)))
    decoder = Decoder(model)
    graph = torch.get_device_module("npu").NPUGraph()
    with torch.get_device_module("npu").graph(graph):
        result = decoder.step()
    for position, ids in enumerate(zip(*TOKENS, strict=True)):
        decoder.fill(ids, position)
        graph.replay()
        torch.testing.assert_close(result[:, 0], expected[:, position], atol=1e-5, rtol=0)
