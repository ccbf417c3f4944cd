"""Autocast on the device: which operators compute in the chosen 16-bit type and which in fp32, after torch's CUDA lists.

Not simulated: the operators that widen to the widest input (`promote`), and those that autocast refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.npu.simulated.dispatch import find_operator
from tests.npu.simulated.tensors import is_on_device

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]
LOWER = [
    "mm",
    "bmm",
    "mv",
    "matmul",
    "linear",
    "addmm",
    "addmv",
    "baddbmm",
    "scaled_dot_product_attention",
]
FLOAT32 = [
    "exp",
    "log",
    "rsqrt",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "layer_norm",
    "rms_norm",
    "nll_loss",
    "softmax.int",
    "log_softmax.int",
    "logsumexp",
    "linalg_vector_norm",
    "cumprod",
    "cumsum",
    "prod",
    "sum",
]


def register() -> list[torch.library.Library]:
    """Connect the lists. Keep the libraries."""
    library = torch.library.Library("aten", "IMPL")
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in LOWER:
        library.impl(name, _casting(name, None), "AutocastPrivateUse1")
    for name in FLOAT32:
        library.impl(name, _casting(name, torch.float32), "AutocastPrivateUse1")
    return [library, fallback]


def _casting(name: str, dtype: torch.dtype | None) -> Callable[..., Any]:
    operator = find_operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            target = dtype or torch.get_autocast_dtype("npu")
            return operator(*_cast(args, target), **_cast(kwargs, target))

    return kernel


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        wanted = is_on_device(value) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if wanted else value

    return tree_map(cast, tree)
