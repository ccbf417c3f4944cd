"""Models with adapters that change something, and the same models in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lm.checkpoint import load_weights
from lm.config import load_config
from lm.lora import LINEAR_LAYERS, LoraSpec, add_lora, lora_parameters
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 80, 17, 200, 33, 2, 9]])
POSITIONS = torch.arange(IDS.shape[1])[None]
SPEC = LoraSpec(rank=4, alpha=12.0, dropout=0.0, target_modules=LINEAR_LAYERS)
ATTENTION = LoraSpec(rank=3, alpha=3.0, dropout=0.0, target_modules=("v_proj", "q_proj"))
RANK_STABILIZED = LoraSpec(rank=4, alpha=6.0, dropout=0.0, target_modules=LINEAR_LAYERS, use_rslora=True)
DORA = LoraSpec(rank=4, alpha=12.0, dropout=0.0, target_modules=LINEAR_LAYERS, use_dora=True)
BOTH = LoraSpec(rank=2, alpha=4.0, dropout=0.0, target_modules=("q_proj", "up_proj"), use_rslora=True, use_dora=True)
ONE_LAYER = LoraSpec(rank=2, alpha=4.0, dropout=0.0, target_modules=("model.layers.1.mlp.down_proj",))
SPECS = {
    "all layers": SPEC,
    "attention": ATTENTION,
    "rank-stabilized": RANK_STABILIZED,
    "DoRA": DORA,
    "rank-stabilized DoRA": BOTH,
    "one layer": ONE_LAYER,
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = build_model(load_config(folder), device=CPU, dtype=dtype, ops=REFERENCE)
    load_weights(model, folder)
    return model


def adapted(folder: Path, spec: LoraSpec) -> CausalLM:
    """A model with updates that change something."""
    torch.manual_seed(3)
    model = load(folder)
    add_lora(model, spec)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.normal_(std=0.2)
    return model.eval()


def logits(model: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS, POSITIONS))


def their_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_equal(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()
