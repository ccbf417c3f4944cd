"""`tuneserve ls`, `cp` and `validate`: stock configs, and what a configuration means. Torch-free."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

from lm.errors import UserError
from lm.folder import user_path
from service.run_config import OWN_KEYS, find_checkpoint, read_file, translate_here
from service.settings import Settings
from service.shipped import find_config, stock_configs
from trainer.config import RunConfig
from trainer.strict import parse_options
from trainer.torchtune import GENERATE, RECIPES, is_torchtune, translate

SERVE = "serve"


def list_configs() -> None:
    """Print every command of `tuneserve run` with its stock configs, as `tune ls` does."""
    by_command: dict[str, list[str]] = {name: [] for name in (*RECIPES, GENERATE, SERVE)}
    for name in stock_configs():
        by_command[_command_of(read_file(name))].append(name)
    width = max(map(len, by_command)) + 4
    print(f"{'RECIPE':{width}}CONFIG")
    for command, names in by_command.items():
        for number, name in enumerate(names or ["-"]):
            print(f"{command if number == 0 else '':{width}}{name}")


def _command_of(data: dict[str, Any]) -> str:
    if is_torchtune(data):
        return GENERATE if "dataset" not in data else _recipe_of(translate(data).options["recipe"])
    return SERVE if data.keys() <= Settings.model_fields.keys() else _recipe_of(data.get("recipe", "lora"))


def _recipe_of(recipe: object) -> str:
    return next((name for name, ours in RECIPES.items() if ours == recipe), str(recipe))


def copy_config(name: str, destination: str | None, *, no_clobber: bool, force: bool, make_parents: bool) -> None:
    """Copy a stock config, to `destination` or into the present folder. Raises UserError."""
    if name in RECIPES or name == GENERATE + ".py":
        raise UserError(f"config: {name} is a recipe, and recipes are no files here; `tuneserve ls` lists the configs")
    source = find_config(name)
    target = user_path(destination or source.name)
    if target.is_dir():
        target /= source.name
    target = target if target.suffix else target.with_suffix(".yaml")
    if target.exists() and no_clobber:
        print(f"{target} exists already and was left alone", file=sys.stderr)
        return
    if target.exists() and not force:
        raise UserError(f"destination: {target} exists already; name another, or add --force")
    if not target.parent.is_dir():
        if not make_parents:
            raise UserError(f"destination: there is no folder {target.parent}; make it, or add --make-parents")
        target.parent.mkdir(parents=True)
    shutil.copyfile(source, target)
    print(f"Copied file to {target}")


def validate_config(name: str, words: Sequence[str]) -> None:
    """Print whether a configuration is good, and what becomes of what is not taken as it is. Raises UserError."""
    data = read_file(name, words)
    if not is_torchtune(data):
        model = Settings if data.keys() <= Settings.model_fields.keys() else RunConfig
        parse_options(model, {key: value for key, value in data.items() if key not in OWN_KEYS or model is Settings})
        print("Config is well-formed!")
        return
    command = GENERATE if "dataset" not in data else None
    translation = translate(data, recipe=command)
    try:
        find_checkpoint(translation.options["model"])
    except UserError as error:
        notes = (*translation.notes, f"{error}, so the configuration was not compared with the model")
    else:
        notes = translate_here(data, command).notes
    print("Config is well-formed!")
    for note in notes:
        print(f"note: {note}")
