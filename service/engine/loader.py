"""Reading weights: checks before anything is touched, and a thread beside decoding."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from lm.adapter import merge_adapter
from lm.checkpoint import load_weights, validate_weights, weights_hash
from lm.config import ModelConfig, load_config
from lm.errors import UserError
from lm.model import CausalLM, build_model
from lm.ops import Ops

HOST = torch.device("cpu")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a set of weights comes from."""

    base_dir: Path
    adapter_dir: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and as what weights are needed."""

    config: ModelConfig
    """The architecture that the engine was started for."""
    device: torch.device
    dtype: torch.dtype
    ops: Ops

    @property
    def num_bytes(self) -> int:
        """Of one set of weights."""
        return self.config.num_parameters * self.dtype.itemsize

    @property
    def kv_token_bytes(self) -> int:
        """What one token takes in the KV pool."""
        return self.config.kv_bytes_per_token(self.dtype.itemsize)

    def step_bytes(self, num_rows: int) -> int:
        """What a decode step of so many rows reads: every weight once, but of an untied embedding only the rows."""
        if self.config.tie_word_embeddings:
            return self.num_bytes
        unread_rows = self.config.vocab_size - num_rows
        return self.num_bytes - unread_rows * self.config.hidden_size * self.dtype.itemsize


def check_source(source: Source, target: Target) -> ModelConfig:
    """The source's own config, once its headers say that its weights fit. Raises UserError with what does not."""
    config = load_config(source.base_dir)
    ours, theirs = _architecture(target.config), _architecture(config)
    different = [f"{name} is {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise UserError(
            f"{source.base_dir} has another architecture than the engine serves: {'; '.join(different)}", param="model"
        )
    validate_weights(source.base_dir, config)
    return config


def fill(model: CausalLM, source: Source) -> None:
    """Overwrite the model's weights. Raises UserError; the weights are then neither the old nor the new ones."""
    load_weights(model, source.base_dir)
    if source.adapter_dir is not None:
        merge_adapter(model, source.adapter_dir)
    _check_finite(model, source)


def _check_finite(model: CausalLM, source: Source) -> None:
    """Such weights would poison more than their own answers: a NaN that stays in a KV block passes every mask."""
    for name, tensor in model.state_dict().items():
        lowest, highest = tensor.aminmax()  # one pass; NaN and infinity come through
        if not (lowest.isfinite() & highest.isfinite()):
            folder = source.adapter_dir or source.base_dir
            raise UserError(
                f"{folder}: {name} holds NaN or infinity as {tensor.dtype}; train again, or load another", param="model"
            )


def read(source: Source, target: Target) -> tuple[CausalLM, str]:
    """The model in host memory, and its hash. Touches no device. Raises UserError."""
    model = build_model(target.config, device=HOST, dtype=target.dtype, ops=target.ops)
    fill(model, source)
    return model, weights_hash(model.state_dict())


def place(model: CausalLM, target: Target) -> CausalLM:
    """A model from `read` on the device that serves."""
    if target.device == HOST:
        return model
    placed = build_model(target.config, device=target.device, dtype=target.dtype, ops=target.ops)
    placed.load_state_dict(model.state_dict())
    return placed


def in_background(work: Callable[[], ResultT], done: Callable[[], None]) -> Future[ResultT]:
    """Run `work` in a thread, with one thread of torch's own; then call `done` from there.

    The thread has no lower priority: one that lost the processor while it holds Python's lock would stop everybody.
    """
    future: Future[ResultT] = Future()

    def run() -> None:
        torch.set_num_threads(1)  # of this thread's work only
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised again by whoever asks for the result
            future.set_exception(error)
        done()

    threading.Thread(target=run, name="loader", daemon=True).start()
    return future


def _architecture(config: ModelConfig) -> dict[str, object]:
    return asdict(replace(config, bos_token_id=None, eos_token_ids=()))
