"""Meta's `params.json`, which stands beside a `consolidated.00.pth`, as the `config.json` that Hugging Face has of it.

Torch-free. Llama 2, 3, 3.1, 3.2 (text) and 3.3. What the file does not say is known of these families: the context
length, the special tokens, and the two models of Llama 3.2 whose head is their embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.config_fields import Fields
from lm.errors import UserError

PARAMS_FILE = "params.json"
KNOWN_KEYS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "tie_word_embeddings"),
    *("max_seq_len", "max_batch_size", "use_biases"),
)
LLAMA_2_THETA, CODE_LLAMA_THETA = 10_000.0, 1_000_000.0
TIED = {(2048, 16), (3072, 28)}
"""(dim, n_layers) of Llama 3.2 1B and 3B: they share embedding and head, and their rotation is stretched 32 times."""
LLAMA_3_TOKENS = {"bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009]}
LLAMA_2_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA_3_VOCABULARY = 128_256


def hf_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError naming the key, its value and the mend."""
    fields = Fields(params)
    _refuse_others(fields)
    is_tied = fields.flag("use_scaled_rope") and (params.get("dim"), params.get("n_layers")) in TIED
    theta = fields.number("rope_theta", LLAMA_2_THETA)
    vocab_size = _vocab_size(fields)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": fields.size("dim"),
        "intermediate_size": _intermediate_size(fields),
        "num_hidden_layers": fields.size("n_layers"),
        "num_attention_heads": fields.size("n_heads"),
        "num_key_value_heads": fields.size("n_kv_heads", fields.size("n_heads")),
        "hidden_act": "silu",
        "rms_norm_eps": fields.number("norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(fields, 32.0 if is_tied else 8.0),
        "max_position_embeddings": _context(fields, theta),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", is_tied),
        **(LLAMA_3_TOKENS if vocab_size >= LLAMA_3_VOCABULARY else LLAMA_2_TOKENS),
    }


def _refuse_others(fields: Fields) -> None:
    """A key that we do not know would change the model: vision towers, experts, quantised weights."""
    if unknown := sorted(set(fields.data) - set(KNOWN_KEYS)):
        raise UserError(
            f"{PARAMS_FILE}: unknown keys {unknown}; only the text models of Llama 2, 3, 3.1, 3.2 and 3.3 are read in "
            "this form. Use the model in Hugging Face format, with a config.json",
            param=unknown[0],
        )
    if fields.flag("use_biases"):
        raise fields.wrong("use_biases", "false")


def _vocab_size(fields: Fields) -> int:
    if fields.data.get("vocab_size", -1) == -1:
        raise UserError(
            f"vocab_size: {PARAMS_FILE} leaves it to the tokenizer (-1). Write the number of the tokenizer's tokens "
            "there: 32000 for Llama 2, 128256 for Llama 3 and later",
            param="vocab_size",
        )
    return fields.size("vocab_size")


def _intermediate_size(fields: Fields) -> int:
    """Two thirds of four times the width, stretched, and rounded up to a multiple."""
    size = int(fields.number("ffn_dim_multiplier", 1.0) * int(2 * 4 * fields.size("dim") / 3))
    multiple = fields.size("multiple_of", 256)
    return -(-size // multiple) * multiple


def _rope_scaling(fields: Fields, factor: float) -> dict[str, Any] | None:
    if not fields.flag("use_scaled_rope"):
        return None
    return {
        "rope_type": "llama3",
        "factor": fields.number("rope_scaling_factor", factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": fields.number("rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }


def _context(fields: Fields, theta: float) -> int:
    if fields.flag("use_scaled_rope"):
        return 131_072
    return 4096 if theta == LLAMA_2_THETA else 16_384 if theta == CODE_LLAMA_THETA else 8192
