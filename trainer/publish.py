"""A run's checkpoints: what is published when, and whether the disk holds them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from lm.adapter import merge_adapter, save_adapter
from lm.checkpoint import load_weights, save_model
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE
from trainer.config import RunConfig
from trainer.outcome import NoDiskSpace
from trainer.run_folder import RunFolder

Kind = Literal["full", "adapter", "merged"]

log = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20
"""For tokenizers, events and logs."""


class Publisher:
    """Full runs publish the model at each save; LoRA runs the adapter, and beside the last one the merged model.

    Models are stored in `dtype`, adapters in fp32.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, dtype: torch.dtype) -> None:
        self.config = config
        self.folder = folder
        self.dtype = dtype
        self.base = Path(config.model)

    def check_disk_space(self, model: CausalLM, *, num_saves: int) -> None:
        """Raises NoDiskSpace, with figures, unless `num_saves` checkpoints fit beside what is on the disk now."""
        whole = model.config.num_parameters * self.dtype.itemsize
        adapter = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        needed = num_saves * whole if self.config.recipe == "full" else num_saves * adapter + whole
        free = shutil.disk_usage(self.folder.path).free
        if needed + SPARE_BYTES > free:
            raise NoDiskSpace(
                f"the run will publish {num_saves} checkpoints, {needed / 1e9:.2f} GB in all, and there are "
                f"{free / 1e9:.2f} GB free in {self.folder.path}; raise save_every_n_steps or free some space"
            )

    def publish(self, model: CausalLM, step: int, *, final: bool) -> Iterator[tuple[Kind, str]]:
        """Publish this step. Yields the kind and the path in the run folder of each folder, once it is complete."""
        checkpoint, adapter = (folder / f"step_{step}" for folder in (self.folder.checkpoints, self.folder.adapters))
        if self.config.recipe == "full":
            self._save(model, checkpoint)
            yield "full", self._log_sizes(checkpoint)
            return
        base_model = self.config.model_name or self.config.model
        save_adapter(model, adapter, base_model=base_model)
        yield "adapter", self._log_sizes(adapter)
        if final:
            self._save(self._merged(model, adapter), checkpoint)
            yield "merged", self._log_sizes(checkpoint)

    def _save(self, model: CausalLM, checkpoint: Path) -> None:
        file = self.config.tokenizer_file
        tokenizer_file = None if file is None else Path(file)
        save_model(model.state_dict(), self.base, checkpoint, dtype=self.dtype, tokenizer_file=tokenizer_file)

    def _merged(self, model: CausalLM, adapter: Path) -> CausalLM:
        """The base as it is on the disk, not as the run rounded it, with the adapter. In fp32, in host memory."""
        merged = build_model(model.config, device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
        load_weights(merged, self.base)
        merge_adapter(merged, adapter)
        return merged

    def _log_sizes(self, path: Path) -> str:
        for file in sorted(path.glob("*.safetensors")):
            log.info(f"Model checkpoint of size {file.stat().st_size / 1e9:.2f} GB saved to {file}")
        return str(path.relative_to(self.folder.path))
