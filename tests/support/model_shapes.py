"""The config.json of the models that the stock configs name, as published, without what says nothing about the shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    repository: str
    """Where it is published on the Hugging Face hub."""
    num_parameters: int
    """As its model card or its safetensors index counts them; a tied embedding once."""
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return self.repository.partition("/")[2]


LLAMA_31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_32_ROPE = {**LLAMA_31_ROPE, "factor": 32.0}

LLAMA2_7B = Shape(
    repository="meta-llama/Llama-2-7b-chat-hf",
    num_parameters=6_738_415_616,
    config={
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
LLAMA3_8B = Shape(
    repository="meta-llama/Meta-Llama-3-8B-Instruct",
    num_parameters=8_030_261_248,
    config={
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
    },
)
LLAMA31_8B = Shape(
    repository="meta-llama/Llama-3.1-8B-Instruct",
    num_parameters=8_030_261_248,
    config={
        **LLAMA3_8B.config,
        "max_position_embeddings": 131072,
        "rope_scaling": LLAMA_31_ROPE,
        "mlp_bias": False,
        "eos_token_id": [128001, 128008, 128009],
    },
)
LLAMA32_1B = Shape(
    repository="meta-llama/Llama-3.2-1B-Instruct",
    num_parameters=1_235_814_400,
    config={
        **LLAMA31_8B.config,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "rope_scaling": LLAMA_32_ROPE,
        "tie_word_embeddings": True,
    },
)
MISTRAL_7B = Shape(
    repository="mistralai/Mistral-7B-Instruct-v0.2",
    num_parameters=7_241_732_096,
    config={
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
QWEN2_05B = Shape(
    repository="Qwen/Qwen2-0.5B-Instruct",
    num_parameters=494_032_768,
    config={
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 24,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
)
QWEN25_05B = Shape(
    repository="Qwen/Qwen2.5-0.5B-Instruct",
    num_parameters=494_032_768,
    config={**QWEN2_05B.config, "max_window_layers": 21},
)
QWEN3_06B = Shape(
    repository="Qwen/Qwen3-0.6B",
    num_parameters=596_049_920,
    config={
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
)

SHAPES = {
    "llama2/7B": LLAMA2_7B,
    "llama3/8B": LLAMA3_8B,
    "llama3_1/8B": LLAMA31_8B,
    "llama3_2/1B": LLAMA32_1B,
    "mistral/7B": MISTRAL_7B,
    "qwen2/0.5B": QWEN2_05B,
    "qwen2_5/0.5B": QWEN25_05B,
    "qwen3/0.6B": QWEN3_06B,
}
"""By the beginning of the stock configs' names."""
