from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.errors import UserError
from trainer.config import RunConfig, TrainingOptions, load_run_config
from trainer.strict import parse_options


def test_only_the_model_and_the_data_are_required() -> None:
    config = parse_options(RunConfig, {"model": "m", "data_files": ["d.json"]})
    assert config.recipe == "lora"
    assert config.peak_learning_rate == 5e-4


def test_the_rate_goes_by_the_recipe_and_the_optimizer() -> None:
    dpo: dict[str, Any] = {"recipe": "dpo", "dpo": {"update": "full"}}
    assert parse_options(TrainingOptions, dpo).peak_learning_rate == 1e-6
    assert parse_options(TrainingOptions, {"recipe": "dpo"}).peak_learning_rate == 5e-5
    assert parse_options(TrainingOptions, {"optimizer": "adamw_8bit"}).peak_learning_rate == 5e-4
    assert parse_options(TrainingOptions, {"optimizer": "sgd"}).peak_learning_rate == 0.5
    assert parse_options(TrainingOptions, {"optimizer": "sgd", "learning_rate": 0.25}).peak_learning_rate == 0.25


def test_few_records_are_passed_over_more_often_unless_epochs_are_given() -> None:
    steps = {n: n * TrainingOptions().planned_epochs(n) for n in (1, 5, 16, 22)}
    assert steps == {1: 48, 5: 50, 16: 48, 22: 66}
    assert TrainingOptions(epochs=2).planned_epochs(1) == 2


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"learning_rate": -1.0}, "learning_rate", ["greater than 0", "-1.0"]),
        ({"learning_rate": float("nan")}, "learning_rate", ["finite"]),
        ({"recipe": "ppo"}, "recipe", ["'full'", "'lora'", "ppo"]),
        ({"lora": {"rank": 0}}, "lora.rank", ["greater than or equal to 1", "0"]),
        ({"lora": {"target_modules": ["w1"]}}, "lora", ["w1", "q_proj"]),
        ({"epoch": 3}, "epoch", ["unknown field", "epochs"]),
        ({"device": "gpu"}, "device", ["gpu"]),
        ({"batch_size": "many"}, "batch_size", ["many", "integer"]),
        ({"batch_size": True}, "batch_size", ["True"]),
    ],
)
def test_a_mistake_names_the_field_the_value_and_what_is_allowed(
    options: dict[str, Any], param: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(TrainingOptions, options)
    assert caught.value.param == param
    for word in words:
        assert word in str(caught.value)


def test_overrides_reach_nested_options_of_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata_files: [d.json]\nlora: {rank: 4}\n", encoding="utf-8")
    config = load_run_config(path, {"lora.alpha": 32, "epochs": 1})
    assert (config.lora.rank, config.lora.alpha, config.epochs) == (4, 32.0, 1)


@pytest.mark.parametrize(("text", "words"), [("a: [", "not valid YAML"), ("- a", "mapping"), ("1: a", "mapping")])
def test_a_file_that_is_no_mapping_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        load_run_config(path)
    assert str(path) in str(caught.value)


def test_an_override_through_a_plain_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata_files: [d.json]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.rank"):
        load_run_config(path, {"model.rank": 4})


def test_every_option_is_documented_where_it_is_defined() -> None:
    for name, field in RunConfig.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"column_map": {"question": "q"}}, "column_map", "maps a name among input, output, instruction"),
        ({"split": "train[:120%]"}, "split", "beyond 100%"),
        ({"prompt_template": {"user": ["only one"]}}, "prompt_template.user.1", "required"),
        ({"prompt_template": {"human": ["a", "b"]}}, "prompt_template.human.[key]", "'assistant'"),
        ({"data_format": "chatml"}, "data_format", "'sharegpt'"),
        ({"source": "arrow"}, "source", "'parquet'"),
        ({"lr_schedule": "step"}, "lr_schedule", "'constant'"),
        ({"warmup_steps": -1}, "warmup_steps", "greater than or equal to 0"),
    ],
)
def test_options_of_the_data_are_checked(options: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(RunConfig, {"model": "m", "data_files": ["d.json"], **options})
    assert words in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_on_input": True, "masking": "last"}, "train_on_input and masking: last say two things; remove one"),
        ({"merge_start": True}, "merge_start needs start_adapter"),
        ({"recipe": "dpo", "packed": True}, "packed: the recipe dpo compares whole answers, pair by pair; remove it"),
        (
            {"recipe": "dpo", "masking": "last"},
            "masking: the recipe dpo compares the answers in which a pair differs; remove it",
        ),
        (
            {"recipe": "dpo", "train_on_input": True},
            "train_on_input: the recipe dpo compares the answers in which a pair differs; remove it",
        ),
    ],
)
def test_options_that_do_not_go_together_are_told_without_all_the_others(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(RunConfig, {"model": "m", "data_files": ["d.json"], **options})
    assert str(caught.value) == words
    assert caught.value.param is None


def test_options_of_the_data_survive_yaml_and_json() -> None:
    options = {"prompt_template": {"user": ["a", "b"]}, "column_map": {"input": "q"}, "split": "train[:5%]"}
    config = parse_options(RunConfig, {"model": "m", "data_files": ["d.json"], **options})
    assert config.reading.prompt_template == {"user": ("a", "b")}
    assert config.reading.column("input") == "q"
    assert parse_options(RunConfig, yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
