"""The command `tuneserve`. Torch-free: engine and trainer are processes of their own."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import yaml

from lm.config_fields import read_json_object
from lm.errors import UserError
from lm.folder import user_path
from lm.gguf_export import GgufType
from service import __version__
from service.config_commands import copy_config, list_configs, validate_config
from service.generate_command import run_generate
from service.model_facts import MODEL_NAME
from service.pull import MODELS, pull_any
from service.run_command import run_recipe
from service.run_config import plan_generation, print_notes
from service.server import serve
from service.settings import PREFIX, SECRETS, Settings, load_settings
from service.shipped import find_config
from trainer.strict import ConfigLoader
from trainer.torchtune import GENERATE, RECIPES

USER_ERROR = 2
INTERRUPTED = 130

TORCHRUN = ("nnodes", "nproc", "node_rank", "rdzv", "standalone", "master", "max_restarts", "monitor_interval", "role")
"""How torchrun's arguments begin, which `tune run` takes before the recipe."""
OTHER_RECIPES = ("distributed", "ppo", "grpo", "knowledge_distillation", "qat", "quantize", "eleuther")

Command = Callable[[argparse.Namespace, list[str]], int]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. 2: the user's mistake, said in one line on stderr."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # children that import torch must survive a broken torch_npu
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        command: Command = options.handler
        return command(options, rest)
    except UserError as error:
        print(f"tuneserve: error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"tuneserve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tuneserve", description="Fine-tune language models and serve the result.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tuneserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    command = _command(commands, "serve", "start the HTTP service", _serve)
    command.add_argument("--config", metavar="X.yaml", help="settings: a file, or the stock config `serve`")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"settings: {', '.join(Settings.model_fields)}"
    )

    command = _command(commands, "run", "run a recipe in the foreground, with a config of ours or of torchtune", _run)
    command.add_argument("recipe", metavar="recipe", help=", ".join((*RECIPES, GENERATE)))
    _add_config(command, "a file, or a stock config: lora_smollm2 ... (`tuneserve ls`)")

    command = _command(commands, GENERATE, "answer one prompt in the terminal", _generate)
    _add_config(command, "a file of torchtune's shape, or the stock config `generation`")

    _command(commands, "ls", "list recipes and stock configs", _ls)

    command = _command(commands, "cp", "copy a stock config", _cp)
    command.add_argument("name", help="a stock config (`tuneserve ls`)")
    command.add_argument("destination", nargs="?", help="a file or folder; default: the present folder")
    command.add_argument("-n", "--no-clobber", action="store_true", help="leave a file alone that is there already")
    command.add_argument("-f", "--force", action="store_true", help="write over a file that is there already")
    command.add_argument("--make-parents", action="store_true", help="make the folders that are missing")

    command = _command(commands, "validate", "check a config, and say what becomes of its keys", _validate)
    _add_config(command, "a file, or a stock config")

    command = _command(commands, "pull", "get a base model", _pull)
    command.add_argument("model", help=f"{', '.join(MODELS)}; a GGUF file; a model folder; or org/name of Hugging Face")
    command.add_argument("--name", help="what the model is called here; default: the source's own name")
    command.add_argument("--home", help="default: $TUNESERVE_HOME, or ~/.tuneserve")

    command = _command(
        commands, "export", "write a checkpoint as a GGUF file, for llama.cpp and its relatives", _export
    )
    command.add_argument("checkpoint", help="a model folder, such as checkpoints/step_30 of a run, or an adapter's")
    command.add_argument("target", metavar="OUT.gguf", help="the file; it must not be there yet")
    command.add_argument("--type", choices=get_args(GgufType), default="f16", help="of the matrices; default: f16")
    command.add_argument("--base", help="an adapter's base model; default: the one that it names, in the home")
    return parser


def _command(commands: Any, name: str, text: str, handler: Command) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    command.set_defaults(handler=handler)
    return command


