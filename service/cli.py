"""The command `tuneserve`. Torch-free: engine and trainer are processes of their own."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

import yaml

from lm.errors import UserError
from service import __version__
from service.pull import MODELS, find_model, pull
from service.run_command import RECIPES, run_recipe
from service.server import serve
from service.settings import Settings, load_settings
from service.shipped import find_config
from trainer.config import ConfigLoader

USER_ERROR = 2
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. 2: the user's mistake, said in one line on stderr."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # children that import torch must survive a broken torch_npu
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        return _run_command(options, rest)
    except UserError as error:
        print(f"tuneserve: error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"tuneserve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tuneserve", description="Fine-tune language models and serve the result.")
    parser.add_argument("--version", action="version", version=f"tuneserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    command = commands.add_parser("serve", help="start the HTTP service", description="Start the HTTP service.")
    command.add_argument("--config", metavar="X.yaml", help="settings: a file, or the stock config `serve`")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"settings: {', '.join(Settings.model_fields)}"
    )

    command = commands.add_parser("run", help="run a recipe", description="Fine-tune in the foreground.")
    command.add_argument("recipe", choices=RECIPES, metavar="recipe", help=" or ".join(RECIPES))
    command.add_argument(
        "--config", required=True, metavar="X.yaml", help="a file, or a stock config: lora_smollm2 ..."
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options, such as lora.rank=4 output_dir=out"
    )

    command = commands.add_parser("pull", help="get a base model", description="Get a base model.")
    command.add_argument("model", help=" or ".join(MODELS))
    command.add_argument("--home", help="default: $TUNESERVE_HOME, or ~/.tuneserve")
    return parser


def _run_command(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "pull":
        _refuse(rest)
        home = {} if options.home is None else {"home": options.home}
        print(pull(find_model(options.model), load_settings(None, home, os.environ).home))
        return 0
    overrides = parse_overrides([*options.overrides, *rest])
    if options.command == "run":
        return run_recipe(options.recipe, options.config, overrides)
    config = None if options.config is None else find_config(options.config)
    settings = load_settings(config, overrides, os.environ)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return serve(settings)


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["lora.rank=4", "port=0"]` -> `{"lora.rank": 4, "port": 0}`: each value is read as YAML."""
    _refuse([word for word in words if "=" not in word or word.startswith("-")])
    overrides = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            overrides[key] = yaml.load(text, Loader=ConfigLoader)
        except yaml.YAMLError as error:
            raise UserError(f"{key}: {text!r} cannot be read: {error}", param=key) from error
    return overrides


def _refuse(words: list[str]) -> None:
    if words:
        raise UserError(f"unknown argument {words[0]!r}; options are written as key=value. See tuneserve --help")


if __name__ == "__main__":
    sys.exit(main())
