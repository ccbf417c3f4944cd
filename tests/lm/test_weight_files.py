"""Checkpoints judged by their headers: what fits, and what is wrong with the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.config import load_config
from lm.errors import NotFoundError, UserError
from lm.model import build_model
from lm.ops import REFERENCE
from lm.weight_files import expected_shapes, validate_checkpoint
from tests.support.tiny import make_tiny_llama

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a single-file checkpoint; None removes one."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def validate(folder: Path) -> set[str]:
    return set(validate_checkpoint(folder, load_config(folder)))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1, "head_dim": 24, "num_hidden_layers": 3},
    ],
)
def test_expected_shapes_are_those_of_the_model(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = load_config(make_tiny_llama(tmp_path, **overrides))
    model = build_model(config, device=torch.device("meta"), dtype=torch.float32, ops=REFERENCE)
    assert dict(expected_shapes(config)) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert validate(tmp_path) == set(model.state_dict())


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    config = load_config(make_tiny_llama(tmp_path / "model"))
    with pytest.raises(NotFoundError, match=r"no model folder .*nowhere"):
        validate_checkpoint(tmp_path / "nowhere", config)
    with pytest.raises(UserError, match=r"looked for model\.safetensors and model\.safetensors\.index\.json"):
        validate_checkpoint(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({NORM: None}, r"lacks the tensors model\.norm\.weight$"),
        ({NORM: torch.ones(33)}, r"model\.norm\.weight is 33 and should be 32"),
        ({NORM: torch.ones(())}, r"model\.norm\.weight is a scalar and should be 32"),
        ({EMBEDDING: torch.ones(32, 272)}, r"embed_tokens\.weight is 32x272 and should be 272x32"),
        ({NORM: torch.ones(32, dtype=torch.int8)}, r"model\.norm\.weight has dtype I8"),
        ({"model.norm.bias": torch.ones(32)}, r"leaves no place for: model\.norm\.bias$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    rewrite(make_tiny_llama(tmp_path), change)
    with pytest.raises(UserError, match=reason) as caught:
        validate(tmp_path)
    assert caught.value.param == "model"


def test_a_long_list_of_tensors_is_cut_and_counted(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, num_hidden_layers=3)
    layer = {f"model.layers.2.{name}_proj.weight" for name in ("mlp.up", "mlp.down")}
    rewrite(tmp_path, dict.fromkeys(name for name in validate(tmp_path) if name.startswith("model.layers.2.")))
    with pytest.raises(UserError, match=r"lacks the tensors .* and 4 more$") as caught:
        validate(tmp_path)
    assert not any(name in str(caught.value) for name in layer)


def test_an_absurd_number_of_layers_is_refused_at_once(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**15}), encoding="utf-8")
    with pytest.raises(UserError, match=r"num_hidden_layers: must be at most 1024 \(got 10{15}\)"):
        validate(tmp_path)


def test_rotary_tables_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    rewrite(make_tiny_llama(tmp_path), {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in validate(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
        lambda data: data.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1),
    ],
)
def test_a_damaged_file_is_refused_by_its_header(tmp_path: Path, damage: Any) -> None:
    make_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(UserError, match=r"model\.safetensors is not a readable safetensors file"):
        validate(tmp_path)


# ---- index


def shard(folder: Path) -> dict[str, str]:
    """Split a checkpoint into two files with an index; its weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: "one.safetensors" if name == NORM else "two.safetensors" for name in tensors}
    for file in ("one.safetensors", "two.safetensors"):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def test_an_index_gathers_its_shards(tmp_path: Path) -> None:
    weight_map = shard(make_tiny_llama(tmp_path))
    entries = validate_checkpoint(tmp_path, load_config(tmp_path))
    assert {name: entry.file.name for name, entry in entries.items()} == weight_map


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({NORM: "two.safetensors"}, r"not in their files: model\.norm\.weight \(two\.safetensors\)"),
        ({NORM: "../one.safetensors"}, "names of files beside it"),
        ({NORM: "/etc/passwd"}, "names of files beside it"),
        ({NORM: 3}, "names of files beside it"),
        ({NORM: "three.safetensors"}, r"three\.safetensors is not a readable safetensors file"),
        ({"new": "one.safetensors"}, r"not in their files: new"),
        ({NORM: "one.safetensors", EMBEDDING: None}, r"does not name the tensors model\.embed_tokens\.weight"),
    ],
)
def test_an_index_that_does_not_match_its_files_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    weight_map = {**shard(make_tiny_llama(tmp_path)), **change}
    write_index(tmp_path, {name: file for name, file in weight_map.items() if file is not None})
    with pytest.raises(UserError, match=reason):
        validate(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    shard(make_tiny_llama(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"index\.json(: weight_map| is damaged)"):
        validate(tmp_path)


def test_headers_are_read_without_torch() -> None:
    code = "import sys, lm.weight_files; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
