"""Every family on the device: windows, norms, biases and packed documents as on the CPU, and nothing waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from lm.config import ModelConfig
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE, choose_ops
from tests.npu.simulated.device import SimulatedNpu

NPU, CPU = torch.device("npu", 0), torch.device("cpu")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "llama", "rope_scaling": YARN},
    {"model_type": "mistral", "sliding_window": 3},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    {"model_type": "qwen3", "attention_bias": True},
]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["model_type"])
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0], [0, 1, 0, 1, 2, 3, 4, 5]])
IDS = torch.arange(16).view(2, 8) * 3


def pair(family: dict[str, Any]) -> tuple[CausalLM, CausalLM]:
    """The same random model on the CPU, and on the device with the ops chosen for it."""
    config = ModelConfig.from_dict(SIZES | family)
    theirs = build_model(config, device=CPU, dtype=torch.float32, ops=REFERENCE)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    ours = build_model(config, device=NPU, dtype=torch.float32, ops=choose_ops(NPU, torch.float32)[0])
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def loss(model: CausalLM, ids: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
    return model.logits(model(ids, positions, documents=documents)).square().mean()


@every_family
def test_packed_documents_train_as_on_the_cpu(family: dict[str, Any], npu: SimulatedNpu) -> None:
    ours, theirs = pair(family)
    inputs = (IDS, POSITIONS, DOCUMENTS)
    moved = tuple(tensor.to(NPU) for tensor in inputs)
    with npu.statistics.forbid_host_sync("a training step"):
        loss(ours, *moved).backward()
    loss(theirs, *inputs).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.cpu(), expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@every_family
def test_prefill_and_decoding_are_those_of_the_cpu(family: dict[str, Any], npu: SimulatedNpu) -> None:
    logits = {}
    for model, device in zip(pair(family), (NPU, CPU), strict=True):
        cache = KVCache.allocate(model.config, 5, 4, device, torch.float32)
        table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
        parts = []
        for start, end in [(0, 6), (6, 7), (7, 8)]:
            positions = torch.arange(start, end).expand(2, -1)
            slots = table.gather(1, positions // 4) * 4 + positions % 4
            moved = [tensor.to(device) for tensor in (IDS[:, start:end], positions, slots.flatten(), table)]
            batch = PagedBatch(cache=cache, slot_mapping=moved[2], block_table=moved[3])
            with torch.no_grad(), npu.statistics.forbid_host_sync("a forward"):
                parts.append(model.logits(model(moved[0], moved[1], batch)))
        logits[device] = torch.cat(parts, 1).cpu()
    torch.testing.assert_close(logits[NPU], logits[CPU], rtol=1e-4, atol=1e-5)