def _add_config(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--config", metavar="X.yaml", help=text)
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="options, such as lora.rank=4 output_dir=out; ~key removes one",
    )


def _serve(options: argparse.Namespace, rest: list[str]) -> int:
    overrides = parse_overrides([*options.overrides, *rest])
    config = None if options.config is None else find_config(options.config)
    settings = load_settings(config, overrides, os.environ)
    for name in SECRETS:
        os.environ.pop(f"{PREFIX}{name.upper()}", None)  # the engine and the trainers need none
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log the URLs of webhooks, which may hold a token
    return serve(settings)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse_torchrun(rest)
    if options.recipe == GENERATE:
        return _generate(options, rest)
    if options.recipe not in RECIPES:
        known = ", ".join((*RECIPES, GENERATE))
        is_known = any(word in options.recipe for word in OTHER_RECIPES)
        reason = (
            "torchtune's recipe is not done here: training is supervised or DPO, on one device"
            if is_known
            else "unknown"
        )
        raise UserError(f"recipe: {options.recipe!r:.80}: {reason}; known are {known}", param="recipe")
    config, words = _config_and_words(options, rest)
    return run_recipe(options.recipe, config, words)


def _generate(options: argparse.Namespace, rest: list[str]) -> int:
    config, words = _config_and_words(options, rest)
    generation, notes = plan_generation(config, words)
    print_notes(notes)
    return run_generate(generation)


def _ls(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    list_configs()
    return 0


def _cp(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    flags = {"no_clobber": options.no_clobber, "force": options.force, "make_parents": options.make_parents}
    copy_config(options.name, options.destination, **flags)
    return 0


def _validate(options: argparse.Namespace, rest: list[str]) -> int:
    config, words = _config_and_words(options, rest)
    validate_config(config, words)
    return 0


def _pull(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    home = {} if options.home is None else {"home": options.home}
    print(pull_any(options.model, load_settings(None, home, os.environ).home, options.name))
    return 0


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    words = [options.checkpoint, options.target, "--type", options.type]
    base = options.base or _adapters_base(user_path(options.checkpoint))
    words += [] if base is None else ["--base", str(base)]
    return subprocess.run([sys.executable, "-m", "trainer.export", *words], check=False).returncode


def _adapters_base(folder: Path) -> Path | None:
    """The model in the home that an adapter names as its base."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    name = str(read_json_object(config).get("base_model_name_or_path"))
    base = load_settings(None, {}, os.environ).home / "models" / name
    return base if MODEL_NAME.fullmatch(name) and base.is_dir() else None


def _config_and_words(options: argparse.Namespace, rest: list[str]) -> tuple[str, list[str]]:
    """The config, which may stand there without --config, and the overrides."""
    words = [*options.overrides, *rest]
    if options.config is not None:
        return options.config, words
    if words and "=" not in words[0] and words[0][0:1] not in ("~", "-"):
        return words[0], words[1:]
    raise UserError("config: a file or a stock config is needed: --config X.yaml", param="config")


def _refuse_torchrun(words: list[str]) -> None:
    for word in words:
        if word.startswith("--") and word[2:].replace("-", "_").startswith(TORCHRUN):
            raise UserError(f"{word} is an argument of torchrun; training goes over one device here: leave it out")


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["lora.rank=4", "port=0"]` -> `{"lora.rank": 4, "port": 0}`: each value is read as YAML."""
    _refuse([word for word in words if "=" not in word or word.startswith("-")])
    overrides = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            overrides[key] = text if key in SECRETS else yaml.load(text, Loader=ConfigLoader)
        except yaml.YAMLError as error:
            raise UserError(f"{key}: {text!r} cannot be read: {error}", param=key) from error
    return overrides


def _refuse(words: list[str]) -> None:
    if words:
        raise UserError(f"unknown argument {words[0]!r}; options are written as key=value. See tuneserve --help")


if __name__ == "__main__":
    sys.exit(main())
