"""What a YAML file on the command line means, whether it is one of ours or one of torchtune's. Torch-free."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.folder import user_path
from lm.layout import is_model_folder
from service.settings import load_settings
from service.shipped import find_config, find_data
from trainer.config import RunConfig
from trainer.option_groups import DatasetConfig
from trainer.strict import parse_options
from trainer.torchtune import RECIPES, Translation, apply_overrides, compare, is_torchtune, parse_yaml, translate
from trainer.torchtune.generation import GenerationConfig

OWN_KEYS = ("output_dir", "resume_from_checkpoint")
"""What a config of ours may say besides RunConfig."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    config: RunConfig
    output_dir: str | None
    is_torchtune: bool
    resume: bool = False
    """Whether the newest run in output_dir shall go on."""
    notes: tuple[str, ...] = ()


def read_file(name: str, words: Iterable[str] = ()) -> dict[str, Any]:
    """The file or stock config `name`, with key=value and ~key. Raises UserError."""
    path = find_config(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}", param="config") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}", param="config") from error
    return apply_overrides(parse_yaml(text, name=str(path)), words)


def plan_run(recipe: str, name: str, words: Sequence[str] = ()) -> PlannedRun:
    """A run of torchtune's recipe `recipe`, with every path found. Raises UserError."""
    data = read_file(name, words)
    return _torchtune_run(data, recipe) if is_torchtune(data) else _own_run(data, recipe)


def _own_run(data: dict[str, Any], recipe: str) -> PlannedRun:
    output_dir, resume = (data.pop(key, None) for key in OWN_KEYS)
    update = {"dpo": {"update": "full"}} if recipe.startswith("full_dpo") and "dpo" not in data else {}
    config = parse_options(RunConfig, {"recipe": RECIPES[recipe], **update, **data})
    if config.recipe != RECIPES[recipe]:
        raise UserError(f"recipe: the config says {config.recipe!r}, the command {RECIPES[recipe]!r}", param="recipe")
    if output_dir is not None and (not isinstance(output_dir, str) or not output_dir):
        raise UserError(f"output_dir: a folder is expected (got {output_dir!r})", param="output_dir")
    if resume is not None and not isinstance(resume, bool):
        message = f"resume_from_checkpoint: true or false is expected (got {resume!r})"
        raise UserError(message, param="resume_from_checkpoint")
    settings = load_settings(None, {"model": config.model}, os.environ)
    changes = {
        "model": str(settings.model_dir),
        "model_name": config.model_name or settings.model_name,
        "data_files": _found(config.data_files),
        "datasets": config.datasets and tuple(map(_with_files, config.datasets)),
        "validation": config.validation and _with_files(config.validation),
    }
    return PlannedRun(
        config=config.model_copy(update=changes), output_dir=output_dir, is_torchtune=False, resume=bool(resume)
    )


def _found(names: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(str(find_data(name)) for name in names)


def _with_files(dataset: DatasetConfig) -> DatasetConfig:
    return dataset.model_copy(update={"data_files": _found(dataset.data_files)})


def _torchtune_run(data: dict[str, Any], recipe: str) -> PlannedRun:
    translation = translate_here(data, recipe)
    options = translation.options
    config = parse_options(RunConfig, {**options, "model_name": Path(options["model"]).name})
    try:
        found = {
            "data_files": _found(config.data_files),
            "datasets": config.datasets and tuple(map(_with_files, config.datasets)),
            "validation": config.validation and _with_files(config.validation),
        }
    except UserError as error:
        raise UserError(f"dataset.{error}", param="dataset.data_files") from error
    return PlannedRun(
        config=config.model_copy(update=found),
        output_dir=translation.output_dir,
        is_torchtune=True,
        resume=translation.resume,
        notes=translation.notes,
    )


def translate_here(data: dict[str, Any], recipe: str | None) -> Translation:
    """A configuration of torchtune, compared with the checkpoint on this machine. Raises UserError."""
    translation = translate(data, recipe=recipe)
    folder = find_checkpoint(translation.options["model"])
    found = compare(translation, folder)
    return replace(found, options={**found.options, "model": str(folder)})


def find_checkpoint(name: str) -> Path:
    """A path, or the name of a model in `models` of the home. Raises UserError."""
    models = load_settings(None, {}, os.environ).models_dir
    for folder in (user_path(name), models / name):
        if folder.is_dir():
            return Path(os.path.abspath(folder))
    known = sorted(path.name for path in models.glob("*") if is_model_folder(path))
    raise UserError(
        f"checkpointer.checkpoint_dir: there is no folder {name}; a path, or a model in {models} "
        f"({'it holds ' + ', '.join(known) if known else 'it is empty'}). `tuneserve pull` gets one",
        param="checkpointer.checkpoint_dir",
    )


def plan_generation(name: str, words: Sequence[str] = ()) -> tuple[GenerationConfig, tuple[str, ...]]:
    """What to ask of which model, and the notes. Raises UserError."""
    data = read_file(name, words)
    if not is_torchtune(data):
        raise UserError(
            "config: generate takes a configuration of torchtune's shape, with checkpointer and prompt; "
            "`tuneserve cp generation y.yaml` makes one",
            param="config",
        )
    translation = translate_here(data, "generate")
    assert translation.generation is not None  # asked for by the recipe
    return translation.generation, translation.notes


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
