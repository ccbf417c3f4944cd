"""What the reference model of DPO says of each pair, where it is asked once, before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lm.folder import write_atomic

TENSOR, FINGERPRINT = "log_probs", "fingerprint"


class ReferenceTable:
    """Log probabilities of both answers of pairs, by the number of the pair. In host memory: 8 bytes a pair."""

    def __init__(self) -> None:
        self._values = torch.empty(0, 2)

    def put(self, pairs: Sequence[int], log_probs: Tensor) -> None:
        """`log_probs` (2 P,): of the chosen answers, then of the rejected ones."""
        missing = max(pairs) + 1 - len(self._values)
        if missing > 0:
            grown = max(missing, len(self._values))
            self._values = torch.cat([self._values, torch.full((grown, 2), math.nan)])
        self._values[list(pairs)] = log_probs.cpu().view(2, -1).T

    def get(self, pairs: Sequence[int]) -> Tensor:
        """(2 P,) fp32, as they were put."""
        return self._values[list(pairs)].T.reshape(-1)

    def knows(self, pairs: Sequence[int]) -> bool:
        return max(pairs) < len(self._values) and not bool(self.get(pairs).isnan().any())

    def save(self, path: Path, *, fingerprint: str) -> None:
        """Whole or not at all. `fingerprint` is that of the data, whose pairs the numbers count."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({TENSOR: self._values}, metadata={FINGERPRINT: fingerprint}))

    @classmethod
    def load(cls, path: Path, *, fingerprint: str) -> ReferenceTable:
        """An empty one if there is none, or one of other data."""
        table = cls()
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if file.metadata()[FINGERPRINT] == fingerprint:
                    table._values = file.get_tensor(TENSOR)
        return table
