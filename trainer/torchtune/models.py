"""torchtune's model builders: to which family and shape each belongs. A model is built from its checkpoint's config.json;
the builder that a configuration names is only compared with it. Shapes: torchtune/models/*/_model_builders.py at 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "torchtune.models."

Shape = dict[str, int]
"""By the names of config.json."""

FAMILIES = {
    "llama2": "llama",
    "llama3": "llama",
    "llama3_1": "llama",
    "llama3_2": "llama",
    "llama3_3": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
}
"""torchtune's module of models -> `model_type` of config.json."""

CHECKPOINT_TYPES = {
    "LLAMA2": "llama",
    "LLAMA3": "llama",
    "LLAMA3_2": "llama",
    "MISTRAL": "mistral",
    "QWEN2": "qwen2",
    "QWEN3": "qwen3",
}
"""`checkpointer.model_type` -> `model_type` of config.json."""


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> Shape:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
    }


_LLAMA_8B = _shape(4096, 32, 32, 8, 14336, 128256)
_LLAMA_70B = _shape(8192, 80, 64, 8, 28672, 128256)
_QWEN_0_5B = _shape(896, 24, 14, 2, 4864, 151936)
_QWEN_1_5B = _shape(1536, 28, 12, 2, 8960, 151936)
_QWEN_7B = _shape(3584, 28, 28, 4, 18944, 152064)
_QWEN2_5_BOTH = {
    "1_5b": _QWEN_1_5B,
    "7b": _QWEN_7B,
    "14b": _shape(5120, 48, 40, 8, 13824, 152064),
    "32b": _shape(5120, 64, 40, 8, 27648, 152064),
    "72b": _shape(8192, 80, 64, 8, 29568, 152064),
}
_QWEN3_BOTH = {
    "0_6b": _shape(1024, 28, 16, 8, 3072, 151936),
    "1_7b": _shape(2048, 28, 16, 8, 6144, 151936),
    "4b": _shape(2560, 36, 32, 8, 9728, 151936),
    "8b": _shape(4096, 36, 32, 8, 12288, 151936),
    "14b": _shape(5120, 40, 40, 8, 17408, 151936),
}

SHAPES: dict[str, Shape] = {
    "llama2.llama2_7b": _shape(4096, 32, 32, 32, 11008, 32000),
    "llama2.llama2_13b": _shape(5120, 40, 40, 40, 13824, 32000),
    "llama2.llama2_70b": _shape(8192, 80, 64, 8, 28672, 32000),
    "llama3.llama3_8b": _LLAMA_8B,
    "llama3.llama3_70b": _LLAMA_70B,
    "llama3_1.llama3_1_8b": _LLAMA_8B,
    "llama3_1.llama3_1_70b": _LLAMA_70B,
    "llama3_1.llama3_1_405b": _shape(16384, 126, 128, 8, 53248, 128256),
    "llama3_2.llama3_2_1b": _shape(2048, 16, 32, 8, 8192, 128256),
    "llama3_2.llama3_2_3b": _shape(3072, 28, 24, 8, 8192, 128256),
    "llama3_3.llama3_3_70b": _LLAMA_70B,
    "mistral.mistral_7b": _shape(4096, 32, 32, 8, 14336, 32000),
    "qwen2.qwen2_0_5b": _QWEN_0_5B,
    "qwen2.qwen2_1_5b": _QWEN_1_5B,
    "qwen2.qwen2_7b": _QWEN_7B,
    "qwen2_5.qwen2_5_0_5b": _QWEN_0_5B,
    "qwen2_5.qwen2_5_3b": _shape(2048, 36, 16, 2, 11008, 151936),
    **{f"qwen2_5.qwen2_5_{size}_{kind}": s for size, s in _QWEN2_5_BOTH.items() for kind in ("base", "instruct")},
    **{f"qwen3.qwen3_{size}_{kind}": s for size, s in _QWEN3_BOTH.items() for kind in ("base", "instruct")},
    "qwen3.qwen3_32b": _shape(5120, 64, 64, 8, 25600, 151936),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    name: str
    """Without `torchtune.models.`."""
    model_type: str
    is_lora: bool
    shape: Shape


def _builders() -> dict[str, Builder]:
    found = {}
    for full, shape in SHAPES.items():
        family, size = full.split(".")
        for is_lora, name in ((False, full), (True, f"{family}.lora_{size}")):
            found[PREFIX + name] = Builder(name=name, model_type=FAMILIES[family], is_lora=is_lora, shape=shape)
    return found


BUILDERS = _builders()
QUANTIZED = tuple(
    PREFIX + builder.name.replace(".lora_", ".qlora_") for builder in BUILDERS.values() if builder.is_lora
)
"""qlora_* builders: named in order to say that there is no quantized base."""


def fitting(shape: Shape, model_type: str) -> list[str]:
    """Full builders of this shape and family."""
    return [
        name
        for name, builder in BUILDERS.items()
        if not builder.is_lora and builder.shape == shape and builder.model_type == model_type
    ]
