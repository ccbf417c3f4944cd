"""A configuration beside the checkpoint that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from tests.support.torchtune_configs import LORA, stock
from trainer.torchtune import compare, translate
from trainer.torchtune.models import SHAPES


def model_folder(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES["llama3.llama3_8b"], "model_type": model_type, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").touch()
    return folder


def test_a_configuration_that_fits_its_checkpoint_passes_and_the_tokenizer_is_told(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (tmp_path / "tokenizer.model").touch()
    translation = translate(stock(f"tokenizer.path={tmp_path}/tokenizer.model"), recipe=LORA)
    found = compare(translation, folder)
    assert found.options["tokenizer_file"] == str(tmp_path / "tokenizer.model")
    assert "is read" in found.notes[-1]
    (folder / "tokenizer.json").touch()
    found = compare(translation, folder)
    assert "tokenizer_file" not in found.options
    assert "preferred" in found.notes[-1]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"num_hidden_layers": 16}, "model._component_", "num_hidden_layers is 16 there, 32 in the builder"),
        (SHAPES["llama3_2.llama3_2_1b"], "model._component_", "take torchtune.models.llama3_2.llama3_2_1b, or remove"),
        ({"model_type": "qwen2"}, "model._component_", "model_type is 'qwen2' there"),
        ({"num_key_value_heads": None}, "model._component_", "num_key_value_heads"),
    ],
)
def test_a_builder_that_does_not_fit_its_checkpoint_is_refused(
    tmp_path: Path, changes: dict[str, Any], param: str, message: str
) -> None:
    folder = model_folder(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        compare(translate(stock(), recipe=LORA), folder)
    assert caught.value.param == param
    assert message in str(caught.value)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    for words, param in (
        (["checkpointer.checkpoint_files=[x.bin]"], "checkpointer.checkpoint_files"),
        ([f"checkpointer.checkpoint_files=[{'x' * 5000}]"], "checkpointer.checkpoint_files"),
        (["checkpointer.checkpoint_files=[/etc/passwd]"], "checkpointer.checkpoint_files"),
        (["checkpointer.checkpoint_files=[../x]"], "checkpointer.checkpoint_files"),
        (["tokenizer.path=/none/tokenizer.model"], "tokenizer.path"),
        (["checkpointer.model_type=MISTRAL"], "checkpointer.model_type"),
    ):
        with pytest.raises(UserError) as caught:
            compare(translate(stock(*words), recipe=LORA), folder)
        assert caught.value.param == param
