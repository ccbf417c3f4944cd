"""Reading `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lm.config import FAMILIES, ModelConfig, load_config
from lm.errors import NotFoundError, UserError
from lm.rope import LlamaRope
from tests.support.tiny import make_tiny_llama

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE_TYPES = ["default", "linear", "llama3", "yarn"]
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_smollm2_reads_as_published() -> None:
    config = ModelConfig.from_dict(SMOLLM2)
    assert config.head_dim == 64
    assert config.rope_theta == 100000
    assert config.rope_scaling is None
    assert config.eos_token_ids == (2,)
    assert config.num_parameters == 134_515_008
    assert config.kv_bytes_per_token(2) == 30 * 2 * 3 * 64 * 2


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
)
def test_llama3_scaling_reads_the_same_in_every_spelling(rope: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({key: value for key, value in SMOLLM2.items() if "rope" not in key} | rope)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == LlamaRope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


@pytest.mark.parametrize("rope", [{"rope_scaling": {"rope_type": "default"}}, {"rope_parameters": {}}, {}])
def test_plain_rope_reads_the_same_in_every_spelling(rope: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(SMOLLM2 | rope)
    assert (config.rope_theta, config.rope_scaling) == (100000, None)


def test_a_missing_key_has_the_default_of_transformers() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theirs: Any = LlamaConfig(**{key: SMOLLM2[key] for key in sizes})
    ours = ModelConfig.from_dict({"model_type": "llama"} | {key: SMOLLM2[key] for key in sizes})
    for name in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "bos_token_id",
        "pad_token_id",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model_type": "mamba"}, "model_type", f"{list(FAMILIES)} (got 'mamba')"),
        ({"model_type": ["llama"]}, "model_type", f"{list(FAMILIES)} (got ['llama'])"),
        ({"hidden_act": "gelu"}, "hidden_act", "['silu'] (got 'gelu')"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.rope_type", f"{ROPE_TYPES} (got 'dynamic')"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.type", f"{ROPE_TYPES} (got 'su')"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type", "(got 'longrope')"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor", "required and missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor",
            "more than low_freq_factor = 1.0 (got 1.0)",
        ),
        ({"rope_scaling": "llama3"}, "rope_scaling", "must be an object (got 'llama3')"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "unquantised"),
        ({"vocab_size": 0}, "vocab_size", "a positive integer (got 0)"),
        ({"hidden_size": "576"}, "hidden_size", "a positive integer (got '576')"),
        ({"num_hidden_layers": True}, "num_hidden_layers", "a positive integer (got True)"),
        ({"num_key_value_heads": 4}, "num_key_value_heads", "must divide num_attention_heads = 9 (got 4)"),
        ({"head_dim": 63}, "head_dim", "even"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps", "a positive number (got -1e-05)"),
        ({"rope_theta": float("inf")}, "rope_theta", "a positive number (got inf)"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false (got 'yes')"),
        ({"bos_token_id": "<s>"}, "bos_token_id", "(got '<s>')"),
        ({"eos_token_id": [2, "</s>"]}, "eos_token_id", "(got [2, '</s>'])"),
        ({"eos_token_id": -1}, "eos_token_id", "(got -1)"),
        ({"pad_token_id": 49152}, "pad_token_id", "below vocab_size = 49152, or null (got 49152)"),
        ({"pad_token_id": True}, "pad_token_id", "(got True)"),
    ],
)
def test_a_value_that_cannot_be_read_is_refused_by_name(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict(SMOLLM2 | change)
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param}: ")
    assert words in str(caught.value)


def test_a_missing_size_is_named() -> None:
    data = {key: value for key, value in SMOLLM2.items() if key != "intermediate_size"}
    with pytest.raises(UserError, match=r"^intermediate_size: this key is required and missing"):
        ModelConfig.from_dict(data)


def test_a_model_may_lack_special_tokens() -> None:
    config = ModelConfig.from_dict(SMOLLM2 | {"bos_token_id": None, "eos_token_id": None})
    assert config.bos_token_id is None
    assert config.eos_token_ids == ()


def test_end_of_sequence_ids_of_both_files_count(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [7, 2]}), encoding="utf-8")
    assert load_config(tmp_path).eos_token_ids == (2, 7)
    generation.unlink()
    assert load_config(tmp_path).eos_token_ids == (2,)


def test_a_folder_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        load_config(tmp_path / "nowhere")


def test_a_folder_without_a_readable_config_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    for text, words in [("{", "cannot read"), ("[]", "must hold a JSON object, not list"), ("{}", "model_type")]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=words) as caught:
            load_config(tmp_path)
        assert str(path) in str(caught.value)
