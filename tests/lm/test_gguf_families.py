"""Converted files of every architecture against the models they were written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lm.errors import UserError
from lm.gguf import convert_gguf
from lm.tokenizer import load_tokenizer
from tests.support.families import LINEAR, YARN, difference, positions_of
from tests.support.families import LLAMA3 as STRETCHED
from tests.support.gguf_file import (
    Metadata,
    bpe_metadata,
    rope_table,
    sentencepiece_metadata,
    tiny_parts,
    tiny_tokenizer,
    write_gguf,
)
from tests.support.tiny import load_tiny_model, make_tiny_model
from tests.support.tiny_tokenizers import make_sentencepiece

Kind = gguf.GGMLQuantizationType
LLAMA3 = STRETCHED | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama, rope_freqs": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "mistral, window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
}
EXACT = (Kind.F32, Kind.BF16)
TOLERANCE = {Kind.F32: 0.0, Kind.BF16: 0.0, Kind.F16: 1e-3, Kind.Q8_0: 0.5}


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_the_original(tmp_path: Path, name: str, figure: Callable[[str, object], None]) -> None:
    family, overrides = CASES[name]
    tokenizer = _sentencepiece(tmp_path) if family == "mistral" else bpe_metadata(tiny_tokenizer(), "qwen2")
    size = len(tokenizer["tokenizer.ggml.tokens"])
    original = _model(tmp_path / "original", family, vocab_size=size, **overrides)
    ids = torch.arange(120).reshape(2, 60) * 7 % size
    expected = _logits(original, ids)
    worst = {}
    for kind, tolerance in TOLERANCE.items():
        stored = deepcopy(original)
        folder = _convert(tmp_path / kind.name, stored, tokenizer, kind)
        found = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
        assert torch.equal(found, _logits(stored, ids)), "stored has the weights that the quantized ones stand for"
        worst[kind.name] = difference(found, expected)
        assert worst[kind.name] <= tolerance
        ours = load_tiny_model(folder)
        with torch.inference_mode():
            assert difference(ours.logits(ours(ids, positions_of(ids))), found) < 1e-4
    load_tokenizer(folder)
    figure(f"GGUF of {name}, logits' largest difference", {kind: f"{value:.1e}" for kind, value in worst.items()})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_own_gguf_reader_finds_the_same_weights(tmp_path: Path, family: str) -> None:
    head = {"head_dim": 128} if family == "qwen3" else {}  # that reader knows no other
    tokenizer = bpe_metadata(tiny_tokenizer(), "qwen2")
    size = len(tokenizer["tokenizer.ggml.tokens"])
    model = _model(tmp_path / "original", family, vocab_size=size, tie_word_embeddings=False, **head)
    folder = _convert(tmp_path / "out", model, tokenizer, Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert theirs.keys() == ours.keys()
    assert [name for name, weight in theirs.items() if not torch.equal(weight.bfloat16().float(), ours[name])] == []


def test_llama_3s_frequencies_are_recognised_by_their_table(tmp_path: Path) -> None:
    model, tokenizer = tiny_parts(tmp_path / "original", head_dim=32)
    model.config.rope_parameters = LLAMA3 | {"factor": 32.0}
    folder = _convert(tmp_path / "out", model, bpe_metadata(tokenizer, "llama-bpe"), Kind.F32)
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    assert scaling == {key: value for key, value in (LLAMA3 | {"factor": 32.0}).items() if key != "rope_theta"}


def test_a_table_that_is_not_llama_3s_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_parts(tmp_path / "original", head_dim=32)
    model.config.rope_parameters = LLAMA3
    table = rope_table(model.config)["rope_freqs.weight"]
    metadata = bpe_metadata(tokenizer, "llama-bpe")
    for number, wrong in enumerate((table * 1.01, table[:-1], table**2, table * 0)):
        raw = {"rope_freqs.weight": (wrong, Kind.F32)}
        with pytest.raises(UserError, match=r"rope_freqs.weight: .* that is not Llama 3.1's; convert the model's orig"):
            _convert(tmp_path / str(number), model, metadata, Kind.F32, raw=raw)
    scaled = metadata | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(UserError, match=r"llama.rope.scaling.type: must be absent, since rope_freqs.weight scales"):
        _convert(tmp_path / "both", model, scaled, Kind.F32)


def test_a_table_of_ones_and_a_factor_of_2023_are_read(tmp_path: Path) -> None:
    model, tokenizer = tiny_parts(tmp_path / "original", head_dim=32)
    raw = {"rope_freqs.weight": (rope_table(_with_llama3(model))["rope_freqs.weight"] * 0 + 1, Kind.F32)}
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    metadata = bpe_metadata(tokenizer, "smollm") | {"llama.rope.scale_linear": 2.5}
    folder = _convert(tmp_path / "out", model, metadata, Kind.F32, raw=raw)
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 2.5}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, r"llama.rope.scaling.type: .*'none', 'linear', 'yarn'.*'longrope'"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5},
            r"llama.rope.scaling.yarn_ext_factor: must be 1.0, as YaRN's paper has it \(got 0.5\)",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count: must be 0: mixtures of experts are not supported"),
        ({"llama.rope.dimension_count": 4}, r"llama.rope.dimension_count: must be the head's size 8: .*\(got 4\)"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length: must be the size 8 of the keys"),
        ({"llama.attention.head_count": [4, 2]}, "llama.attention.head_count: must be a positive integer"),
        ({"llama.embedding_length": "x"}, "llama.embedding_length: must be a positive integer"),
        ({"split.count": 3, "split.no": 1}, "part 2 of 3 of a model: join all parts with `llama-gguf-split --merge"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "metadata are not whole"),
        ({"tokenizer.ggml.tokens": 5}, "metadata are not whole"),
        ({"tokenizer.ggml.merges": [1, 2]}, "metadata are not whole"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "metadata are not whole"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": ["x"] * 284}, "metadata are not whole"),
        ({"tokenizer.chat_template": 5}, "metadata are not whole"),
        ({"split.count": "x"}, "metadata are not whole"),
    ],
)
def test_metadata_that_we_cannot_honour_are_named(tmp_path: Path, metadata: Metadata, message: str) -> None:
    model, tokenizer = tiny_parts(tmp_path / "original")
    with pytest.raises(UserError, match=message):
        _convert(tmp_path / "out", model, bpe_metadata(tokenizer, "smollm") | metadata, Kind.F32)


def test_another_architecture_is_refused_with_those_that_are_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_parts(tmp_path / "original")
    monkeypatch.setattr(model.config, "model_type", "gemma")
    with pytest.raises(UserError, match="holds a gemma model; supported: llama, qwen2, qwen3"):
        _convert(tmp_path / "out", model, bpe_metadata(tokenizer, "smollm"), Kind.F32)


def test_the_ends_of_a_turn_and_of_a_message_end_an_answer_too(tmp_path: Path) -> None:
    model, tokenizer = tiny_parts(tmp_path / "original")
    ends = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2}
    folder = _convert(tmp_path / "out", model, bpe_metadata(tokenizer, "smollm") | ends, Kind.F32)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2
    assert load_tokenizer(folder).eos_token_ids == (2, 0)


def _sentencepiece(folder: Path) -> Metadata:
    make_sentencepiece(folder / "sp.model")
    return sentencepiece_metadata(folder / "sp.model")


def _model(folder: Path, family: str, **overrides: Any) -> PreTrainedModel:
    """With weights that bf16 holds exactly."""
    make_tiny_model(folder, family, **overrides)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16().float())
    return model


def _with_llama3(model: PreTrainedModel) -> Any:
    model.config.rope_parameters = LLAMA3
    return model.config


def _convert(folder: Path, model: PreTrainedModel, tokenizer: Metadata, kind: Kind, **options: Any) -> Path:
    folder.mkdir()
    window = getattr(model.config, "sliding_window", None) if model.config.model_type == "mistral" else None
    metadata = {"llama.attention.sliding_window": window} if window else {}
    file = folder.with_suffix(".gguf")
    write_gguf(file, model, tokenizer, kind=kind, metadata=metadata, **options)
    convert_gguf(file, folder)
    return folder


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(ids).logits
    return logits
