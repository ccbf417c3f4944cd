"""`tuneserve ls`, `cp` and `validate`, and where a run of torchtune's configuration goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lm.errors import UserError
from service.cli import main
from service.run_command import run_folder_of
from service.run_config import PlannedRun, plan_generation, plan_run
from service.shipped import find_config, stock_configs
from tests.support.scripted_engine import write_model_without_weights
from trainer.torchtune import RECIPES

CONFIG = """
output_dir: {home}/models/base
device: cpu
dtype: fp32
dataset: {{_component_: torchtune.datasets.instruct_dataset, source: json, data_files: data.json}}
tokenizer: {{_component_: torchtune.models.llama3.llama3_tokenizer, path: "${{output_dir}}/original/tokenizer.model"}}
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: base
  output_dir: {home}/out
epochs: 1
optimizer: {{_component_: bitsandbytes.optim.PagedAdamW8bit, lr: 2e-5}}
prompt: {{system: null, user: Hi}}
"""
FULL = "full_finetune_single_device"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with one model, and the present folder with x.yaml and its data."""
    write_model_without_weights(tmp_path / "models" / "base")
    (tmp_path / "x.yaml").write_text(CONFIG.format(home=tmp_path))
    (tmp_path / "data.json").write_text(json.dumps([{"input": "a", "output": "b"}]))
    monkeypatch.setenv("TUNESERVE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ls_lists_every_stock_config_under_its_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[-1] for line in lines[1:]} - {"-"} == {*stock_configs()}
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["RECIPE", *RECIPES, "generate", "serve"]


def test_cp_copies_a_config_and_spares_what_is_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", "generation", "./y.yaml"]) == 0
    assert capsys.readouterr().out == "Copied file to y.yaml\n"
    assert Path("y.yaml").read_bytes() == find_config("generation").read_bytes()
    Path("y.yaml").write_text("mine")
    assert main(["cp", "generation", "y.yaml", "-n"]) == 0
    assert main(["cp", "generation", "y.yaml"]) == 2
    assert Path("y.yaml").read_text() == "mine"
    assert main(["cp", "generation", "y.yaml", "--force"]) == 0
    assert Path("y.yaml").read_text() != "mine"
    assert main(["cp", "llama3_2/1B_lora_cpu"]) == 0
    assert main(["cp", "llama3_2/1B_lora_cpu.yaml", "new/folder/z", "--make-parents"]) == 0
    assert Path("1B_lora_cpu.yaml").read_bytes() == Path("new/folder/z.yaml").read_bytes()


@pytest.mark.parametrize("words", [["x.yaml"], ["--config", "x.yaml", "epochs=3", "~prompt"]])
def test_validate_says_what_becomes_of_the_keys(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["validate", *words]) == 0
    first, *notes = capsys.readouterr().out.splitlines()
    assert first == "Config is well-formed!"
    assert all(note.startswith("note: ") for note in notes)
    assert any("PagedAdamW8bit is adamw_8bit" in note for note in notes)
    assert any("tokenizer.json" in note and "preferred" in note for note in notes)


@pytest.mark.parametrize("name", ["serve", "lora_smollm2", "llama3_2/1B_lora_cpu", "generation"])
def test_stock_configs_are_valid(home: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["validate", name]) == 0
    assert capsys.readouterr().out.startswith("Config is well-formed!\n")


def test_validate_compares_with_the_model_that_is_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "x.yaml", "model._component_=torchtune.models.llama3.llama3_8b"]) == 2
    assert "does not fit the checkpoint" in capsys.readouterr().err


def test_a_run_finds_model_data_and_overrides(home: Path) -> None:
    planned = plan_run(FULL, "x.yaml", ["epochs=4", "optimizer=torch.optim.AdamW", "lr_scheduler=null"])
    config = planned.config
    assert (config.model, config.model_name) == (str(home / "models" / "base"), "base")
    assert (config.data_files, config.epochs, config.learning_rate) == ((str(home / "data.json"),), 4, 2e-5)
    assert planned.output_dir == f"{home}/out"
    with pytest.raises(UserError, match=r"dataset\.data_files: there is no file none"):
        plan_run(FULL, "x.yaml", ["dataset.data_files=none"])
    generation, _ = plan_generation("x.yaml", ["prompt.user=Hello"])
    assert (generation.model_dir, generation.user) == (config.model, "Hello")


def planned_at(home: Path, output_dir: Path, *, is_torchtune: bool = True) -> PlannedRun:
    config = plan_run(FULL, "x.yaml").config
    return PlannedRun(config=config, output_dir=str(output_dir), is_torchtune=is_torchtune)


def test_a_run_goes_into_output_dir_or_into_a_folder_in_it_where_the_model_lies_there(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_folder_of(planned_at(home, home / "out")) == home / "out"
    (home / "out").mkdir()
    assert run_folder_of(planned_at(home, home / "out")) == home / "out"
    assert capsys.readouterr().err == ""
    inside = run_folder_of(planned_at(home, home / "models" / "base"))
    assert inside.parent == home / "models" / "base"
    assert f"the run goes into {inside.name} in it" in capsys.readouterr().err


def test_the_next_run_with_the_same_output_dir_goes_beside_the_one_that_is_there(home: Path) -> None:
    (home / "out").mkdir()
    (home / "out" / "result.json").touch()
    assert run_folder_of(planned_at(home, home / "out")).parent == home / "out"


def test_a_run_does_not_go_over_files_of_others(home: Path) -> None:
    with pytest.raises(UserError, match="is not an empty folder"):
        run_folder_of(planned_at(home, home / "models" / "base", is_torchtune=False))
    with pytest.raises(UserError, match="is not an empty folder"):
        run_folder_of(planned_at(home, home / "x.yaml"))


def test_a_config_may_stand_without_its_option(home: Path) -> None:
    data = yaml.safe_load(find_config("configs/llama3_2/1B_lora_cpu.yaml").read_text())
    assert data["recipe"] == "lora"
    assert main(["run", FULL, "x.yaml", "dataset.data_files=none"]) == 2


def test_the_home_of_nobody_is_a_path_that_is_not_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["~nobody-of-that-name/x.yaml"], ["x.yaml", "checkpointer.checkpoint_dir=~nobody-of-that-name/m"]):
        assert main(["run", FULL, "--config", *words]) == 2
        assert "~nobody-of-that-name" in capsys.readouterr().err
