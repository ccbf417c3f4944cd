"""Which files of a folder are read, and what is said of those that are missing or do not belong together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.checkpoint import validate_weights
from lm.config import load_config
from lm.errors import NotFoundError, UserError
from lm.layout import has_weights
from tests.support.layouts import halves, write_layout
from tests.support.tiny import make_tiny_llama
from tests.support.weights import BIN, bin_folder, load, refused


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path / "model")
    (folder / BIN).unlink()
    assert not has_weights(folder)
    refused(folder, r"looked for model\.safetensors, .*pytorch_model\.bin, .*hf_model_\*\.pt.*consolidated\.00\.pth")
    with pytest.raises(NotFoundError, match="no model folder"):
        validate_weights(tmp_path / "nowhere", load_config(bin_folder(tmp_path / "other")))


@pytest.mark.parametrize(
    ("layout", "gone", "reason"),
    [
        ("pytorch_model.bin.index.json", "pytorch_model-00002-of-00002.bin", r"which pytorch_model\.bin\.index\.json"),
        ("pytorch_model-0000N.bin", "pytorch_model-00002-of-00002.bin", "which their numbers call for"),
        ("ft-model.bin", "ft-model-00001-of-00002.bin", "which their numbers call for"),
        ("hf_model.pt", "hf_model_0001_10.pt", "which their numbers call for"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, layout: str, gone: str, reason: str) -> None:
    folder = write_layout(make_tiny_llama(tmp_path / "base"), tmp_path / "other", layout)
    (folder / gone).unlink()
    refused(folder, rf"lacks the files {gone}, {reason}")


def test_a_number_out_of_all_bounds_is_no_work(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path)
    (folder / BIN).rename(folder / f"ft-model-00001-of-{10**18}.bin")
    refused(folder, rf"lacks the files ft-model-00002-of-{10**18}\.bin, .* and more, which their numbers call for")


def test_the_last_part_of_an_epoch_is_missed_by_its_tensors(tmp_path: Path) -> None:
    folder = write_layout(make_tiny_llama(tmp_path / "base"), tmp_path / "other", "hf_model.pt")
    (folder / "hf_model_0002_10.pt").unlink()
    refused(folder, "lacks the tensors")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "cannot read"),
        ("[]", "must hold a JSON object"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {}}', "weight_map must map"),
        ('{"weight_map": {"a": "../pytorch_model.bin"}}', "weight_map must map"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "weight_map must map"),
        ('{"weight_map": {"a": 3}}', "weight_map must map"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: str, reason: str) -> None:
    folder = write_layout(make_tiny_llama(tmp_path / "base"), tmp_path / "other", "pytorch_model.bin.index.json")
    (folder / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        load(folder)


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    folder = write_layout(make_tiny_llama(tmp_path / "base"), tmp_path / "other", "pytorch_model.bin.index.json")
    first = folder / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(first, weights_only=True)
    name = next(iter(tensors))
    torch.save({**tensors, "extra": torch.ones(1)}, first)
    refused(folder, "does not name the tensors extra")
    torch.save({key: tensor for key, tensor in tensors.items() if key != name}, first)
    refused(folder, rf"names tensors that are not in their files: {name} \(pytorch_model-00001-of-00002\.bin\)")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    folder = write_layout(base, tmp_path / "other", "pytorch_model-0000N.bin")
    first, second = halves(load_file(base / "model.safetensors"))
    name = next(iter(first))
    torch.save({**second, name: first[name]}, folder / "pytorch_model-00002-of-00002.bin")
    refused(folder, rf"repeats tensors of another file: {name}")


def test_parts_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    folder = write_layout(make_tiny_llama(tmp_path / "base"), tmp_path / "other", "ft-model.bin")
    shutil.copyfile(folder / "ft-model-00001-of-00002.bin", folder / "ft-model-00001-of-00003.bin")
    refused(folder, r"parts of several checkpoints \(\*-of-00002, \*-of-00003\)")


def test_weights_split_over_several_devices_are_refused_with_the_mend(tmp_path: Path) -> None:
    folder = write_layout(make_tiny_llama(tmp_path / "base"), tmp_path / "other", "original/consolidated.00.pth")
    original = folder / "original"
    shutil.copyfile(original / "consolidated.00.pth", original / "consolidated.01.pth")
    assert has_weights(folder)
    refused(folder, r"split over 2 files .*consolidated\.00\.pth to consolidated\.01\.pth.*Hugging Face format")


def test_a_damaged_safetensors_file_is_not_passed_over_for_another(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    refused(folder, "lacks the tensors")
