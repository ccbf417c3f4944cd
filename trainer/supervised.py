"""Supervised fine-tuning, of the whole model (`full`) or of a small adapter (`lora`), and pre-training on plain text."""

from __future__ import annotations

from typing import ClassVar, Literal

from trainer.data.batches import Batch
from trainer.loss import cross_entropy
from trainer.recipe import Recipe
from trainer.sums import Sums


class SupervisedRecipe(Recipe):
    """Learns to continue as the data does: cross entropy on trained tokens only, their logits in chunks
    (trainer/loss.py)."""

    UNIT: ClassVar[Literal["token", "pair"]] = "token"
    FIGURES: ClassVar[tuple[str, ...]] = ("token_accuracy",)

    def sums(self, batch: Batch) -> Sums:
        batch = batch.to(self.device)
        with self.autocast():
            hidden = self.model(batch.input_ids, batch.positions, documents=batch.documents)
        rows = hidden.flatten(0, 1).index_select(0, batch.target_rows).to(self.precision.dtype)
        loss, num_right = cross_entropy(rows, self.model.output_weight, batch.targets)
        return Sums(loss, num_right[None])

    def num_units(self, batch: Batch) -> int:
        return batch.num_trained
