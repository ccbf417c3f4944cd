"""A configuration of torchtune in our own terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError
from trainer.config import Recipe, TrainingOptions
from trainer.strict import parse_options
from trainer.torchtune import parts
from trainer.torchtune.fields import Collected, component_of, nearest
from trainer.torchtune.generation import GenerationConfig
from trainer.torchtune.keys import COMMON, GENERATION, PLACES, PROMPT, TRAINING, by_name
from trainer.torchtune.models import BUILDERS, PREFIX
from trainer.torchtune.overrides import COMPONENT, interpolate
from trainer.torchtune.reading import check_plain

RECIPES: dict[str, Recipe] = {"full_finetune_single_device": "full", "lora_finetune_single_device": "lora"}
"""torchtune's names of our recipes."""
GENERATE = "generate"

TRAINING_PLACES = ("dataset", "optimizer", "lr_scheduler", "loss", "metric_logger", "profiler")
TABLES = {"": by_name((*COMMON, *TRAINING, *GENERATION)), "prompt": by_name(PROMPT)}
TOP_LEVEL = (*TABLES[""], *PLACES, "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    options: dict[str, Any]
    """Fields of RunConfig; `model`, `data_files` and `tokenizer_file` as the configuration has them."""
    output_dir: str | None
    generation: GenerationConfig | None
    """Where the configuration has a prompt."""
    notes: tuple[str, ...]
    """What was mapped rather than taken as it is, a line each that begins with the key."""
    builder: str | None
    """The name behind model._component_."""
    checkpoint_type: str | None
    checkpoint_files: tuple[str, ...]


def is_torchtune(data: Mapping[str, Any]) -> bool:
    """Whether this is a configuration of torchtune, rather than one of our own."""
    values = data.values()
    return "checkpointer" in data or any(isinstance(value, dict) and COMPONENT in value for value in values)


def translate(data: dict[str, Any], *, recipe: str | None = None) -> Translation:
    """`data` for the recipe of torchtune's name, `generate`, `full`, `lora`, or None: what the builder says, else full.

    Raises UserError that names the key as the user wrote it. Reads no file: `checkpoint.compare` does.
    """
    data = interpolate(check_plain(data))
    unknown = next((key for key in data if key not in TOP_LEVEL), None)
    if unknown is not None:
        raise UserError(f"{unknown:.80}: unknown key; {nearest(unknown, TOP_LEVEL)}", param=unknown[:200])
    collected = Collected()
    builder = parts.read_model(data.get("model"), collected)
    files = parts.read_checkpointer(data.get("checkpointer"), collected)
    tokenizer = parts.read_tokenizer(data.get("tokenizer"), collected)
    kind = GENERATE if recipe == GENERATE else _recipe(recipe, builder, collected)
    if kind == GENERATE:
        _note_unused(data, (*TRAINING_PLACES, *by_name(TRAINING)), "generate", collected)
    else:
        _read_training(data, kind, collected)
    generation = _generation(data, collected, tokenizer, is_asked=kind == GENERATE)
    return Translation(
        options=collected.options,
        output_dir=_output_dir(data),
        generation=generation,
        notes=tuple(collected.notes),
        builder=builder,
        checkpoint_type=files.model_type,
        checkpoint_files=files.names,
    )


def _recipe(recipe: str | None, builder: str | None, collected: Collected) -> Recipe:
    is_lora = builder is not None and BUILDERS[builder].is_lora
    asked = RECIPES.get(recipe or "", recipe)
    if asked is None:
        asked = "lora" if is_lora else "full"
        collected.note(
            "recipe", f"{asked}, as {'model names' if builder else 'no builder is named in'} {builder or 'model'}"
        )
    if asked not in ("full", "lora"):
        raise UserError(f"recipe: {recipe!r:.80} is not known; {nearest(asked, [*RECIPES, GENERATE])}", param="recipe")
    if builder is not None and is_lora != (asked == "lora"):
        family, size = BUILDERS[builder].name.split(".")
        other = f"{PREFIX}{family}.{size.removeprefix('lora_') if is_lora else f'lora_{size}'}"
        raise UserError(
            f"model.{COMPONENT}: {builder} is no builder of the {asked} recipe; take {other}, or the other recipe",
            param=f"model.{COMPONENT}",
        )
    chosen: Recipe = "lora" if asked == "lora" else "full"
    collected.set("recipe", chosen, "recipe")
    if chosen == "full":
        collected.options.pop("lora", None)
    return chosen


def _read_training(data: dict[str, Any], recipe: str, collected: Collected) -> None:
    table = by_name((*COMMON, *TRAINING))
    collected.read({key: value for key, value in data.items() if key in table}, table)
    _note_unused(data, ("prompt", *by_name(GENERATION)), "training", collected)
    parts.read_scalars(data, collected)
    parts.read_dataset(data.get("dataset"), collected)
    parts.read_optimizer(data.get("optimizer"), data.get("lr_scheduler"), collected)
    for place in ("loss", "metric_logger", "profiler"):
        if data.get(place) is not None:
            _, component, group = component_of(place, data[place])
            collected.read(group, component.keys, place)
    _validate(collected)


def _validate(collected: Collected) -> None:
    """Raises UserError in the user's own names."""
    theirs = {name: value for name, value in collected.options.items() if name in TrainingOptions.model_fields}
    try:
        parse_options(TrainingOptions, theirs)
    except UserError as error:
        raise in_users_words(error, collected.origins) from error


def in_users_words(error: UserError, origins: Mapping[str, str]) -> UserError:
    """`error` about one of our options, about the key that the user wrote instead."""
    param = error.param or ""
    option = max((name for name in origins if param == name or param.startswith(f"{name}.")), key=len, default=None)
    if option is None:
        return error
    inner = param.removeprefix(option)
    return UserError(f"{origins[option]}{str(error).removeprefix(option)}", param=origins[option] + inner)


def _note_unused(data: Mapping[str, Any], names: tuple[str, ...], what: str, collected: Collected) -> None:
    unused = [name for name in names if data.get(name) is not None]
    if unused:
        collected.notes.append(f"{', '.join(unused)}: not used by {what}")


def _output_dir(data: Mapping[str, Any]) -> str | None:
    checkpointer = data.get("checkpointer")
    inner = checkpointer.get("output_dir") if isinstance(checkpointer, dict) else None
    path, value = ("checkpointer.output_dir", inner) if inner is not None else ("output_dir", data.get("output_dir"))
    if value is not None and (not isinstance(value, str) or not value or "\0" in value):
        raise UserError(f"{path}: a folder is expected (got {value!r:.80})", param=path)
    return value


def _generation(
    data: dict[str, Any], collected: Collected, tokenizer: parts.TokenizerPart, *, is_asked: bool
) -> GenerationConfig | None:
    prompt = data.get("prompt")
    if prompt is None and not is_asked:
        return None
    asked = Collected()
    table = by_name((*COMMON, *GENERATION))
    asked.read({key: value for key, value in data.items() if key in table and is_asked}, table)
    if is_asked:
        collected.notes += asked.notes
    fields = {
        "model_dir": collected.options["model"],
        "tokenizer_file": collected.options.get("tokenizer_file"),
        **{key: data[key] for key in ("device", "dtype", "seed", *_GENERATED) if key in data},
        **parts.read_prompt(prompt, tokenizer),
    }
    try:
        return parse_options(GenerationConfig, fields)
    except UserError as error:
        raise in_users_words(error, {"user": "prompt.user", "system": "prompt.system"}) from error


_GENERATED = ("max_new_tokens", "temperature", "top_k")
