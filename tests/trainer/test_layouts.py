"""Runs whose base is not safetensors: the same training, the same results, folders that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.layouts import write_layout
from tests.support.runs import events, losses, make_run, train_here
from tests.support.tiny import make_tiny_llama

IDS = torch.tensor([[5, 80, 17, 200, 33, 2, 9]])
LAYOUTS = ["pytorch_model.bin.index.json", "hf_model.pt", "consolidated.00.pth"]


def published(folder: Path, base: Path, recipe: str) -> tuple[list[float], dict[str, Path]]:
    """Losses, and the published folders by kind."""
    run = make_run(folder, base, recipe=recipe, epochs=1, learning_rate=1e-2)
    train_here(run)
    return losses(run), {event["kind"]: run.path / event["path"] for event in events(run, "checkpoint")}


def their_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_base_in_another_layout_is_trained_as_its_safetensors_are(tmp_path: Path, layout: str, recipe: str) -> None:
    base = make_tiny_llama(tmp_path / "base", tie_word_embeddings=False)
    other = write_layout(base, tmp_path / "other", layout)
    kind = {"full": "full", "lora": "merged"}[recipe]
    curves, folders = zip(
        *(published(tmp_path / folder.name / "run", folder, recipe) for folder in (base, other)), strict=True
    )
    assert curves[0] == curves[1]
    expected, got = (load_file(folder[kind] / "model.safetensors") for folder in folders)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    loader: Any = AutoModelForCausalLM
    model, report = loader.from_pretrained(folders[1][kind], output_loading_info=True)
    assert not any(report.values())
    assert AutoTokenizer.from_pretrained(folders[1][kind]).encode("hello")
    if recipe == "lora":
        adapted = PeftModel.from_pretrained(loader.from_pretrained(base), folders[1]["adapter"])
        torch.testing.assert_close(their_logits(adapted), their_logits(model), rtol=1e-3, atol=1e-4)
