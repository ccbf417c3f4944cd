"""A model's hyperparameters as the metadata of a GGUF file: the way back of lm/gguf_config.py. Torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.config import ModelConfig
from lm.errors import UserError
from lm.rope import LinearRope, LlamaRope, YarnRope

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""What llama.cpp calls each family."""

Metadata = dict[str, Any]


def model_metadata(config: ModelConfig, name: str) -> Metadata:
    """The hyperparameters under llama.cpp's keys. Raises UserError for those that it has no key for."""
    architecture = ARCHITECTURES[config.model_type]
    own: Metadata = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **_window(config),
        **_rope_scaling(config),
    }
    return {
        "general.type": "model",
        "general.name": name,
        **{f"{architecture}.{key}": value for key, value in own.items()},
    }


def rope_table(config: ModelConfig) -> NDArray[np.float32] | None:
    """Of Llama 3.1's scheme: by what each of the head_dim / 2 frequencies is divided."""
    scaling = config.rope_scaling
    if not isinstance(scaling, LlamaRope):
        return None
    exponents = -np.arange(0, config.head_dim, 2) / config.head_dim
    turns = scaling.original_max_position_embeddings / (2 * np.pi) * config.rope_theta**exponents
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    table: NDArray[np.float32] = (1 / ((1 - kept) / scaling.factor + kept)).astype(np.float32)
    return table


def _window(config: ModelConfig) -> Metadata:
    windows = set(config.sliding_windows) - {None}
    if windows and config.model_type != "mistral":
        raise UserError(f"sliding_window: llama.cpp has none for {config.model_type} models", param="model")
    return {"attention.sliding_window": windows.pop()} if windows else {}


def _rope_scaling(config: ModelConfig) -> Metadata:
    match config.rope_scaling:
        case LinearRope(factor=factor):
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
        case YarnRope() as yarn:
            usual = 0.1 * np.log(max(yarn.factor, 1.0)) + 1
            if not yarn.truncate or abs(yarn.attention_factor - usual) > 1e-6:
                raise UserError("rope_scaling: GGUF has no word for this kind of YaRN", param="model")
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(yarn.factor),
                "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
                "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
                "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
            }
        case _:
            return {}
