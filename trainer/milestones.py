"""What follows a step, where something follows it: its validation is judged, prompts are answered, a checkpoint is
published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from lm.model import CausalLM
from trainer.card import CheckpointFacts
from trainer.config import RunConfig
from trainer.plan import Plan
from trainer.position import Position
from trainer.progress import Progress
from trainer.publish import Publisher
from trainer.samples import Samples
from trainer.validation import Validation


@dataclass(frozen=True, slots=True)
class Passed:
    """What came of a step."""

    saved: bool
    """Whether a checkpoint was published."""
    ends: bool
    """Whether the run stops here, before its planned end, since it no longer gets better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Milestones:
    config: RunConfig
    plan: Plan
    progress: Progress
    publisher: Publisher
    samples: Samples | None
    autocast: Callable[[], AbstractContextManager[object]]
    """For the samples; what is published is computed as it is stored."""
    dataset: Mapping[str, Any]
    """What the run's `dataset` event says."""

    def passed(self, model: CausalLM, position: Position, validation: Validation | None) -> Passed:
        """Say and do what is due behind the step of `position`, which takes note of the validation."""
        step = position.step
        is_better, ends = self._judge(position, validation)
        saves = self.plan.saves(step) or is_better or ends
        if validation is not None:
            self.progress.event("validation", step=step, **validation.as_event())
        if self.samples is not None and (saves or validation is not None):
            with self.autocast():
                answers = self.samples.answer(model)
            self.progress.event("samples", step=step, samples=[asdict(answer) for answer in answers])
        if saves:
            self._publish(model, position, validation, final=ends or step == self.plan.total_steps)
        if ends:
            self.progress.event("early_stopped", step=step, best_step=position.history.step)
        return Passed(saved=saves, ends=ends)

    def _judge(self, position: Position, validation: Validation | None) -> tuple[bool, bool]:
        """Of a run that may stop early: whether it is better than ever, so that this step is to be kept, and whether
        it stops."""
        patience, history = self.config.early_stopping_patience, position.history
        if validation is None:
            return False, False
        is_better = history.note(position.step, validation.loss, min_delta=self.config.early_stopping_min_delta)
        if patience is None:
            return False, False
        return is_better, history.since >= patience and position.step < self.plan.total_steps

    def _publish(self, model: CausalLM, position: Position, validation: Validation | None, *, final: bool) -> None:
        """Publish a checkpoint, and say so."""
        figures: dict[str, Any] = {
            "token_accuracy": None,
            **position.means,
            "validation_loss": None if validation is None else validation.loss,
            "validation_token_accuracy": None if validation is None else validation.figures.get("token_accuracy"),
        }
        epoch = math.ceil(position.step / self.plan.steps_per_epoch)
        facts = CheckpointFacts(
            step=position.step,
            total_steps=self.plan.total_steps,
            epoch=epoch,
            final=final,
            trained_tokens=position.trained_tokens,
            dataset=self.dataset,
            **figures,
        )
        best = position.history.note_saved(figures["validation_loss"])
        for kind, path in self.publisher.publish(model, facts):
            self.progress.event(
                "checkpoint", step=position.step, epoch=epoch, kind=kind, path=path, final=final, best=best, **figures
            )
