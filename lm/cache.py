"""Storage of keys and values in blocks, and what one forward pass over it needs to know.

Which request owns which block is the scheduler's business. Block 0 belongs to nobody: padding writes there.
Legend: B rows, T tokens a row, M blocks a row, KVH key/value heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lm.config import ModelConfig

NULL_BLOCK = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    keys: tuple[Tensor, ...]
    """Per layer, (num_blocks, block_size, KVH, D)."""
    values: tuple[Tensor, ...]
    num_blocks: int
    """The null block included."""
    block_size: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """Zeroed storage: a masked slot still meets the values as 0 * value, which must not be NaN.

        On the CPU a block takes memory from its first use on.
        """
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(_zeros(shape, dtype, device) for _ in layers),
            values=tuple(_zeros(shape, dtype, device) for _ in layers),
            num_blocks=num_blocks,
            block_size=block_size,
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Where the tokens of one forward go, and where each row's earlier tokens are.

    Key j of a row is slot j % block_size of block `block_table[row, j // block_size]`; a query at position p sees
    keys 0..p. A padded token has position 0 and slot 0; a padded row has a table of null blocks.
    """

    cache: KVCache
    slot_mapping: Tensor
    """(B * T,) int32 or int64: block * block_size + offset of each new token."""
    block_table: Tensor
    """(B, M) int32 or int64; unused columns hold the null block."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes pages that the system zeroes when they are first touched; torch.zeros would touch them all
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
