"""A run's checkpoints: what is published when, and whether the disk holds them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lm.adapter import write_adapter
from lm.checkpoint import write_model
from lm.folder import publish
from lm.model import CausalLM
from trainer.card import CheckpointFacts, Kind, card_files
from trainer.config import RunConfig
from trainer.estimate import checkpoints_at_once
from trainer.model_setup import merged_model
from trainer.outcome import NoDiskSpace
from trainer.run_folder import RunFolder

log = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20
"""For tokenizers, events and logs."""


class Publisher:
    """Where every weight is trained, the model at each save; else the adapter, and beside the last the merged model.

    Models are stored in `dtype`, adapters in fp32, each with what it came from (trainer/card.py). `base` is the model
    that the adapter is for, where that is not the config's.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, dtype: torch.dtype, *, base: Path | None = None) -> None:
        self.config = config
        self.folder = folder
        self.dtype = dtype
        self.base = base or Path(config.model)

    def check_disk_space(self, model: CausalLM, *, num_saves: int, beside: int = 0) -> None:
        """Raises NoDiskSpace, with figures, unless `num_saves` checkpoints, or as many of them as the options keep, and
        `beside` bytes fit beside what is there."""
        kept = checkpoints_at_once(self.config, num_saves)
        whole = model.config.num_parameters * self.dtype.itemsize
        adapter = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        needed = beside + (kept * adapter + whole if self.config.trains_adapter else kept * whole)
        free = shutil.disk_usage(self.folder.path).free
        if needed + SPARE_BYTES > free:
            raise NoDiskSpace(
                f"the run will publish {num_saves} checkpoints, {needed / 1e9:.2f} GB in all, and there are "
                f"{free / 1e9:.2f} GB free in {self.folder.path}; raise save_every_n_steps or free some space"
            )

    def publish(self, model: CausalLM, facts: CheckpointFacts) -> Iterator[tuple[Kind, str]]:
        """Publish this step. Yields the kind and the path in the run folder of each folder, once it is complete.

        What the run published before it was killed and resumed is left as it is.
        """
        checkpoint, adapter = (root / f"step_{facts.step}" for root in (self.folder.checkpoints, self.folder.adapters))
        if not self.config.trains_adapter:
            yield from self._publish("full", checkpoint, facts, lambda folder: self._write_model(model, folder))
            return
        yield from self._publish("adapter", adapter, facts, lambda folder: self._write_adapter(model, folder))
        if facts.final:
            yield from self._publish(
                "merged", checkpoint, facts, lambda folder: self._write_model(merged_model(self.base, adapter), folder)
            )

    def _publish(
        self, kind: Kind, final: Path, facts: CheckpointFacts, write: Callable[[Path], None]
    ) -> Iterator[tuple[Kind, str]]:
        if not final.exists():
            with publish(final) as folder:
                write(folder)
                run = self.folder.path.resolve().name
                for name, text in card_files(self.config, facts, run=run, kind=kind, base=self.base).items():
                    (folder / name).write_text(text, encoding="utf-8")
        yield kind, self._log_sizes(final)

    def _write_model(self, model: CausalLM, folder: Path) -> None:
        file = self.config.tokenizer_file
        tokenizer_file = None if file is None else Path(file)
        write_model(model.state_dict(), self.base, folder, dtype=self.dtype, tokenizer_file=tokenizer_file)

    def _write_adapter(self, model: CausalLM, folder: Path) -> None:
        is_named = self.base == Path(self.config.model) and self.config.model_name is not None
        write_adapter(model, folder, base_model=str(self.config.model_name if is_named else self.base))

    def _log_sizes(self, path: Path) -> str:
        for file in sorted(path.glob("*.safetensors")):
            log.info(f"Model checkpoint of size {file.stat().st_size / 1e9:.2f} GB saved to {file}")
        return str(path.relative_to(self.folder.path))
