"""Adapters as folders in PEFT's format: written, read to be trained further, and merged into a model's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lm.errors import NotFoundError, UserError
from lm.folder import publish
from lm.lora import LoraSpec, add_lora, lora_parameters, row_norms, spec_of, target_layers, updated
from lm.model import CausalLM
from lm.weight_files import read_header

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
HARMLESS_OPTIONS = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "megatron_core", "megatron_config", "ensure_weight_tying", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_rslora", "use_dora"),
    }
)
"""PEFT's options that do not change how an adapter's tensors are applied, or that are read here."""
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others change the base weights
}
"""The other options may only have these values, or be empty: `rank_pattern`, and what is yet to come."""


def save_adapter(model: CausalLM, final: Path, *, base_model: str) -> None:
    """Publish the updates of `model` as the PEFT folder `final`.

    `base_model` is the name or folder of the base that PEFT's `from_pretrained` looks up. Raises FileExistsError when
    `final` exists.
    """
    with publish(final) as folder:
        write_adapter(model, folder, base_model=base_model)


def write_adapter(model: CausalLM, folder: Path, *, base_model: str) -> None:
    """The same files into a folder that is there."""
    spec = spec_of(model)
    tensors = {
        PEFT_PREFIX + name: parameter.detach().cpu().contiguous() for name, parameter in lora_parameters(model).items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": sorted(spec.target_modules),
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_adapter(model: CausalLM, folder: Path) -> None:
    """Raise what `merge_adapter` would refuse; nothing is changed."""
    _adapted_layers(model, folder, _read_config(folder))


def merge_adapter(model: CausalLM, folder: Path) -> None:
    """Put the updates in the PEFT folder `folder` into the weights of the plain `model`, computed in fp32.

    Raises NotFoundError when there is no such folder, and UserError, before a weight has changed, when it is no LoRA
    or DoRA adapter or does not fit the model.
    """
    spec = _read_config(folder)
    layers = _adapted_layers(model, folder, spec)
    tensors = load_file(folder / WEIGHTS_FILE)
    with torch.no_grad():
        for name, linear in layers.items():
            parts = [tensors[key].to(linear.weight.device) for key in _keys(name, spec)]
            weight = updated(linear.weight, parts[0], parts[1], spec.scaling)
            if spec.use_dora:
                weight *= (parts[2].float() / row_norms(weight))[:, None]
            linear.weight.copy_(weight)


def add_adapter(model: CausalLM, folder: Path, *, dropout: float) -> None:
    """Freeze the plain `model` and put the updates in the PEFT folder `folder` beside its layers, to train them on.

    Rank, scaling and targets are the folder's. Raises as `merge_adapter` does, and then nothing is changed.
    """
    spec = _read_config(folder)
    layers = _adapted_layers(model, folder, spec)
    add_lora(model, replace(spec, dropout=dropout, target_modules=_targets(target_layers(model), layers)))
    tensors = load_file(folder / WEIGHTS_FILE)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(tensors[PEFT_PREFIX + name])


def _targets(all_layers: Iterable[str], adapted: Iterable[str]) -> tuple[str, ...]:
    """The last parts of the names, where these mean the same, else the names."""
    names = set(adapted)
    short = {name.rpartition(".")[2] for name in names}
    same = {name for name in all_layers if name.rpartition(".")[2] in short} == names
    return tuple(sorted(short if same else names))


def _read_config(folder: Path) -> LoraSpec:
    """What an adapter says of itself, but for `target_modules`: its tensors say that."""
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise NotFoundError(f"there is no adapter folder {folder}", param="model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}", param="model") from error
    if not isinstance(config, Mapping):
        raise UserError(f"{path} must hold a JSON object", param="model")
    for option, value in {"peft_type": None, **config}.items():
        if option not in HARMLESS_OPTIONS and value not in PLAIN_VALUES.get(option, (None, False, {}, [])):
            reason = f"{option} = {value!r:.200} is not supported; only LoRA, rsLoRA and DoRA are"
            raise UserError(f"{path}: {reason}", param="model")
    return LoraSpec(
        rank=int(_positive(config, "r", int, path)),
        alpha=_positive(config, "lora_alpha", float, path),
        dropout=0.0,
        target_modules=(),
        use_rslora=_flag(config, "use_rslora", path),
        use_dora=_flag(config, "use_dora", path),
    )


def _positive(config: Mapping[str, Any], option: str, kind: type[int | float], path: Path) -> float:
    value = config.get(option)
    if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
        raise UserError(f"{path}: {option} must be a positive {kind.__name__} (got {value!r})", param="model")
    return float(value)


def _flag(config: Mapping[str, Any], option: str, path: Path) -> bool:
    value = config.get(option)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {option} must be true or false (got {value!r:.200})", param="model")
    return bool(value)


def _keys(layer: str, spec: LoraSpec) -> list[str]:
    """The names of a layer's tensors."""
    return [f"{PEFT_PREFIX}{layer}.{part}" for part in (DOWN, UP, *([MAGNITUDE] if spec.use_dora else []))]


def _adapted_layers(model: CausalLM, folder: Path, spec: LoraSpec) -> dict[str, nn.Linear]:
    """The layers that an adapter changes, by name. Raises UserError unless each has all its tensors, and they fit."""
    path = folder / WEIGHTS_FILE
    found = {name: entry.shape for name, entry in read_header(path).items()}
    names = {name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in found}
    layers = {name: linear for name, linear in target_layers(model).items() if name in names}
    expected: dict[str, tuple[int, ...]] = {}
    for name, linear in layers.items():
        shapes = (spec.rank, linear.in_features), (linear.out_features, spec.rank), (linear.out_features,)
        expected |= zip(_keys(name, spec), shapes, strict=False)
    for name in sorted(expected.keys() | found.keys(), key=lambda name: (name not in found, name)):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{path} does not fit the base model: {name} is {found.get(name, 'missing')}, "
                f"and should be {expected.get(name, 'absent: only linear layers of the blocks can have updates')}",
                param="model",
            )
    if not layers:
        raise UserError(f"{path} holds no updates", param="model")
    return layers
