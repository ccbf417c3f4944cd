"""Meta's `params.json` as the config that Hugging Face publishes for the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm.config import ModelConfig, load_config, read_hf_config
from lm.errors import UserError
from lm.rope import LlamaRope

LLAMA_2_7B: dict[str, Any] = {
    "dim": 4096,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "vocab_size": 32_000,
}
LLAMA_3_8B: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128_256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500_000.0,
}
LLAMA_3_1_8B = LLAMA_3_8B | {"use_scaled_rope": True}
LLAMA_3_1_70B = LLAMA_3_1_8B | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096}
LLAMA_3_2_1B = LLAMA_3_1_8B | {"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256}
LLAMA_3_2_3B = LLAMA_3_1_8B | {
    "dim": 3072,
    "n_layers": 28,
    "n_heads": 24,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 256,
}
PUBLISHED = {
    "Llama 2 7B": (LLAMA_2_7B, 6_738_415_616, 11_008, 4096, None),
    "Llama 3 8B": (LLAMA_3_8B, 8_030_261_248, 14_336, 8192, None),
    "Llama 3.1 8B": (LLAMA_3_1_8B, 8_030_261_248, 14_336, 131_072, 8.0),
    "Llama 3.1 70B": (LLAMA_3_1_70B, 70_553_706_496, 28_672, 131_072, 8.0),
    "Llama 3.2 1B": (LLAMA_3_2_1B, 1_235_814_400, 8192, 131_072, 32.0),
    "Llama 3.2 3B": (LLAMA_3_2_3B, 3_212_749_824, 8192, 131_072, 32.0),
}


def write(path: Path, params: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(params), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("file", ["params.json", "original/params.json"])
def test_a_published_model_is_read_as_hugging_face_describes_it(name: str, file: str, tmp_path: Path) -> None:
    params, num_parameters, inner, context, factor = PUBLISHED[name]
    write(tmp_path / file, params)
    config = load_config(tmp_path)
    assert config == ModelConfig.from_dict(read_hf_config(tmp_path))
    assert config.num_parameters == num_parameters
    assert (config.intermediate_size, config.max_position_embeddings) == (inner, context)
    assert config.rope_theta == params.get("rope_theta", 10_000.0)
    scaling = config.rope_scaling
    assert (scaling.factor if isinstance(scaling, LlamaRope) else None) == factor
    is_llama_3 = "Llama 3" in name
    assert config.bos_token_id == (128_000 if is_llama_3 else 1)
    assert config.eos_token_ids == ((128_001, 128_008, 128_009) if is_llama_3 else (2,))
    assert config.tie_word_embeddings is ("3.2" in name)


def test_config_json_goes_first(tmp_path: Path) -> None:
    write(tmp_path / "params.json", LLAMA_3_8B)
    write(tmp_path / "config.json", {"model_type": "qwen2"})
    assert read_hf_config(tmp_path) == {"model_type": "qwen2"}


def test_what_the_file_says_goes_before_what_is_known(tmp_path: Path) -> None:
    told = {"rope_scaling_factor": 16, "rope_high_freq_factor": 2, "tie_word_embeddings": False}
    write(tmp_path / "params.json", LLAMA_3_2_1B | told)
    config = load_config(tmp_path)
    assert config.tie_word_embeddings is False
    assert config.rope_scaling == LlamaRope(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position_embeddings=8192
    )


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"vocab_size": -1}, "vocab_size", "32000 for Llama 2"),
        ({"vocab_size": None}, "vocab_size", "a positive integer (got None)"),
        ({"dim": 0}, "dim", "a positive integer (got 0)"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier", "(got '1.3')"),
        ({"use_scaled_rope": 1}, "use_scaled_rope", "true or false (got 1)"),
        ({"vision_chunk_size": 448}, "vision_chunk_size", "Hugging Face format"),
        ({"hidden_dim": 14_336, "head_dim": 128}, "head_dim", "['head_dim', 'hidden_dim']"),
        ({"quantization_args": {}}, "quantization_args", "unknown keys"),
        ({"use_biases": True}, "use_biases", "must be false (got True)"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change: dict[str, Any], param: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "params.json", LLAMA_3_8B | change)
    for read in (load_config, read_hf_config):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert caught.value.param == param
        assert str(path) in str(caught.value)
        assert words in str(caught.value)


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads"])
def test_a_missing_size_is_named(key: str, tmp_path: Path) -> None:
    write(tmp_path / "params.json", {name: value for name, value in LLAMA_3_8B.items() if name != key})
    with pytest.raises(UserError, match=f"{key}: this key is required and missing"):
        load_config(tmp_path)


def test_a_size_left_to_the_tokenizer_says_what_to_write(tmp_path: Path) -> None:
    for params in (LLAMA_2_7B | {"vocab_size": -1}, {k: v for k, v in LLAMA_2_7B.items() if k != "vocab_size"}):
        write(tmp_path / "params.json", params)
        with pytest.raises(UserError, match="Write the number of the tokenizer's tokens there: 32000 for Llama 2"):
            load_config(tmp_path)
