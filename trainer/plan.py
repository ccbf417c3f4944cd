"""How many steps a run takes, and after which of them it publishes a checkpoint. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config import TrainingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    steps_per_epoch: int
    epochs: int
    total_steps: int
    save_interval: int
    """A checkpoint follows every so many steps, and the last one."""
    validate_interval: int | None
    """The held-out records are measured every so many steps, too."""

    @property
    def num_checkpoints(self) -> int:
        return math.ceil(self.total_steps / self.save_interval)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint of this step is published, whatever its validation says."""
        return step == self.total_steps or step % self.save_interval == 0

    def validates(self, step: int) -> bool:
        """Whether the held-out records, if there are any, are measured behind this step."""
        return self.saves(step) or (self.validate_interval is not None and step % self.validate_interval == 0)


def plan_run(options: TrainingOptions, num_rows: int) -> Plan:
    """For a dataset of so many rows: records, pairs, or with `packed` what they fill."""
    per_step = options.batch_size * options.gradient_accumulation_steps
    steps_per_epoch = max(1, math.ceil(num_rows / per_step))
    epochs = options.planned_epochs(steps_per_epoch)
    planned = epochs * steps_per_epoch
    total = min(planned, options.max_steps or planned)
    default_interval = steps_per_epoch if options.epochs else math.ceil(total / 3)
    return Plan(
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        total_steps=total,
        save_interval=options.save_every_n_steps or default_interval,
        validate_interval=options.validate_every_n_steps,
    )
