"""Folders of weights, loaded by us, judged, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm.checkpoint import load_weights, validate_weights
from lm.config import load_config
from lm.errors import UserError
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE
from tests.support.tiny import make_tiny_llama

IDS = torch.tensor([[5, 80, 17, 200, 33, 2, 9]])
BIN = "pytorch_model.bin"


def load(folder: Path) -> CausalLM:
    model = build_model(load_config(folder), device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
    load_weights(model, folder)
    return model


def logits(folder: Path) -> torch.Tensor:
    model = load(folder)
    with torch.no_grad():
        return model.logits(model(IDS, torch.arange(IDS.shape[1])[None]))


def refused(folder: Path, match: str) -> str:
    """By validation and by loading, in the same words."""
    for attempt in (lambda: validate_weights(folder, load_config(folder)), lambda: load(folder)):
        with pytest.raises(UserError, match=match) as caught:
            attempt()
        assert caught.value.param == "model"
    return str(caught.value)


def bin_folder(folder: Path, content: object = None, **overrides: Any) -> Path:
    """A tiny llama with a pytorch_model.bin: its own weights, changed by `content` if that is a table, or `content`."""
    make_tiny_llama(folder, **overrides)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    merged = {**tensors, **content} if isinstance(content, dict) else content
    torch.save(tensors if content is None else merged, folder / BIN)
    return folder
