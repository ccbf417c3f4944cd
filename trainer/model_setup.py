"""The model a run trains: its base, what is put beside it, and where it begins."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lm.checkpoint import load_weights
from lm.config import load_config
from lm.device import DtypeChoice, memory_figures
from lm.lora import LoraSpec, add_lora
from lm.model import CausalLM, build_model
from lm.ops import choose_ops
from trainer.config import RunConfig

log = logging.getLogger(__name__)


def load_model(config: RunConfig, base: Path, *, device: torch.device, precision: DtypeChoice) -> CausalLM:
    """The model in `base`, in training mode, with `requires_grad` on what the recipe trains.

    What is trained is fp32; weights that an adapter leaves frozen are stored in the precision of the run. Draws the
    adapter's first weights, so seed before.
    """
    dtype = precision.dtype if config.trains_adapter else torch.float32
    ops, variants = choose_ops(device, precision.dtype)
    model = build_model(load_config(base), device=device, dtype=dtype, ops=ops)
    load_weights(model, base)
    if config.trains_adapter:
        add_lora(model, lora_spec(config))
    model.checkpoint_activations = config.enable_activation_checkpointing
    for name, variant in variants.items():
        log.info(f"Op {name}: {variant}")
    _log_memory(device, precision.dtype)
    return model.train()


def lora_spec(config: RunConfig) -> LoraSpec:
    lora = config.lora
    return LoraSpec(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules)


def _log_memory(device: torch.device, dtype: torch.dtype) -> None:
    log.info(f"Model is initialized with precision {dtype}.")
    figures, label = memory_figures(device), device.type.upper()
    log.info(
        "Memory stats after model init:"
        f"\n\t{label} peak memory allocation: {figures.peak_allocated / 2**30:.2f} GiB"
        f"\n\t{label} peak memory reserved: {figures.peak_reserved / 2**30:.2f} GiB"
        f"\n\t{label} peak memory active: {figures.peak_active / 2**30:.2f} GiB"
    )
