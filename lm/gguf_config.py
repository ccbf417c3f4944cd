"""The `config.json` that a GGUF file's hyperparameters stand for. Torch-free.

Keys are `<architecture>.<name>`. Llama 3.1's stretched frequencies have no keys: llama.cpp's converter writes the
divisor of each frequency as the tensor `rope_freqs.weight`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.config_fields import Fields
from lm.errors import UserError
from lm.rope import DEFAULT_THETA

Table = NDArray[np.float32]
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192
"""Of every Llama 3.1, 3.2 and 3.3; the table does not say them."""
TABLE_TOLERANCE = 1e-4
UNREADABLE_YARN = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
"""Keys whose meaning differs between programs, and the value at which they say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How llama.cpp's architecture of a name differs from the others."""

    hf_class: str
    permuted: bool
    """Rows of q and k are in llama.cpp's order, which is for its older RoPE."""


ARCHITECTURES = {
    "llama": Architecture(hf_class="LlamaForCausalLM", permuted=True),
    "qwen2": Architecture(hf_class="Qwen2ForCausalLM", permuted=False),
    "qwen3": Architecture(hf_class="Qwen3ForCausalLM", permuted=False),
}
"""Mistral's files are `llama`, too."""


def read_architecture(fields: Mapping[str, Any]) -> Architecture:
    """Raises UserError naming another architecture, and where only a part of a model is in the file."""
    name = fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"the GGUF file holds a {name} model; supported: {', '.join(ARCHITECTURES)}")
    if (count := fields.get("split.count", 1)) > 1:
        part = f"part {fields.get('split.no', 0) + 1} of {count}"
        mend = "join all parts with `llama-gguf-split --merge FIRST_PART JOINED.gguf` and give the joined file"
        raise UserError(f"the GGUF file is {part} of a model: {mend}")
    return ARCHITECTURES[name]


def read_config(fields: Mapping[str, Any], tensors: Collection[str], rope_table: Table | None) -> dict[str, Any]:
    """A config.json's content from all metadata, the names of all tensors and the values of rope_freqs.weight.

    Raises UserError naming the key that is missing, wrong or means what our models do not have.
    """
    name = fields["general.architecture"]
    prefix = f"{name}."
    own = Fields({key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}, prefix)
    heads = own.size("attention.head_count")
    head_dim = own.size("attention.key_length", own.size("embedding_length") // heads)
    theta = own.number("rope.freq_base", DEFAULT_THETA)
    _refuse_others(own, head_dim)
    return {
        "architectures": [ARCHITECTURES[name].hf_class],
        "model_type": name,
        "vocab_size": own.size("vocab_size", len(fields["tokenizer.ggml.tokens"])),
        "hidden_size": own.size("embedding_length"),
        "intermediate_size": own.size("feed_forward_length"),
        "num_hidden_layers": own.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": own.size("context_length"),
        # Stored as float32: 1e-05 comes back as 9.999999747378752e-06.
        "rms_norm_eps": _shortest(own.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(own, rope_table, theta, head_dim),
        **_particulars(name, own, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def generation_config(fields: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """With every token that ends an answer: of the text, of a turn, of a message to a tool."""
    ends = [config["eos_token_id"], *(fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    ids = list(dict.fromkeys(index for index in ends if index is not None))
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": ids if len(ids) > 1 else next(iter(ids), None),
        "pad_token_id": config["pad_token_id"],
    }


def llama3_table(theta: float, head_dim: int, factor: float) -> NDArray[np.float64]:
    """The divisor of each of the head_dim / 2 frequencies in Llama 3.1's scheme."""
    turns = LLAMA3_ORIGINAL / (2 * np.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
    table: NDArray[np.float64] = 1 / ((1 - kept) / factor + kept)
    return table


def _refuse_others(own: Fields, head_dim: int) -> None:
    if own.data.get("expert_count"):
        raise own.wrong("expert_count", "0: mixtures of experts are not supported, take a dense model")
    if own.size("rope.dimension_count", head_dim) != head_dim:
        raise own.wrong("rope.dimension_count", f"the head's size {head_dim}: heads are rotated as a whole")
    if own.size("attention.value_length", head_dim) != head_dim:
        raise own.wrong("attention.value_length", f"the size {head_dim} of the keys")


def _particulars(name: str, own: Fields, tensors: Collection[str]) -> dict[str, Any]:
    """What only some families' configs say; biases are there if the tensors are."""
    has_bias = "blk.0.attn_q.bias" in tensors
    if name == "qwen2":
        return {"attention_dropout": 0.0, "use_sliding_window": False}
    if name == "qwen3":
        return {"attention_bias": has_bias, "attention_dropout": 0.0, "use_sliding_window": False}
    if own.data.get("attention.sliding_window"):
        window = own.size("attention.sliding_window")  # which of this architecture Mistral's alone have
        changed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        return {**changed, "sliding_window": window, "attention_dropout": 0.0}
    mlp_bias = "blk.0.ffn_gate.bias" in tensors
    return {"attention_bias": has_bias, "attention_dropout": 0.0, "mlp_bias": mlp_bias}


def _rope_scaling(own: Fields, table: Table | None, theta: float, head_dim: int) -> dict[str, Any] | None:
    # Files of 2023 have a factor alone.
    older = "linear" if "rope.scale_linear" in own.data else "none"
    kind = own.one_of("rope.scaling.type", ("none", "linear", "yarn"), older)
    if table is not None and not (table == 1).all():
        if kind != "none":
            raise own.wrong("rope.scaling.type", "absent, since rope_freqs.weight scales the frequencies, too")
        return _llama3(table, theta, head_dim)
    if kind == "none":
        return None
    factor = _shortest(own.number("rope.scaling.factor", own.number("rope.scale_linear", 1.0)))
    return {"rope_type": "linear", "factor": factor} if kind == "linear" else _yarn(own, factor)


def _yarn(own: Fields, factor: float) -> dict[str, Any]:
    for key, neutral in UNREADABLE_YARN.items():
        if own.value(f"rope.scaling.{key}", neutral) != neutral:
            raise own.wrong(f"rope.scaling.{key}", f"{neutral}, as YaRN's paper has it")
    betas = {key: own.number_or_none(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": own.size(
            "rope.scaling.original_context_length", own.size("context_length")
        ),
        **{key: _shortest(value) for key, value in betas.items() if value is not None},
    }


def _llama3(table: Table, theta: float, head_dim: int) -> dict[str, Any]:
    """Raises UserError if the table is not Llama 3.1's for this theta, whatever the factor."""
    factor = float(table.max(initial=0))
    if table.shape != (head_dim // 2,) or not (
        factor >= 1 and np.allclose(table, llama3_table(theta, head_dim, factor), rtol=TABLE_TOLERANCE, atol=0)
    ):
        raise UserError(
            f"rope_freqs.weight: the GGUF file scales its rotary frequencies by a table of {table.size} values up to "
            f"{factor:g} that is not Llama 3.1's; convert the model's original weights instead"
        )
    return {
        "rope_type": "llama3",
        "factor": _shortest(factor),
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_ORIGINAL,
    }


def _shortest(value: float) -> float:
    """The shortest decimal number that is this float32."""
    return float(str(np.float32(value)))
