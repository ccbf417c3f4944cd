"""Reading `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lm.config import FAMILIES, ModelConfig, load_config
from lm.errors import NotFoundError, UserError
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


def test_smollm2_reads_as_published() -> None:
    config = ModelConfig.from_dict(SMOLLM2)
    assert config.head_dim == 64
    assert config.rope_theta == 100000
    assert config.rope_scaling is None
    assert config.eos_token_ids == (2,)
    assert config.num_parameters == 134_515_008
    assert config.kv_bytes_per_token(2) == 30 * 2 * 3 * 64 * 2


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
QWEN: dict[str, Any] = {"num_attention_heads": 32, "num_hidden_layers": 4}  # 32 key/value heads are its default


def theirs(family: str, data: dict[str, Any]) -> Any:
    return AutoConfig.for_model(family, **{key: value for key, value in data.items() if key != "model_type"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key_has_the_default_of_transformers(family: str) -> None:
    data = {key: (SMOLLM2 | {"hidden_size": 512} | QWEN)[key] for key in SIZES}
    expected, ours = theirs(family, data), ModelConfig.from_dict({"model_type": family} | data)
    for name in (
        *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
        *("bos_token_id", "pad_token_id"),
    ):
        assert getattr(ours, name) == getattr(expected, name), name
    assert ours.head_dim == getattr(expected, "head_dim", 16)
    assert ours.rope_theta == expected.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == (() if expected.eos_token_id is None else (expected.eos_token_id,))


def biases(family: str, **change: Any) -> tuple[bool, bool, bool]:
    config = ModelConfig.from_dict(SMOLLM2 | {"model_type": family, "num_key_value_heads": 3} | change)
    return config.attention_bias, config.attention_output_bias, config.mlp_bias


def test_a_family_has_its_biases_and_reads_no_key_that_it_does_not_have() -> None:
    every = {"attention_bias": True, "mlp_bias": True}
    assert biases("llama") == (False, False, False)
    assert biases("llama", **every) == (True, True, True)
    assert biases("mistral") == biases("mistral", **every) == (False, False, False)
    assert biases("qwen2") == biases("qwen2", **every) == (True, False, False)
    assert biases("qwen3") == (False, False, False)
    assert biases("qwen3", **every) == (True, True, False)


WINDOW = {"use_sliding_window": True, "sliding_window": 5}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "change", "windows"),
    [
        ("llama", {"sliding_window": 5}, [None] * 4),
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("mistral", {"sliding_window": 5}, [5] * 4),
        ("mistral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 4}, [5] * 4),
        ("qwen2", {}, [None] * 4),
        ("qwen2", {"sliding_window": 5}, [None] * 4),
        ("qwen2", {"use_sliding_window": True}, [None] * 4),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 4),
        ("qwen2", {**WINDOW, "max_window_layers": 0}, [5] * 4),
        ("qwen2", {**WINDOW, "max_window_layers": 3}, [None, None, None, 5]),
        ("qwen3", {**WINDOW, "max_window_layers": 3, "layer_types": TYPES}, [None, 5, 5, None]),
    ],
)
def test_windows_are_those_of_transformers(family: str, change: dict[str, Any], windows: list[int | None]) -> None:
    data = SMOLLM2 | {"model_type": family, "num_hidden_layers": 4} | change
    assert list(ModelConfig.from_dict(data).sliding_windows) == windows
    expected = theirs(family, data)
    window = getattr(expected, "sliding_window", None) if family != "llama" else None
    types = getattr(expected, "layer_types", None) or ["sliding_attention"] * 4
    assert [window if kind == "sliding_attention" else None for kind in types] == windows


@pytest.mark.parametrize(
    ("family", "change", "param", "words"),
    [
        ("qwen2", {**WINDOW, "layer_types": TYPES[:3]}, "layer_types", "a list of 4 names"),
        ("qwen2", {**WINDOW, "layer_types": ["chunked_attention"] * 4}, "layer_types", "['full_attention', "),
        ("qwen3", {"layer_types": TYPES}, "layer_types", "since there is no sliding window"),
        ("mistral", {"sliding_window": 5, "layer_types": TYPES}, "layer_types", "all layers have the window"),
        ("mistral", {"sliding_window": 0}, "sliding_window", "a positive integer (got 0)"),
        ("qwen2", {**WINDOW, "max_window_layers": -1}, "max_window_layers", "0 or more (got -1)"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window", "true or false (got 1)"),
    ],
)
def test_windows_that_contradict_are_refused(family: str, change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^{param}: ") as caught:
        ModelConfig.from_dict(SMOLLM2 | {"model_type": family, "num_hidden_layers": 4} | change)
    assert caught.value.param == param
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model_type": "mamba"}, "model_type", f"{list(FAMILIES)} (got 'mamba')"),
        ({"model_type": ["llama"]}, "model_type", f"{list(FAMILIES)} (got ['llama'])"),
        ({"hidden_act": "gelu"}, "hidden_act", "['silu'] (got 'gelu')"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "unquantised"),
        ({"vocab_size": 0}, "vocab_size", "a positive integer (got 0)"),
        ({"hidden_size": "576"}, "hidden_size", "a positive integer (got '576')"),
        ({"num_hidden_layers": True}, "num_hidden_layers", "a positive integer (got True)"),
        ({"num_key_value_heads": 4}, "num_key_value_heads", "must divide num_attention_heads = 9 (got 4)"),
        ({"head_dim": 63}, "head_dim", "even"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps", "a positive number (got -1e-05)"),
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


def test_a_wrong_generation_config_is_refused_with_its_path(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: must be a token id") as caught:
        load_config(tmp_path)
    assert caught.value.param == "eos_token_id"


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
