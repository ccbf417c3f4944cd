"""Direct Preference Optimization: learns which of two answers is preferred, of the whole model or of an adapter."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lm.lora import without_adapter
from lm.model import CausalLM
from trainer.data.batches import Batch, in_batches
from trainer.data.rows import MixedRows
from trainer.dpo_loss import answer_log_probs, preference_loss
from trainer.recipe import Recipe
from trainer.reference import ReferenceTable
from trainer.sums import Sums

log = logging.getLogger(__name__)


class DpoRecipe(Recipe):
    """Raises the log probability of chosen answers over that of rejected ones, as compared with a reference model.

    The reference is the model that the run begins with. Where a new adapter is trained, that is the model without it,
    and no second model is needed. Else its log probabilities of all pairs that the run will see are computed before the
    first step, and kept in `state/` for a run that goes on.
    """

    UNIT: ClassVar[Literal["token", "pair"]] = "pair"
    FIGURES: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin")

    def sums(self, batch: Batch) -> Sums:
        batch = batch.to(self.device)
        reference = self._reference(batch)
        preference = preference_loss(
            self._log_probs(self.model, batch),
            reference,
            beta=self.config.dpo.beta,
            label_smoothing=self.config.dpo.label_smoothing,
        )
        right = (preference.margins > 0).sum(dtype=torch.float32)
        return Sums(preference.losses.sum(), torch.stack([right, preference.margins.sum()]))

    def num_units(self, batch: Batch) -> int:
        return len(batch.pairs)

    def load(self) -> CausalLM:
        model = super().load()
        config = self.config
        trains_further = config.start_adapter is not None and not config.merge_start
        self.table = self._ask(model) if trains_further or not config.trains_adapter else None
        return model

    def _log_probs(self, model: CausalLM, batch: Batch) -> Tensor:
        """(2 P,) of the chosen answers, then of the rejected ones."""
        with self.autocast():
            hidden = model(batch.input_ids, batch.positions)
        num_rows, width = batch.input_ids.shape
        return answer_log_probs(
            hidden.flatten(0, 1).index_select(0, batch.target_rows).to(self.precision.dtype),
            model.output_weight,
            batch.targets,
            batch.target_rows // width,
            num_rows=num_rows,
        )

    @torch.no_grad()
    def _reference(self, batch: Batch) -> Tensor:
        if self.table is not None:
            return self.table.get(batch.pairs).to(self.device)
        with without_adapter(self.model):
            return self._log_probs(self.model, batch)

    @torch.no_grad()
    def _ask(self, model: CausalLM) -> ReferenceTable:
        """What `model` says of every pair that the run will see, as far as it was not asked before."""
        path, fingerprint = self.folder.state / "reference.safetensors", self.data.fingerprint
        table = ReferenceTable.load(path, fingerprint=fingerprint)
        count = 0
        model.eval()
        for batch in self._planned_batches():
            if not table.knows(batch.pairs):
                self.check_cancelled()
                table.put(batch.pairs, self._log_probs(model, batch.to(self.device)))
                count += len(batch.pairs)
        model.train()
        if count:
            table.save(path, fingerprint=fingerprint)
            log.info(f"The reference model was asked about {count} pairs.")
        return table

    def _planned_batches(self) -> Iterator[Batch]:
        """All that is trained on or validated; of epochs with the same pairs only the first."""
        epochs = self.plan.epochs if isinstance(self.data.training, MixedRows) else 1
        steps = itertools.chain.from_iterable(self._steps(epoch, 0) for epoch in range(1, epochs + 1))
        yield from itertools.chain.from_iterable(itertools.islice(steps, self.plan.total_steps))
        yield from in_batches(self.data.validation, self.config.batch_size)
