"""AdamW whose moments take 8 bits each (Dettmers et al., 2022), in plain torch, so that it runs on every device.

Differs from bitsandbytes in two things. The code of a value within its block is a power of it, not a table: only
elementwise operations. And a value between two codes goes to one or the other so that it is kept on average: the second
moment changes by a thousandth of itself a step, which rounding to the nearest code would swallow for ever. What decides
is no random number but a sequence in the step, so a run that is resumed goes on bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

BLOCK = 256
"""Values with a common scale, which is fp32."""
MIN_SIZE = 4096
"""Smaller parameters keep fp32 moments: norms and biases are sensitive, and weigh nothing."""
CHUNK = 1 << 18
"""Values that are unpacked at a time."""


@dataclass(frozen=True, slots=True)
class Code:
    """value = sign * scale * (max(code, lowest) / largest) ** 4, with the scale of a block."""

    dtype: torch.dtype
    largest: int
    lowest: float

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(N, BLOCK) fp32."""
        values = codes.float()
        return self._value(values.abs()).copysign_(values).mul_(scales)

    def encode(self, values: Tensor, dither: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (N, BLOCK) and scales (N, 1) of `values`, with thresholds in [0, 1) like them."""
        scales = values.abs().amax(1, keepdim=True)
        share = values.abs().div_(scales.clamp(min=torch.finfo(torch.float32).tiny))
        codes = share.sqrt().sqrt_().mul_(self.largest).floor_().clamp_(max=self.largest - 1)
        low, high = self._value(codes), self._value(codes + 1)
        codes += share.sub_(low) > high.sub_(low).mul_(dither)
        return codes.copysign_(values).to(self.dtype), scales

    def _value(self, codes: Tensor) -> Tensor:
        return codes.clamp(min=self.lowest).div_(self.largest).square_().square_()


FIRST = Code(torch.int8, 127, 0.0)
SECOND = Code(torch.uint8, 255, 0.5)
"""Never 0 where the block is not: the step divides by its root."""


class AdamW8bit(torch.optim.Optimizer):
    """State of a parameter: `step`, and for each moment the fp32 tensor `NAME`, or `NAME` in 8 bits, flat and padded
    to whole blocks, with `NAME_scale`."""

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch casts what it loads to the parameter's type; whole numbers come back from there unharmed."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if parameter.numel() >= MIN_SIZE:
                state["exp_avg"] = state["exp_avg"].to(FIRST.dtype)
                state["exp_avg_sq"] = state["exp_avg_sq"].to(SECOND.dtype)

    def _update(self, parameter: Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_zeros(parameter))
        state["step"] += 1
        step = int(state["step"].item())  # on the host
        if parameter.numel() < MIN_SIZE:
            _adamw(parameter, grad.float(), state["exp_avg"], state["exp_avg_sq"], group, step)
            return
        flat, gradient = parameter.view(-1), grad.reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            values, gradients = flat[start : start + CHUNK], gradient[start : start + CHUNK]
            blocks = slice(start // BLOCK, (start + values.numel() + BLOCK - 1) // BLOCK)
            _adamw_chunk(values, gradients.float(), state, blocks, group, step)


def _zeros(parameter: Parameter) -> dict[str, Tensor]:
    device = parameter.device
    state = {"step": torch.tensor(0.0, device="cpu")}
    if parameter.numel() < MIN_SIZE:
        fp32 = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        return state | fp32
    num_blocks = math.ceil(parameter.numel() / BLOCK)
    for name, code in (("exp_avg", FIRST), ("exp_avg_sq", SECOND)):
        state[name] = torch.zeros(num_blocks, BLOCK, dtype=code.dtype, device=device)
        state[f"{name}_scale"] = torch.zeros(num_blocks, 1, dtype=torch.float32, device=device)
    return state


def _adamw(parameter: Tensor, grad: Tensor, first: Tensor, second: Tensor, group: dict[str, Any], step: int) -> None:
    """Update the moments in place, and the parameter."""
    beta1, beta2 = group["betas"]
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    parameter.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**step))


def _adamw_chunk(
    values: Tensor, grad: Tensor, state: dict[str, Tensor], blocks: slice, group: dict[str, Any], step: int
) -> None:
    moments = []
    for name, code in (("exp_avg", FIRST), ("exp_avg_sq", SECOND)):
        moments.append(code.decode(state[name][blocks], state[f"{name}_scale"][blocks]))
    first, second = (moment.view(-1)[: values.numel()] for moment in moments)
    _adamw(values, grad, first, second, group, step)
    dither = _dither(moments[0].shape[0], step, values.device)
    for name, code, moment in zip(("exp_avg", "exp_avg_sq"), (FIRST, SECOND), moments, strict=True):
        codes, scales = code.encode(moment, dither)
        state[name][blocks] = codes
        state[f"{name}_scale"][blocks] = scales


def _dither(num_blocks: int, step: int, device: torch.device) -> Tensor:
    """(N, BLOCK) thresholds in [0, 1): for each value a sequence that fills the interval evenly over the steps, begun
    at another place for each value of a block and each block (Weyl's, of irrational numbers)."""
    within = torch.arange(BLOCK, device=device, dtype=torch.float32) * 0.7548776662466927
    across = torch.arange(num_blocks, device=device, dtype=torch.float32)[:, None] * 0.5698402909980532
    return (within + across + math.fmod(step * 0.6180339887498949, 1.0)).frac_()
