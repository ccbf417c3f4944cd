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
from pathlib import Path
from typing import ClassVar, Literal

import torch

from lm.config import load_config
from lm.device import choose_dtype, limit_memory, memory_figures, random_state, resolve_device, seed_everything
from lm.model import CausalLM
from trainer.config import RunConfig
from trainer.data.batches import Batch, epoch_steps, in_batches
from trainer.estimate import optimizer_bytes
from trainer.milestones import Milestones
from trainer.model_setup import load_model, prepare_base
from trainer.optimizer import UpdatesInBackward, build_optimizer, clip_gradients, set_learning_rate
from trainer.outcome import NonFiniteLoss, Paused
from trainer.plan import plan_run
from trainer.position import Position
from trainer.prepare import prepare_data
from trainer.progress import Progress, StepReport
from trainer.publish import Publisher
from trainer.run_folder import RunFolder
from trainer.samples import load_samples
from trainer.schedule import planned_rate
from trainer.state import check_goes_on, collect_tensors, read_state, restore, save_state
from trainer.sums import Means, Sums
from trainer.validation import Validation, perplexity

log = logging.getLogger(__name__)


class Recipe(ABC):
    """One loop for every method. Use it as: build, `setup`, `train`.

    - Precision. Trained weights, their gradients and AdamW's moments are fp32. With bf16 the products run in bf16
      under autocast, and weights that an adapter leaves frozen are stored in bf16.
    - `gradient_accumulation_steps`: memory of a small batch, gradient of a large one. Gradients are weighted by units
      (trained tokens, or pairs), so how a step is divided into batches does not change it.
    - `enable_activation_checkpointing`: less memory for a third more time; the same numbers.
    - A step whose loss or gradients are not finite is not taken: it ends the run, and no checkpoint follows.
    - A run that is killed or paused goes on from its last state to the same bits, where the device computes the same
      twice, as a CPU does (trainer/state.py). A step that was not ended is thrown away and taken again.

    `check_cancelled` is called between batches and raises when the run shall stop; on Paused the state is saved first.
    """

    UNIT: ClassVar[Literal["token", "pair"]]
    """What a step's means are taken over."""
    FIGURES: ClassVar[tuple[str, ...]]
    """What is measured beside the loss: fields of StepReport, each a mean over the units of a step."""

    @abstractmethod
    def sums(self, batch: Batch) -> Sums:
        """Loss and figures of a batch, summed over its units."""

    @abstractmethod
    def num_units(self, batch: Batch) -> int:
        """How many trained tokens, or pairs, are in a batch."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, progress: Progress, check_cancelled: Callable[[], None]
    ) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.check_cancelled = check_cancelled
        self.model_config = load_config(Path(config.model))
        self.choice = resolve_device(config.device)
        self.device = self.choice.device
        self.precision = choose_dtype(config.dtype, self.device)
        log.info(f"Device: {self.device} ({self.choice.name}). {self.choice.reason}")
        log.info(f"Precision: {self.precision.name}. {self.precision.reason}")
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.memory_fraction is not None:
            limit_memory(self.device, config.memory_fraction)
        self.position = Position()

    def setup(self, *, resume: bool = False) -> None:
        """Check the data first, since that is quick, then load what is trained, and its state if the run goes on."""
        state = read_state(self.folder, self.config) if resume else None
        if state is not None:
            self.position = state.position
        if resume:
            self.progress.resume(self.position.step)
        seed_everything(self.config.seed, self.device)
        self.data = prepare_data(
            self.config,
            max_seq_len=min(self.config.max_seq_len, self.model_config.max_position_embeddings),
            folder=self.folder,
            progress=self.progress,
            check_cancelled=self.check_cancelled,
        )
        self.plan = plan_run(self.config, len(self.data.training))
        if state is not None:
            check_goes_on(state, self.data.fingerprint, self.plan.total_steps)
        self.base = prepare_base(self.config, self.folder, self.precision.dtype)
        self.milestones = self._milestones()
        self.check_cancelled()
        self.model = self.load()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.trained, self.config.optimizer, weight_decay=self.config.weight_decay)
        self.updates = UpdatesInBackward(self.optimizer) if self.config.optimizer_in_backward else None
        log.info("Optimizer is initialized.")
        log.info("Loss is initialized.")
        if state is not None:
            restore(state, self.model, self.optimizer, self.device)
            log.info(f"The run goes on behind step {self.position.step} of {self.plan.total_steps}.")
        self._report_start()
        self._check_disk_space()

    def load(self) -> CausalLM:
        """The model as the run begins. A recipe that asks it as a reference does so here, before a state is restored."""
        return load_model(self.config, self.base, device=self.device, precision=self.precision)

    def train(self) -> None:
        """Take the steps that are left. Raises what ends the run early."""
        self.random = random_state(self.device)
        try:
            ended = not self.position.finished and self._end_step()
            while not ended and self.position.step < self.plan.total_steps:
                ended = self._train_epoch(*divmod(self.position.step, self.plan.steps_per_epoch))
        except Paused:
            self.save_state()
            raise

    def _train_epoch(self, index: int, first_step: int) -> bool:
        """Train what is left of an epoch. Returns whether the run has come to an early end."""
        plan = self.plan
        total = min(plan.steps_per_epoch, plan.total_steps - index * plan.steps_per_epoch)
        steps = itertools.islice(self._steps(index + 1, first_step), total - first_step)
        window_start = time.perf_counter()
        for batches in self.progress.bar(steps, total, first_step):
            rate = planned_rate(self.config, plan.total_steps, self.position.step + 1)
            means = self.train_step(batches, rate)
            self._take(means, batches, rate, time.perf_counter() - window_start)
            if self._end_step():
                return True
            window_start = time.perf_counter()
        return False

    def train_step(self, batches: list[Batch], rate: float) -> Means:
        """One optimizer step: the means over its units, and the norm of the gradients before clipping."""
        set_learning_rate(self.optimizer, rate)
        units = sum(map(self.num_units, batches))
        losses, figures = [], []
        for batch in batches:
            self.check_cancelled()
            sums = self.sums(batch)
            loss = sums.loss / units
            loss.backward()
            losses.append(loss.detach())
            figures.append(sums.figures)
        norm = self.updates.norm() if self.updates else clip_gradients(self.trained, self.config.max_grad_norm)
        means = torch.stack(figures).sum(0) / units
        loss_value, norm_value, *values = torch.cat(
            [torch.stack([torch.stack(losses).sum(), norm]), means]
        ).tolist()  # the step's only host sync
        self._check_finite(self.position.step + 1, loss=loss_value, grad_norm=norm_value)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Means(loss_value, norm_value, dict(zip(self.FIGURES, values, strict=True)))

    @torch.no_grad()
    def validate(self) -> Validation | None:
        """Means over the held-out records. None when there are none."""
        if not self.data.validation:
            return None
        losses, figures, units = [], [], 0
        self.model.eval()
        try:
            for batch in in_batches(self.data.validation, self.config.batch_size):
                self.check_cancelled()
                sums = self.sums(batch)
                losses.append(sums.loss)
                figures.append(sums.figures)
                units += self.num_units(batch)
        finally:
            self.model.train()
        totals = torch.cat([torch.stack(losses).sum()[None], torch.stack(figures).sum(0)])
        loss, *values = [total / units for total in totals.tolist()]
        return Validation(
            loss=loss,
            figures=dict(zip(self.FIGURES, values, strict=True)),
            perplexity=perplexity(loss) if self.UNIT == "token" else None,
        )

    def save_state(self) -> None:
        """Keep what the run can go on from behind the last step."""
        if self.position.step > 0:
            tensors = collect_tensors(self.model, self.optimizer, self.random)
            save_state(self.folder, self.position, tensors, config=self.config, fingerprint=self.data.fingerprint)

    # ---- parts of setup

    def _milestones(self) -> Milestones:
        return Milestones(
            config=self.config,
            plan=self.plan,
            progress=self.progress,
            publisher=Publisher(self.config, self.folder, self.precision.dtype, base=self.base),
            autocast=self.autocast,
            samples=load_samples(self.config, self.base, self.model_config.max_position_embeddings),
            dataset=self.data.report,
        )

    def _report_start(self) -> None:
        self.progress.event(
            "started",
            pid=os.getpid(),
            device=str(self.device),
            device_reason=self.choice.reason,
            dtype=self.precision.name,
            dtype_reason=self.precision.reason,
            epochs=self.plan.epochs,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.plan.total_steps,
            parameters=self.model_config.num_parameters,
            trainable_parameters=sum(parameter.numel() for parameter in self.trained),
        )

    def _check_disk_space(self) -> None:
        """The old state goes once the new one is whole, so there are two for a while."""
        state = sum(parameter.nbytes for parameter in self.trained) + optimizer_bytes(self.model_config, self.config)
        left = self.plan.num_checkpoints - self.position.step // self.plan.save_interval
        self.milestones.publisher.check_disk_space(self.model, num_saves=left, beside=2 * state)

    # ---- parts of a step

    def _steps(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        return epoch_steps(
            self.data.training,
            batch_size=self.config.batch_size,
            accumulation=self.config.gradient_accumulation_steps,
            seed=self.config.seed,
            epoch=epoch,
            first_step=first_step,
        )

    def _take(self, means: Means, batches: list[Batch], rate: float, seconds: float) -> None:
        """A step was taken: from here on the run would go on behind it."""
        num_trained = sum(batch.num_trained for batch in batches)
        position = self.position
        position.step += 1
        position.finished = False
        position.trained_tokens += num_trained
        position.means = {"loss": means.loss, **means.figures}
        self.random = random_state(self.device)
        self.progress.step(
            StepReport(
                step=position.step,
                total_steps=self.plan.total_steps,
                epoch=math.ceil(position.step / self.plan.steps_per_epoch),
                loss=means.loss,
                learning_rate=rate,
                grad_norm=means.grad_norm,
                trained_tokens_per_second=num_trained / seconds,
                processed_tokens_per_second=sum(batch.num_tokens for batch in batches) / seconds,
                trained_tokens=position.trained_tokens,
                peak_memory_bytes=memory_figures(self.device).peak_allocated,
                **means.figures,
            )
        )

    def _end_step(self) -> bool:
        """What follows a step. Returns whether the run ends with it, before its planned end."""
        step = self.position.step
        validation = self.validate() if self.plan.validates(step) else None
        if validation is not None:
            self._check_finite(step, validation_loss=validation.loss)
        passed = self.milestones.passed(self.model, self.position, validation)
        self.position.finished = True
        if passed.saved and not passed.ends and step < self.plan.total_steps:
            self.save_state()
        return passed.ends

    def _check_finite(self, step: int, **numbers: float) -> None:
        if not all(map(math.isfinite, numbers.values())):
            figures = ", ".join(f"{name} {number}" for name, number in numbers.items())
            raise NonFiniteLoss(
                f"step {step}: {figures}; lower learning_rate (now {self.config.peak_learning_rate}) or look for "
                f"damaged weights in {self.config.model}"
            )

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision.dtype)
