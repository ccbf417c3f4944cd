"""The loop of a fine-tuning run on one device. What a recipe learns from a batch stands in a module of its own."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lm.config import load_config
from lm.device import choose_dtype, memory_figures, resolve_device, seed_everything
from lm.model import CausalLM
from trainer.card import CheckpointFacts
from trainer.config import RunConfig
from trainer.data.batches import Batch, epoch_steps, in_batches, steps_per_epoch
from trainer.model_setup import load_model
from trainer.optimizer import build_optimizer, clip_gradients, set_learning_rate
from trainer.outcome import NonFiniteLoss
from trainer.prepare import prepare_data
from trainer.progress import Progress, StepReport
from trainer.publish import Publisher
from trainer.run_folder import RunFolder
from trainer.schedule import learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sums:
    """Of one batch, on the device."""

    loss: Tensor
    """The sum that the gradient is of; a scalar."""
    figures: Tensor
    """(F,) fp32 without a gradient: the sums of the recipe's FIGURES."""


@dataclass(frozen=True, slots=True)
class Means:
    """Of one step, over its units."""

    loss: float
    grad_norm: float
    """Before clipping."""
    figures: dict[str, float]
    """By the names of FIGURES."""


class Recipe(ABC):
    """One loop for every method. Use it as: build, `setup`, `train`.

    - Precision. Trained weights, their gradients and AdamW's moments are fp32. With bf16 the products run in bf16
      under autocast, and weights that an adapter leaves frozen are stored in bf16.
    - `gradient_accumulation_steps`: memory of a small batch, gradient of a large one. Gradients are weighted by units
      (trained tokens, or pairs), so how a step is divided into batches does not change it.
    - `enable_activation_checkpointing`: less memory for a third more time; the same numbers.
    - A step whose loss or gradients are not finite is not taken: it ends the run, and no checkpoint follows.

    `check_cancelled` is called between batches and raises when the run shall stop.
    """

    FIGURES: ClassVar[tuple[str, ...]]
    """What is measured beside the loss: fields of StepReport, each a mean over the units of a step."""

    @abstractmethod
    def sums(self, batch: Batch) -> Sums:
        """Loss and figures of a batch, summed over its units."""

    @abstractmethod
    def num_units(self, batch: Batch) -> int:
        """What a step's means are taken over: trained tokens, or pairs."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, progress: Progress, check_cancelled: Callable[[], None]
    ) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.check_cancelled = check_cancelled
        self.base = Path(config.model)
        self.model_config = load_config(self.base)
        self.choice = resolve_device(config.device)
        self.device = self.choice.device
        self.precision = choose_dtype(config.dtype, self.device)
        log.info(f"Device: {self.device} ({self.choice.name}). {self.choice.reason}")
        log.info(f"Precision: {self.precision.name}. {self.precision.reason}")
        self.publisher = Publisher(config, folder, self.precision.dtype)
        self.step = 0
        self.trained_tokens = 0

    def setup(self) -> None:
        """Check the data first, since that is quick, then load what is trained."""
        seed_everything(self.config.seed, self.device)
        self.data = prepare_data(
            self.config,
            max_seq_len=min(self.config.max_seq_len, self.model_config.max_position_embeddings),
            folder=self.folder,
            progress=self.progress,
            check_cancelled=self.check_cancelled,
        )
        self.steps_per_epoch = steps_per_epoch(
            len(self.data.training),
            batch_size=self.config.batch_size,
            accumulation=self.config.gradient_accumulation_steps,
        )
        self.epochs = self.config.planned_epochs(self.steps_per_epoch)
        planned = self.epochs * self.steps_per_epoch
        self.total_steps = min(planned, self.config.max_steps or planned)
        default_interval = self.steps_per_epoch if self.config.epochs else math.ceil(self.total_steps / 3)
        self.save_interval = self.config.save_every_n_steps or default_interval
        self.check_cancelled()
        self.model = self.load()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.trained, weight_decay=self.config.weight_decay)
        log.info("Optimizer is initialized.")
        log.info("Loss is initialized.")
        self._report_start()
        self.publisher.check_disk_space(self.model, num_saves=sum(map(self._saves, range(1, self.total_steps + 1))))

    def load(self) -> CausalLM:
        """The model as the run begins. A recipe that asks it as a reference does so here, before a state is restored."""
        return load_model(self.config, self.base, device=self.device, precision=self.precision)

    def train(self) -> None:
        window_start = time.perf_counter()
        for epoch in range(1, math.ceil(self.total_steps / self.steps_per_epoch) + 1):
            num_steps = min(self.steps_per_epoch, self.total_steps - self.step)
            for batches in self.progress.bar(itertools.islice(self._steps(epoch), num_steps), num_steps):
                self.step += 1
                rate = self._learning_rate()
                means = self.train_step(batches, rate)
                self._report_step(epoch, batches, means, rate, time.perf_counter() - window_start)
                if self._saves(self.step):
                    self.save(means.loss)
                window_start = time.perf_counter()

    def train_step(self, batches: list[Batch], rate: float) -> Means:
        """One optimizer step: the means over its units, and the norm of the gradients before clipping."""
        units = sum(map(self.num_units, batches))
        losses, figures = [], []
        for batch in batches:
            self.check_cancelled()
            sums = self.sums(batch)
            loss = sums.loss / units
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            figures.append(sums.figures)
        norm = clip_gradients(self.trained, self.config.max_grad_norm)
        means = torch.stack(figures).sum(0) / units
        loss_value, norm_value, *values = torch.cat(
            [torch.stack([torch.stack(losses).sum(), norm]), means]
        ).tolist()  # the step's only host sync
        self._check_finite(loss=loss_value, grad_norm=norm_value)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Means(loss_value, norm_value, dict(zip(self.FIGURES, values, strict=True)))

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss over the units of the held-out records. None when there are none."""
        if not self.data.validation:
            return None
        self.model.eval()
        batches = list(in_batches(self.data.validation, self.config.batch_size))
        total = torch.stack([self.sums(batch).loss for batch in batches]).sum().item()
        self.model.train()
        return float(total) / sum(map(self.num_units, batches))

    def save(self, loss: float) -> None:
        """Publish a checkpoint of this step, and say so."""
        final = self.step == self.total_steps
        validation_loss = self.validate()
        if validation_loss is not None:
            self._check_finite(validation_loss=validation_loss)
            self.progress.event("validation", step=self.step, loss=validation_loss)
        facts = CheckpointFacts(
            step=self.step,
            total_steps=self.total_steps,
            epoch=math.ceil(self.step / self.steps_per_epoch),
            final=final,
            trained_tokens=self.trained_tokens,
            loss=loss,
            validation_loss=validation_loss,
        )
        for kind, path in self.publisher.publish(self.model, facts):
            self.progress.event(
                "checkpoint",
                step=self.step,
                kind=kind,
                path=path,
                final=final,
                loss=loss,
                validation_loss=validation_loss,
            )

    # ---- parts of setup

    def _report_start(self) -> None:
        self.progress.event(
            "started",
            pid=os.getpid(),
            device=str(self.device),
            device_reason=self.choice.reason,
            dtype=self.precision.name,
            dtype_reason=self.precision.reason,
            epochs=self.epochs,
            parameters=self.model_config.num_parameters,
            trainable_parameters=sum(parameter.numel() for parameter in self.trained),
        )

    # ---- parts of a step

    def _steps(self, epoch: int) -> Iterator[list[Batch]]:
        return epoch_steps(
            self.data.training,
            batch_size=self.config.batch_size,
            accumulation=self.config.gradient_accumulation_steps,
            seed=self.config.seed,
            epoch=epoch,
        )

    def _learning_rate(self) -> float:
        return learning_rate(
            self.step,
            total_steps=self.total_steps,
            peak=self.config.peak_learning_rate,
            warmup_ratio=self.config.warmup_ratio,
            warmup_steps=self.config.warmup_steps,
            schedule=self.config.lr_schedule,
        )

    def _check_finite(self, **numbers: float) -> None:
        if not all(map(math.isfinite, numbers.values())):
            figures = ", ".join(f"{name} {number}" for name, number in numbers.items())
            raise NonFiniteLoss(
                f"step {self.step}: {figures}; lower learning_rate (now {self.config.peak_learning_rate}) or look for "
                f"damaged weights in {self.config.model}"
            )

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision.dtype)

    def _saves(self, step: int) -> bool:
        return step == self.total_steps or step % self.save_interval == 0

    def _report_step(self, epoch: int, batches: list[Batch], means: Means, rate: float, seconds: float) -> None:
        num_trained = sum(batch.num_trained for batch in batches)
        self.trained_tokens += num_trained
        self.progress.step(
            StepReport(
                step=self.step,
                total_steps=self.total_steps,
                epoch=epoch,
                loss=means.loss,
                learning_rate=rate,
                grad_norm=means.grad_norm,
                trained_tokens_per_second=num_trained / seconds,
                processed_tokens_per_second=sum(batch.num_tokens for batch in batches) / seconds,
                trained_tokens=self.trained_tokens,
                peak_memory_bytes=memory_figures(self.device).peak_allocated,
                **means.figures,
            )
        )
