"""What a checkpoint says of itself: `tuneserve.json` for programs, README.md, its model card, for people. Torch-free.

Both say the same for the same run, whenever it ran and however often it was resumed: they hold no time and no path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lm.config_fields import read_json_object
from trainer.config import RunConfig, TrainingOptions

Kind = Literal["full", "adapter", "merged"]

FACTS_FILE, CARD_FILE = "tuneserve.json", "README.md"
FORMAT = 1
DATASET_FACTS = (
    *("fingerprint", "records", "tokens", "trained_tokens", "truncated", "skipped", "longest", "rows"),
    "validation_records",
)
FIGURES = {
    "loss": "Training loss of the last step",
    "token_accuracy": "Token accuracy of the last step",
    "reward_accuracy": "Reward accuracy of the last step",
    "reward_margin": "Reward margin of the last step",
    "validation_loss": "Validation loss",
    "validation_token_accuracy": "Validation token accuracy",
}
PRIVATE = {"tracking", "sample_prompts", "sample_max_tokens"}
"""Options that have no influence on the weights and need not travel with them."""
MAX_SHOWN = 200
METHODS = {"full": "full fine-tuning", "lora": "LoRA", "dpo": "DPO"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """Where in its run a checkpoint was made, and how good the model was."""

    step: int
    total_steps: int
    epoch: int
    final: bool
    trained_tokens: int
    """Since the start of the run."""
    loss: float
    token_accuracy: float | None = None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    validation_loss: float | None = None
    validation_token_accuracy: float | None = None
    dataset: Mapping[str, Any] = field(default_factory=dict)
    """What the run's `dataset` event says."""


def card_files(config: RunConfig, facts: CheckpointFacts, *, run: str, kind: Kind, base: Path) -> dict[str, str]:
    """The files that go into a checkpoint, by name. `run` is the run's or job's name, `base` the base model's folder."""
    told = describe(config, facts, run=run, kind=kind)
    return {
        FACTS_FILE: json.dumps(told, indent=2, ensure_ascii=False) + "\n",
        CARD_FILE: render_card(told, _license(base)),
    }


def describe(config: RunConfig, facts: CheckpointFacts, *, run: str, kind: Kind) -> dict[str, Any]:
    """The content of tuneserve.json."""
    numbers = asdict(facts)
    data = numbers.pop("dataset")
    figures = {name: numbers.pop(name) for name in FIGURES}
    options = config.model_dump(mode="json", include=set(TrainingOptions.model_fields) - PRIVATE, exclude_unset=True)
    return {
        "format": FORMAT,
        "job": run,
        "kind": kind,
        "base_model": config.model_name or Path(config.model).name,
        **_start(config),
        "recipe": config.recipe,
        **numbers,
        "losses": {name: figure for name, figure in figures.items() if figure is not None},
        "dataset": {
            "names": _dataset_names(config),
            **{name: data[name] for name in DATASET_FACTS if data.get(name) is not None},
        },
        "seed": config.seed,
        "options": options,
    }


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What the tuneserve.json of a checkpoint says; None where it has none. Raises UserError for a damaged one."""
    path = folder / FACTS_FILE
    return read_json_object(path) if path.is_file() else None


def render_card(told: Mapping[str, Any], license: str | None = None) -> str:
    """The model card, in the form that the Hugging Face hub reads."""
    adapter, base = told["kind"] == "adapter", told["base_model"]
    front: dict[str, Any] = {
        **({"license": license} if license else {}),
        "base_model": base,
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tuneserve", told["recipe"]],
    }
    what = "An adapter for" if adapter else "A fine-tuned version of"
    place = "the last" if told["final"] else f"step {told['step']} of {told['total_steps']}"
    return "\n".join(
        [
            *("---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", ""),
            *(f"# {_cell(told['job'])}, step {told['step']}", ""),
            f"{what} {_cell(base)}{_began(told)}, made by {METHODS[told['recipe']]} with TuneServe: {place} checkpoint of its run.",
            *("", "## Figures", "", *_table(_figures(told))),
            *("", "## Data", "", *_table(told["dataset"])),
            *("", "## Options", "", "Those not named had their defaults.", "", *_table(told["options"])),
            *("", "## Use", "", "```python", *_usage(adapter), "```", ""),
        ]
    )


def _start(config: RunConfig) -> dict[str, Any]:
    if config.start_adapter is None:
        return {}
    return {"start_adapter": Path(config.start_adapter).name, "merge_start": config.merge_start}


def _dataset_names(config: RunConfig) -> list[str]:
    """Of the hub's as they are called there, of files without their folders."""
    return [
        name
        for one in config.training_sets
        for name in ([one.hub_id] if one.hub_id else [Path(file).name for file in one.data_files or ()])
    ]


def _began(told: Mapping[str, Any]) -> str:
    if "start_adapter" not in told:
        return ""
    name = _cell(told["start_adapter"])
    is_merged = told["merge_start"] or told["kind"] == "full"
    return f" with the adapter {name} merged in" if is_merged else f", going on from the adapter {name}"


def _figures(told: Mapping[str, Any]) -> dict[str, Any]:
    figures = {title: told["losses"][name] for name, title in FIGURES.items() if name in told["losses"]}
    return {"Trained tokens": told["trained_tokens"], "Epoch": told["epoch"], **figures}


def _table(rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {_cell(name)} | {_cell(_shown(value))} |" for name, value in rows.items()]
    return ["| | |", "|---|---|", *lines] if lines else ["Not known."]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."


def _cell(text: str) -> str:
    """Text that neither ends a cell of a table nor is markup."""
    flat = " ".join(text.split())
    return "".join("\\" + character if character in "\\|`*_<>[]#" else character for character in flat)


def _usage(adapter: bool) -> list[str]:
    name, library = ("AutoPeftModelForCausalLM", "peft") if adapter else ("AutoModelForCausalLM", "transformers")
    return [f"from {library} import {name}", "", f'model = {name}.from_pretrained("PATH/OF/THIS/FOLDER")']


def _license(base: Path) -> str | None:
    """What the base's own card says."""
    card = base / CARD_FILE
    if not card.is_file():
        return None
    _, _, front = card.read_text(encoding="utf-8", errors="replace")[:65_536].partition("---\n")
    try:
        said = yaml.safe_load(front.partition("\n---")[0])
    except yaml.YAMLError:
        return None
    name = said.get("license") if isinstance(said, dict) else None
    return name if isinstance(name, str) else None
