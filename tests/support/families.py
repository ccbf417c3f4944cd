"""Configurations of tiny models that a comparison with transformers goes through, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.tiny import VOCAB_SIZE, make_tiny_model

TOLERANCE = 1e-4
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
EVERY_FAMILY: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "MHA": {"num_key_value_heads": 4},
    "MQA": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 24},
    "narrow heads": {"head_dim": 4},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear": {"rope_parameters": LINEAR},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn, not truncated": {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0}},
    "yarn, attention factor": {"rope_parameters": {**YARN, "attention_factor": 0.7}},
    "yarn, mscale": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "no padding id": {"pad_token_id": None},
}
SLIDING = {"use_sliding_window": True, "sliding_window": 24}
BY_LAYER: dict[str, dict[str, Any]] = {
    "window, upper layer": {**SLIDING, "max_window_layers": 1},
    "window, all layers": {**SLIDING, "max_window_layers": 0},
    "window, layer types": {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "window, off": {**SLIDING, "use_sliding_window": False, "max_window_layers": 0},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "attention bias": {"attention_bias": True},
        "MLP bias": {"mlp_bias": True},
    },
    "mistral": {
        "window": {"sliding_window": 24},
        "window of one": {"sliding_window": 1},
        "no window": {"sliding_window": None},
    },
    "qwen2": BY_LAYER,
    "qwen3": {"attention bias": {"attention_bias": True}, **BY_LAYER},
}


def names_of(family: str) -> list[str]:
    return [*EVERY_FAMILY, *OWN[family]]


def make(folder: Path, family: str, name: str, **overrides: Any) -> Path:
    return make_tiny_model(folder, family, **{**(EVERY_FAMILY | OWN[family])[name], **overrides})


def random_ids(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def positions_of(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def difference(ours: Tensor, expected: Tensor) -> float:
    assert expected.std() > 0.5, "logits that are all alike would prove nothing"
    return float((ours - expected).detach().abs().max())


def worst(differences: dict[str, float]) -> str:
    """The largest, as a figure. Each is to be within the tolerance."""
    too_large = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    assert not too_large
    return f"{max(differences.values()):.1e} in {len(differences)} configurations"
