"""How long a step of a run will take, from a single layer with random weights on the run's own device.

A whole model is neither read nor built: beside an engine there may be no room for one. The other layers take as long;
the output matrix and the optimizer are computed from their share of the work.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lm.config import ModelConfig
from lm.device import choose_dtype, memory_figures, resolve_device, seed_everything, synchronize
from lm.lora import add_lora
from lm.model import CausalLM, build_model
from lm.ops import choose_ops
from trainer.config import RunConfig
from trainer.estimate import flops_per_token, trained_parameters
from trainer.model_setup import lora_spec
from trainer.optimizer import build_optimizer

log = logging.getLogger(__name__)

REPEATS = 3
MAX_FLOPS = {"cpu": 1e11}
"""Of one measurement; a larger batch is measured in part."""
TINY_VOCABULARY = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """What the batches of a run look like, in the mean."""

    rows: int
    """Of a pair two."""
    length: int
    tokens: int
    """Padding included."""
    trained: int
    per_step: float
    """Batches of one optimizer step."""
    processed_per_step: float
    """Tokens of one optimizer step, padding not included."""


def measure_step(config: RunConfig, shape: ModelConfig, batches: BatchShape) -> dict[str, Any]:
    """Seconds of one optimizer step and tokens per second, with the device, its memory and the precision; or `problem`."""
    try:
        choice = resolve_device(config.device)
        precision = choose_dtype(config.dtype, choice.device)
        memory = memory_figures(choice.device)
        seconds = _seconds_of_step(config, shape, batches, choice.device, precision.dtype)
    except Exception as error:  # of a device that others use: an estimate that is missing is no reason to fail
        log.exception("the speed was not measured")
        return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    return {
        "device": str(choice.device),
        "dtype": precision.name,
        "memory_total_bytes": memory.total,
        "memory_free_bytes": memory.free,
        "seconds_per_step": seconds,
        "processed_tokens_per_second": batches.processed_per_step / seconds,
        "trained_tokens_per_second": batches.trained * batches.per_step / seconds,
    }


def _seconds_of_step(
    config: RunConfig, shape: ModelConfig, batches: BatchShape, device: torch.device, dtype: torch.dtype
) -> float:
    seed_everything(config.seed, device)
    layer = _one_layer(config, shape, device, dtype)
    per_layer = flops_of_layer(shape, config, length=batches.length)
    rows = max(1, round(batches.tokens / batches.length))
    if (limit := MAX_FLOPS.get(device.type)) is not None:
        rows = max(1, min(rows, int(limit / (per_layer * batches.length))))
    ids = torch.randint(TINY_VOCABULARY, (rows, batches.length), device=device)
    positions = torch.arange(batches.length, device=device).expand(rows, -1)
    autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype)

    def forward_and_backward() -> None:
        with autocast:
            hidden = layer(ids, positions)
        hidden.float().sum().backward()

    of_layer = _best(forward_and_backward, device) * batches.tokens / ids.numel()
    trained = [parameter for parameter in layer.model.layers.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(trained, config.optimizer, weight_decay=config.weight_decay)
    of_optimizer = _best(optimizer.step, device) * trained_parameters(shape, config) / _count(trained)
    of_head = of_layer * _head_flops(shape, config) * batches.trained / (per_layer * batches.tokens)
    reference = 4 / 3 if config.recipe == "dpo" and config.trains_adapter else 1  # a forward pass more
    per_batch = (shape.num_hidden_layers * of_layer + of_head) * reference
    return batches.per_step * per_batch + of_optimizer


def _one_layer(config: RunConfig, shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> CausalLM:
    small = replace(
        shape,
        num_hidden_layers=1,
        vocab_size=TINY_VOCABULARY,
        pad_token_id=None,
        sliding_windows=shape.sliding_windows[:1],
    )
    stored = dtype if config.trains_adapter else torch.float32
    model = build_model(small, device=device, dtype=stored, ops=choose_ops(device, dtype)[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    if config.trains_adapter:
        add_lora(model, lora_spec(config))
    model.checkpoint_activations = config.enable_activation_checkpointing
    if config.trains_adapter:  # so that gradients go through the layer to what stands before it, as in deeper ones
        model.model.embed_tokens.weight.requires_grad_(True)
    return model.train()


def flops_of_layer(shape: ModelConfig, config: RunConfig, *, length: int) -> float:
    """Of one token."""
    outer = replace(shape, num_hidden_layers=0)
    whole = flops_per_token(shape, config, length=length) - flops_per_token(outer, config, length=length)
    return whole / shape.num_hidden_layers


def _head_flops(shape: ModelConfig, config: RunConfig) -> float:
    """Of one trained token."""
    return float((4 if config.trains_adapter else 6) * shape.vocab_size * shape.hidden_size)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few, the first one left out."""
    times = []
    for _ in range(1 + REPEATS):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _count(parameters: list[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
