"""LoRA (Hu et al., 2021): small trainable updates beside frozen linear layers, in PEFT's file format.

The base weights keep their names, so a model with adapters is still the model; the updates are `NAME.lora_A.weight`
and `NAME.lora_B.weight`, as PEFT names them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lm.errors import NotFoundError, UserError
from lm.folder import publish
from lm.model import CausalLM
from lm.weight_files import read_header

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
HARMLESS_OPTIONS = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "megatron_core", "megatron_config", "ensure_weight_tying", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
"""PEFT's options that do not change how an adapter's tensors are applied."""
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others change the base weights
}
"""The other options may only have these values, or be empty: `rank_pattern`, `use_dora` and what is yet to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    rank: int
    """Inner dimension of the updates."""
    alpha: float
    """Updates are scaled by alpha / rank."""
    dropout: float
    """On the input of the update, while training."""
    target_modules: tuple[str, ...]
    """Names among LINEAR_LAYERS; each stands for the layer of that name in every block."""


class LoraLinear(nn.Module):
    """y = x W^T + b + alpha / rank * dropout(x) A^T B^T with W and b frozen. A and B are fp32.

    Where the base has another dtype it must run under autocast.
    """

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scaling = spec.alpha / spec.rank
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()
        # PEFT's initialisation, drawn on the host so that a seed means the same on every device; B, though it ends as
        # zeros, is made there too, since its constructor draws
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, spec.rank, bias=False, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        self.lora_B = nn.Linear(spec.rank, base.out_features, bias=False, device="cpu", dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_A.to(device)
        self.lora_B.to(device)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.lora_B(self.lora_A(self.dropout(x)) * self.scaling)
        return F.linear(x, self.weight, self.bias) + update


def add_lora(model: CausalLM, spec: LoraSpec) -> None:
    """Freeze `model` and put an update, which is zero at first, beside each target layer.

    Raises UserError for a target that is no linear layer of a block.
    """
    if unknown := sorted(set(spec.target_modules) - set(LINEAR_LAYERS)):
        raise UserError(
            f"target_modules: unknown {unknown}; choose among {list(LINEAR_LAYERS)}", param="lora.target_modules"
        )
    model.requires_grad_(False)
    for name, linear in _target_layers(model).items():
        if name.rpartition(".")[2] in spec.target_modules:
            model.set_submodule(name, LoraLinear(linear, spec))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that `add_lora` made, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def save_adapter(model: CausalLM, spec: LoraSpec, final: Path, *, base_model: str) -> None:
    """Publish the updates of `model` as the PEFT folder `final`.

    `base_model` is the name or folder of the base that PEFT's `from_pretrained` looks up. Raises FileExistsError when
    `final` exists.
    """
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
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with publish(final) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_adapter(model: CausalLM, folder: Path) -> None:
    """Raise what `merge_adapter` would refuse; nothing is changed."""
    rank, _ = _read_config(folder)
    _adapted_layers(model, folder, rank)


def merge_adapter(model: CausalLM, folder: Path) -> None:
    """Add the updates in the PEFT folder `folder` to the weights of the plain `model`, computed in fp32.

    Raises NotFoundError when there is no such folder, and UserError, before a weight has changed, when it is no plain
    LoRA adapter or does not fit the model.
    """
    rank, alpha = _read_config(folder)
    layers = _adapted_layers(model, folder, rank)
    tensors = load_file(folder / WEIGHTS_FILE)
    with torch.no_grad():
        for name, linear in layers.items():
            down, up = (tensors[f"{PEFT_PREFIX}{name}.lora_{side}.weight"] for side in "AB")
            device = linear.weight.device
            update = (up.to(device, torch.float32) @ down.to(device, torch.float32)) * (alpha / rank)
            linear.weight.copy_(linear.weight.float() + update)


def _target_layers(model: nn.Module) -> dict[str, nn.Linear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in layers.items() if name.rpartition(".")[2] in LINEAR_LAYERS}


def _read_config(folder: Path) -> tuple[int, float]:
    """Rank and alpha of an adapter."""
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
            reason = f"{option} = {value!r:.200} is not supported; only plain LoRA can be merged"
            raise UserError(f"{path}: {reason}", param="model")
    return int(_positive(config, "r", int, path)), _positive(config, "lora_alpha", float, path)


def _positive(config: Mapping[str, Any], option: str, kind: type[int | float], path: Path) -> float:
    value = config.get(option)
    if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
        raise UserError(f"{path}: {option} must be a positive {kind.__name__} (got {value!r})", param="model")
    return float(value)


def _adapted_layers(model: CausalLM, folder: Path, rank: int) -> dict[str, nn.Linear]:
    """The layers that an adapter changes, by name. Raises UserError unless each has both matrices, and they fit."""
    path = folder / WEIGHTS_FILE
    found = {name: entry.shape for name, entry in read_header(path).items()}
    names = {name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in found}
    layers = {name: linear for name, linear in _target_layers(model).items() if name in names}
    expected: dict[str, tuple[int, ...]] = {}
    for name, linear in layers.items():
        expected[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (rank, linear.in_features)
        expected[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (linear.out_features, rank)
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
