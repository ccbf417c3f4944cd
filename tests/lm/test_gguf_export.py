"""Exported files read back: by our own import, by transformers, and by the library they are written with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.config import load_config
from lm.errors import UserError
from lm.gguf import convert_gguf, to_bf16
from lm.gguf_config import llama3_table
from lm.gguf_config_export import rope_table
from lm.gguf_export import GgufType, export_gguf
from lm.template import load_template
from lm.tokenizer import load_tokenizer
from tests.support.families import LINEAR, YARN, difference, positions_of
from tests.support.families import LLAMA3 as STRETCHED
from tests.support.tiny import load_tiny_model, make_tiny_model

LLAMA3 = STRETCHED | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 24}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
}
TOLERANCE: dict[GgufType, float] = {"f32": 0.0, "bf16": 0.0, "f16": 1e-3, "q8_0": 0.5}
IDS = torch.arange(120).reshape(2, 60) * 7 % 272


def make_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """With weights that bf16 holds, so that no way but a quantized one loses anything."""
    make_tiny_model(folder, family, **overrides)
    file = folder / "model.safetensors"
    state = {name: tensor.bfloat16().to(dtype).contiguous() for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    model = load_tiny_model(folder)
    return model.logits(model(IDS, positions_of(IDS)))


def back(file: Path) -> Path:
    """Imported again."""
    folder = file.with_suffix("")
    folder.mkdir()
    convert_gguf(file, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_is_imported_again_has_the_same_logits(
    tmp_path: Path, name: str, figure: Callable[[str, object], None]
) -> None:
    family, overrides = CASES[name]
    source = make_model(tmp_path / "source", family, **overrides)
    expected = logits(source)
    found = {}
    for kind, tolerance in TOLERANCE.items():
        export_gguf(source, tmp_path / f"{kind}.gguf", kind)
        found[kind] = difference(logits(back(tmp_path / f"{kind}.gguf")), expected)
        assert found[kind] <= tolerance
    figure(f"GGUF export of {name}, logits' largest difference", {kind: f"{one:.1e}" for kind, one in found.items()})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_transformers_finds_the_same_model_and_tokenizer_in_the_file(
    tmp_path: Path, family: str, kind: GgufType
) -> None:
    head: dict[str, Any] = {"head_dim": 128} if family == "qwen3" else {}  # its reader of GGUF knows no other
    source = make_model(tmp_path / "source", family, tie_word_embeddings=False, **head)
    export_gguf(source, tmp_path / "model.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.inference_mode():
        found = difference(theirs(IDS).logits, logits(source))
    assert found < (0.5 if kind == "q8_0" else 1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "<|im_start|>user\nthe other one is 42<|im_end|>\n"
    assert tokenizer(text, add_special_tokens=False).input_ids == load_tokenizer(source).encode(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_every_type_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make_model(tmp_path / "source", "llama", dtype)
    export_gguf(source, tmp_path / "out.gguf", "f32")
    stored = load_file(source / "model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    up = tensors["blk.1.ffn_up.weight"]
    assert torch.equal(torch.from_numpy(up.data.copy()), stored["model.layers.1.mlp.up_proj.weight"].float())
    assert "output.weight" not in tensors  # tied


def test_rows_in_pieces_are_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "source", "llama", attention_bias=True)
    export_gguf(source, tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr("lm.gguf_export.CHUNK_VALUES", 100)
    export_gguf(source, tmp_path / "pieces.gguf", "q8_0")
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_the_types_are_those_asked_for_and_vectors_are_fp32(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama", intermediate_size=48)  # rows of 48 are no blocks of 32
    export_gguf(source, tmp_path / "out.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert reader.fields["general.file_type"].contents() == 7


def test_llama_3s_table_is_the_one_that_is_recognised(tmp_path: Path) -> None:
    config = load_config(make_tiny_model(tmp_path / "source", "llama", rope_parameters=LLAMA3, head_dim=32))
    table = rope_table(config)
    assert table is not None
    assert table == pytest.approx(llama3_table(500_000.0, 32, 8.0), rel=1e-6)


def test_template_end_tokens_and_name_travel(tmp_path: Path) -> None:
    source = make_model(tmp_path / "smol-7", "llama")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}), encoding="utf-8")
    export_gguf(source, tmp_path / "out.gguf")
    folder = back(tmp_path / "out.gguf")
    original, imported = load_tokenizer(source), load_tokenizer(folder)
    assert imported.eos_token_ids == original.eos_token_ids == (2, 0)
    assert imported.special_tokens == original.special_tokens
    messages: Any = [{"role": "user", "content": "Who are you?"}]
    assert load_template(folder, imported).encode(messages, add_generation_prompt=True) == load_template(
        source, original
    ).encode(messages, add_generation_prompt=True)
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["general.name"].contents() == "smol-7"


def test_progress_is_told_to_the_last_tensor(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    source = make_model(tmp_path / "source", "llama")
    export_gguf(source, tmp_path / "out.gguf", on_tensor=lambda done, total: told.append((done, total)))
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]


# ---- refusals


def refused(tmp_path: Path, source: Path, match: str, kind: GgufType = "f16") -> None:
    with pytest.raises(UserError, match=match):
        export_gguf(source, tmp_path / "out.gguf", kind)
    assert [path for path in tmp_path.iterdir() if "out.gguf" in path.name] == []


def test_what_gguf_has_no_word_for_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}
    refused(tmp_path, make_model(tmp_path / "a", "qwen2", **window), "sliding_window: llama.cpp has none for qwen2")
    odd_ones: tuple[dict[str, Any], ...] = ({"truncate": False}, {"attention_factor": 0.7})
    for number, odd in enumerate(odd_ones):
        source = make_model(tmp_path / f"yarn-{number}", "llama", rope_parameters={**YARN, **odd})
        refused(tmp_path, source, "no word for this kind of YaRN")


def test_weights_beyond_f16_are_refused_as_f16_only(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama")
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 3] = 70_000.0
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, source, r"blk.0.ffn_up.weight has weights beyond what f16 can hold; take bf16")
    export_gguf(source, tmp_path / "out.gguf", "bf16")


def test_other_weights_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "source", "llama")
    with monkeypatch.context() as patch:
        patch.setattr("lm.gguf_export.SPARE_BYTES", 1 << 60)
        refused(tmp_path, source, r"the file takes \d+\.\d\d GB, and \d+\.\d\d GB are free")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refused(tmp_path, source, "has no safetensors files")


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama")
    (tmp_path / "out.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"out\.gguf exists already"):
        export_gguf(source, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text(encoding="utf-8") == "mine"


def test_bf16_is_rounded_as_the_import_rounds_it() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).numpy()
    data = gguf.quantize(values, gguf.GGMLQuantizationType.BF16).view("<u2")
    assert (data == to_bf16(values)).all()
