"""The model a run trains: its base, what is put beside it, and where it begins."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lm.adapter import add_adapter, merge_adapter
from lm.checkpoint import load_weights, save_model
from lm.config import load_config
from lm.device import DtypeChoice, memory_figures
from lm.errors import UserError
from lm.lora import LoraSpec, add_lora, spec_of
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE, choose_ops
from trainer.config import RunConfig
from trainer.option_groups import LoraConfig
from trainer.run_folder import RunFolder

log = logging.getLogger(__name__)


def prepare_base(config: RunConfig, folder: RunFolder, dtype: torch.dtype) -> Path:
    """The folder of the model beneath what is trained: `config.model`, or the run's `base/` where `merge_start` asks
    for it.

    That one is made here, in `dtype`, the first time. Raises UserError for a `start_adapter` that does not fit.
    """
    if not (config.merge_start and config.trains_adapter):
        return Path(config.model)
    if not folder.base.exists():
        with _told_as_start():
            merged = merged_model(Path(config.model), Path(str(config.start_adapter)))
        tokenizer_file = None if config.tokenizer_file is None else Path(config.tokenizer_file)
        save_model(merged.state_dict(), Path(config.model), folder.base, dtype=dtype, tokenizer_file=tokenizer_file)
        log.info(f"Merged {config.start_adapter} into {folder.base}.")
    return folder.base


def merged_model(base: Path, adapter: Path) -> CausalLM:
    """The model in `base` as it is on the disk, not as a run rounded it, with an adapter: fp32, in host memory."""
    model = build_model(load_config(base), device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
    load_weights(model, base)
    with torch.autocast("cpu", enabled=False):  # a run in bf16 publishes under its own
        merge_adapter(model, adapter)
    return model


def load_model(config: RunConfig, base: Path, *, device: torch.device, precision: DtypeChoice) -> CausalLM:
    """The model in `base` as `prepare_base` says, in training mode, with `requires_grad` on what the recipe trains.

    What is trained is fp32; weights that an adapter leaves frozen are stored in the precision of the run. Draws the
    adapter's first weights, so seed before. Raises UserError for a `start_adapter` that does not fit.
    """
    dtype = precision.dtype if config.trains_adapter else torch.float32
    ops, variants = choose_ops(device, precision.dtype)
    model = build_model(load_config(base), device=device, dtype=dtype, ops=ops)
    load_weights(model, base)
    if config.trains_adapter:
        _add_adapter(model, config)
    elif config.start_adapter is not None:
        _merge_start(model, config)
    model.checkpoint_activations = config.enable_activation_checkpointing
    model.checkpoint_interval = config.activation_checkpointing_interval
    for name, variant in variants.items():
        log.info(f"Op {name}: {variant}")
    _log_memory(device, precision.dtype)
    return model.train()


def lora_spec(config: RunConfig) -> LoraSpec:
    lora = config.lora
    return LoraSpec(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def _add_adapter(model: CausalLM, config: RunConfig) -> None:
    if config.start_adapter is None or config.merge_start:
        add_lora(model, lora_spec(config))
        return
    with _told_as_start():
        add_adapter(model, Path(config.start_adapter), dropout=config.lora.dropout)
    spec = spec_of(model)
    _check_same(config.lora, spec)
    log.info(f"The adapter {config.start_adapter} is trained further: rank {spec.rank}, alpha {spec.alpha:g}.")


def _check_same(lora: LoraConfig, spec: LoraSpec) -> None:
    """A configuration may leave an adapter's own options out, but not say others."""
    default = LoraConfig()
    for option in ("rank", "alpha", "target_modules", "use_rslora", "use_dora"):
        wanted, found = getattr(lora, option), getattr(spec, option)
        same = set(wanted) == set(found) if isinstance(wanted, tuple) else wanted == found
        if not same and wanted != getattr(default, option):
            raise UserError(
                f"lora.{option}: {wanted!r} does not fit start_adapter, which has {found!r}; leave it out, or set "
                "merge_start to train a new adapter",
                param=f"lora.{option}",
            )


def _merge_start(model: CausalLM, config: RunConfig) -> None:
    with _told_as_start():
        merge_adapter(model, Path(str(config.start_adapter)))
    log.info(f"Merged {config.start_adapter} into the model.")


@contextmanager
def _told_as_start() -> Iterator[None]:
    """An adapter that does not fit is the mistake of the option that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"start_adapter: {error}", param="start_adapter") from error


def _log_memory(device: torch.device, dtype: torch.dtype) -> None:
    log.info(f"Model is initialized with precision {dtype}.")
    figures, label = memory_figures(device), device.type.upper()
    log.info(
        "Memory stats after model init:"
        f"\n\t{label} peak memory allocation: {figures.peak_allocated / 2**30:.2f} GiB"
        f"\n\t{label} peak memory reserved: {figures.peak_reserved / 2**30:.2f} GiB"
        f"\n\t{label} peak memory active: {figures.peak_active / 2**30:.2f} GiB"
    )
