"""An engine whose models are not safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.engine.messages import ModelLoaded, ModelLoadFailed
from tests.support.engines import Driver, tiny_engine_config
from tests.support.layouts import write_layout

PROMPT = [5, 80, 17, 200, 33]


@pytest.mark.parametrize("layout", ["pytorch_model.bin", "hf_model.pt", "original/consolidated.00.pth"])
def test_every_layout_is_served_like_the_safetensors(tmp_path: Path, tiny: Path, layout: str) -> None:
    folder = write_layout(tiny, tmp_path / "other", layout)
    driver = Driver(tiny_engine_config(folder))
    loaded, reference = driver.load(folder, "other"), driver.load(tiny)
    assert isinstance(loaded, ModelLoaded)
    assert isinstance(reference, ModelLoaded)
    assert loaded.weights_hash == reference.weights_hash
    assert driver.generate(PROMPT, "other") == driver.generate(PROMPT)


def test_a_model_that_cannot_be_read_leaves_the_served_one_alone(tmp_path: Path, tiny: Path) -> None:
    folder = write_layout(tiny, tmp_path / "other", "pytorch_model.bin")
    driver = Driver(tiny_engine_config(tiny))
    driver.load(tiny)
    expected = driver.generate(PROMPT)
    torch.save({"model.norm.weight": Path("x")}, folder / "pytorch_model.bin")
    outcome = driver.load(folder, "other")
    assert isinstance(outcome, ModelLoadFailed)
    assert "refused: it asks for pathlib" in outcome.message
    assert driver.generate(PROMPT) == expected
