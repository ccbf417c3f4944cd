"""A configuration of torchtune in our own terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError
from trainer.config import Recipe, TrainingOptions
from trainer.strict import parse_options
from trainer.torchtune import parts
from trainer.torchtune.data import is_preference, read_datasets
from trainer.torchtune.fields import Collected, component_of, in_users_words, nearest
from trainer.torchtune.generation import GenerationConfig
from trainer.torchtune.keys import COMMON, GENERATION, PLACES, PROMPT, TRAINING, by_name
from trainer.torchtune.models import BUILDERS, PREFIX
from trainer.torchtune.overrides import COMPONENT, interpolate
from trainer.torchtune.reading import check_plain
from trainer.torchtune.training import read_logger, read_loss, read_optimizer

RECIPES: dict[str, Recipe] = {
    "full_finetune_single_device": "full",
    "lora_finetune_single_device": "lora",
    "lora_dpo_single_device": "dpo",
    "full_dpo_distributed": "dpo",
    "full_finetune_distributed": "full",
    "lora_finetune_distributed": "lora",
    "lora_dpo_distributed": "dpo",
}
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
    resume: bool = False
    """Whether the run in output_dir shall go on, rather than a new one begin."""


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
    kind = None if recipe == GENERATE else _recipe(recipe, builder, data, collected)
    if kind is None:
        _note_unused(data, (*TRAINING_PLACES, *by_name(TRAINING)), "generate", collected)
    else:
        _read_training(data, kind, _update(recipe, builder), collected)
    generation = _generation(data, collected, tokenizer, is_asked=kind is None)
    return Translation(
        options=collected.options,
        output_dir=_output_dir(data),
        generation=generation,
        notes=tuple(collected.notes),
        builder=builder,
        checkpoint_type=files.model_type,
        checkpoint_files=files.names,
        resume=kind is not None and parts.is_resumed(data, files),
    )


def _recipe(recipe: str | None, builder: str | None, data: Mapping[str, Any], collected: Collected) -> Recipe:
    is_lora = builder is not None and BUILDERS[builder].is_lora
    asked = RECIPES.get(recipe or "", recipe)
    if asked is None:
        asked = "dpo" if is_preference(data.get("dataset")) else "lora" if is_lora else "full"
        reason = f"model names {builder}" if builder else "no builder is named in model"
        collected.note("recipe", f"{asked}, as {'dataset holds preferences' if asked == 'dpo' else reason}")
    if asked not in ("full", "lora", "dpo"):
        raise UserError(f"recipe: {recipe!r:.80} is not known; {nearest(asked, [*RECIPES, GENERATE])}", param="recipe")
    if recipe in RECIPES and recipe.endswith("distributed"):
        collected.note("recipe", f"{recipe} goes over one device here")
    wants_lora = asked == "lora" or (recipe or "").startswith("lora_dpo")
    wants_full = asked == "full" or (recipe or "").startswith("full_dpo")
    if builder is not None and (wants_full if is_lora else wants_lora):
        family, size = BUILDERS[builder].name.split(".")
        other = f"{PREFIX}{family}.{size.removeprefix('lora_') if is_lora else f'lora_{size}'}"
        raise UserError(
            f"model.{COMPONENT}: {builder} is no builder of the {recipe or asked} recipe; take {other}, or the other recipe",
            param=f"model.{COMPONENT}",
        )
    chosen: Recipe = "lora" if asked == "lora" else "dpo" if asked == "dpo" else "full"
    collected.set("recipe", chosen, "recipe")
    if not is_lora:
        collected.options.pop("lora", None)
    return chosen


def _update(recipe: str | None, builder: str | None) -> str:
    """What DPO trains: as the recipe or the builder is named, else an adapter."""
    is_full = builder is not None and not BUILDERS[builder].is_lora
    return "full" if is_full or (recipe or "").startswith("full_dpo") else "lora"


def _read_training(data: dict[str, Any], kind: Recipe, update: str, collected: Collected) -> None:
    table = by_name((*COMMON, *TRAINING))
    collected.read({key: value for key, value in data.items() if key in table}, table)
    _note_unused(data, ("prompt", *by_name(GENERATION)), "training", collected)
    parts.read_scalars(data, collected)
    read_datasets(data, kind, collected)
    read_optimizer(data.get("optimizer"), data.get("lr_scheduler"), collected)
    read_loss(data.get("loss"), kind, update, collected)
    read_logger(data.get("metric_logger"), collected)
    if data.get("profiler") is not None:
        _, component, group = component_of("profiler", data["profiler"])
        collected.read(group, component.keys, "profiler")
    if kind == "dpo":
        parts.read_reference(data.get("ref_checkpointer"), collected.options["model"])
    elif data.get("ref_checkpointer") is not None:
        collected.note("ref_checkpointer", f"not used by {kind}")
    _check_in_backward(collected)
    _validate(collected)


def _check_in_backward(collected: Collected) -> None:
    """Raises UserError for what torchtune refuses, too."""
    options, name = collected.options, "optimizer_in_bwd"
    if options.get("optimizer_in_backward") is not True:
        options.pop("optimizer_in_backward", None) if options.get("optimizer_in_backward") is None else None
        return
    if options.get("max_grad_norm") is not None:
        raise UserError(f"{name}: the norm is known too late to clip; remove clip_grad_norm", param=name)
    if options.get("gradient_accumulation_steps", 1) != 1:
        raise UserError(f"{name}: no gradient is kept; write gradient_accumulation_steps: 1", param=name)


def _validate(collected: Collected) -> None:
    """Raises UserError in the user's own names."""
    theirs = {name: value for name, value in collected.options.items() if name in TrainingOptions.model_fields}
    try:
        parse_options(TrainingOptions, theirs)
    except UserError as error:
        raise in_users_words(error, collected.origins) from error


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
