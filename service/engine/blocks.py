"""Which blocks of the KV pool are free. Knows no tensors and no requests."""

from __future__ import annotations

NULL_BLOCK = 0
"""Padding rows write here; it belongs to nobody."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold the keys and values of `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockPool:
    """Hands out block numbers. A freed block goes out again first, so the pool touches no more memory than it needs."""

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` counts the null block."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._used: set[int] = set()

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def allocate(self, count: int) -> list[int]:
        """The caller has checked `num_free`."""
        assert count <= self.num_free
        blocks = [self._free.pop() for _ in range(count)]
        self._used.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            self._used.remove(block)
            self._free.append(block)

    def check(self) -> None:
        """Every block is in one place. Raises RuntimeError: a leaked or doubled block corrupts answers later."""
        if len(self._free) + len(self._used) != self.num_usable or not self._used.isdisjoint(self._free):
            raise RuntimeError(f"KV blocks: {len(self._free)} free + {len(self._used)} used of {self.num_usable}")
