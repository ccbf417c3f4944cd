"""LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024): small trainable updates beside frozen linear layers.

The base weights keep their names, so a model with adapters is still the model; the updates are `NAME.lora_A.weight`,
`NAME.lora_B.weight` and, for DoRA, `NAME.lora_magnitude_vector`, as PEFT names them. `lm.adapter` has the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.errors import UserError
from lm.model import CausalLM

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    rank: int
    """Inner dimension of the updates."""
    alpha: float
    """Updates are scaled by alpha / rank."""
    dropout: float
    """On the input of the update, while training."""
    target_modules: tuple[str, ...]
    """Names among LINEAR_LAYERS, each of which stands for the layer of that name in every block, or full names."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized, Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Train the length of each weight row apart from its direction."""

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def targets(self, name: str) -> bool:
        """Whether the linear layer `name` gets an update."""
        return name in self.target_modules or name.rpartition(".")[2] in self.target_modules


class LoraLinear(nn.Module):
    """y = x W^T + b + scaling * dropout(x) A^T B^T with W and b frozen. A and B are fp32.

    Where the base has another dtype it must run under autocast.
    """

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.spec = spec
        self.scaling = spec.scaling
        self.enabled = True
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
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        update: Tensor = self.lora_B(self.lora_A(self.dropout(x)) * self.scaling)
        return F.linear(x, self.weight, self.bias) + update


class DoraLinear(LoraLinear):
    """y = x W^T + b + dropout(x) (W' - W)^T, where W' has the rows of W + scaling B A, each as long as
    `lora_magnitude_vector` says.

    As in the paper (section 4.3) and in PEFT no gradient goes through the lengths that the rows have before.
    """

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__(base, spec)
        self.lora_magnitude_vector = nn.Parameter(row_norms(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        dropped = self.dropout(x)
        unchanged = F.linear(dropped, self.weight)
        update: Tensor = self.lora_B(self.lora_A(dropped) * self.scaling)
        ratio = self._ratio()
        change = (ratio - 1) * unchanged + ratio * update
        if isinstance(self.dropout, nn.Identity) or not self.training:
            plain = unchanged if self.bias is None else unchanged + self.bias
        else:
            plain = F.linear(x, self.weight, self.bias)
        return plain + change.to(plain.dtype)

    def _ratio(self) -> Tensor:
        """(out_features,) how much longer each row of the updated weights is to be."""
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            norms = row_norms(updated(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling))
        return self.lora_magnitude_vector / norms


def updated(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """weight + scaling * up @ down, in fp32."""
    return weight.float() + (up.float() @ down.float()) * scaling


def row_norms(weight: Tensor) -> Tensor:
    """(out_features,) the length of each row, in fp32."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach().float(), dim=1)
    return norms


def add_lora(model: CausalLM, spec: LoraSpec) -> None:
    """Freeze `model` and put an update, which changes nothing at first, beside each target layer.

    Raises UserError for a target that is no linear layer of a block.
    """
    layers = target_layers(model)
    known = layers.keys() | set(LINEAR_LAYERS)
    if unknown := sorted(set(spec.target_modules) - known):
        raise UserError(
            f"target_modules: unknown {unknown}; choose among {list(LINEAR_LAYERS)}", param="lora.target_modules"
        )
    model.requires_grad_(False)
    for name, linear in layers.items():
        if spec.targets(name):
            model.set_submodule(name, (DoraLinear if spec.use_dora else LoraLinear)(linear, spec))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that `add_lora` made, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def spec_of(model: nn.Module) -> LoraSpec:
    """What `add_lora` was told."""
    return next(module.spec for module in model.modules() if isinstance(module, LoraLinear))


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Within it the model answers as its base does."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def target_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a plain model that can have updates, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in layers.items() if name.rpartition(".")[2] in LINEAR_LAYERS}
