"""Checkpoints and adapters as GGUF files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm.adapter import save_adapter
from lm.lora import LoraSpec, add_lora, lora_parameters
from lm.model import CausalLM
from tests.support.tiny import load_tiny_model
from trainer.export import export_checkpoint, main

IDS = torch.arange(40)[None]


@torch.inference_mode()
def logits(model: CausalLM) -> torch.Tensor:
    return model.eval().logits(model(IDS, IDS))


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CausalLM]:
    """An adapter that changes much, and the model with it."""
    model = load_tiny_model(tiny_llama)
    add_lora(model, LoraSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "up_proj")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in lora_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("adapters") / "step_3"
    save_adapter(model, folder, base_model=str(tiny_llama))
    return folder, model


@pytest.mark.parametrize("is_named", [True, False])
def test_an_adapter_is_merged_into_its_base(
    tmp_path: Path, tiny_llama: Path, adapter: tuple[Path, CausalLM], is_named: bool
) -> None:
    folder, model = adapter
    export_checkpoint(folder, tmp_path / "out.gguf", "f32", base=None if is_named else tiny_llama)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    stored = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    with torch.inference_mode():
        assert (stored(IDS).logits - logits(model)).abs().max() < 1e-4
    assert (logits(model) - logits(load_tiny_model(tiny_llama))).abs().max() > 1


def test_an_adapter_whose_base_is_nowhere_is_refused(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_tiny_model(tiny_llama)
    add_lora(model, LoraSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj",)))
    save_adapter(model, tmp_path / "step_1", base_model="org/tiny")
    assert main([str(tmp_path / "step_1"), str(tmp_path / "out.gguf")]) == 2
    assert "is an adapter on 'org/tiny', which is no folder here; give its folder as --base" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_file_that_is_there_stays(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.gguf").write_text("mine", encoding="utf-8")
    assert main([str(tiny_llama), str(tmp_path / "out.gguf")]) == 2
    assert capsys.readouterr().err == f"tuneserve: error: {tmp_path / 'out.gguf'} exists already\n"
    assert (tmp_path / "out.gguf").read_text(encoding="utf-8") == "mine"


def test_a_folder_that_is_no_model_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), str(tmp_path / "out.gguf")]) == 2
    assert capsys.readouterr().err == f"tuneserve: error: there is no model folder {tmp_path / 'nothing'}\n"


def test_a_damaged_adapter_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "step_1" / "adapter_config.json"
    config.parent.mkdir()
    config.write_text("{", encoding="utf-8")
    assert main([str(config.parent), str(tmp_path / "out.gguf")]) == 2
    assert capsys.readouterr().err.startswith(f"tuneserve: error: cannot read {config}: ")
