"""Which blocks of the KV pool are free, who shares the others, and what each full one holds. Knows no tensors.

A block whose contents have a key stays findable after its last user has gone, until its room is needed: the one that
was used longest ago goes first. A key is exact: the weights, the name of the block before it, and this block's own
tokens. A block gets its name with its key and no name is given twice, so equal keys mean equal tokens from the first
on, and nothing rests on a hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass

NULL_BLOCK = 0
"""Padding rows write here; it belongs to nobody."""
NO_NAME = 0
"""What stands before the first block."""

Key = tuple[int, int, bytes]
"""Generation of the weights, name of the block before, tokens."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold the keys and values of `num_tokens` tokens."""
    return -(-num_tokens // block_size)


@dataclass(slots=True, eq=False)
class Block:
    number: int
    num_users: int = 0
    key: Key | None = None
    """What it holds or, while `is_filled` is not set, will hold."""
    name: int = NO_NAME
    is_filled: bool = False


class BlockPool:
    """Hands out block numbers. A freed block without a key goes out again first, to touch little memory."""

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` counts the null block."""
        self.num_blocks = num_blocks
        self.num_frees = 0
        """Calls of `free` so far: while it stays, `num_free` has not grown."""
        self._blocks = [Block(number) for number in range(num_blocks)]
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Free blocks with a key, the one that was used longest ago first."""
        self._by_key: dict[Key, Block] = {}
        self._num_names = 0

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Those that hold something findable included."""
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free

    def __getitem__(self, number: int) -> Block:
        return self._blocks[number]

    def find(self, key: Key) -> Block | None:
        return self._by_key.get(key)

    def allocate(self, count: int) -> list[int]:
        """The caller has checked `num_free`."""
        assert count <= self.num_free
        return [self._take() for _ in range(count)]

    def share(self, blocks: list[int]) -> None:
        """One more user for each."""
        for number in blocks:
            block = self._blocks[number]
            if not block.num_users:
                del self._kept[number]
            block.num_users += 1

    def num_free_among(self, blocks: list[int]) -> int:
        """How many of these `share` would take from the free ones."""
        return sum(not self._blocks[number].num_users for number in blocks)

    def free(self, blocks: list[int]) -> None:
        """One user less for each. The last one goes first: it is of no use without those before it."""
        self.num_frees += 1
        for number in reversed(blocks):
            block = self._blocks[number]
            if not block.num_users:
                raise RuntimeError(f"KV block {number} is freed twice")
            block.num_users -= 1
            if not block.num_users:
                self._put(block)

    def name(self, number: int, key: Key, *, is_filled: bool) -> int:
        """Give a used block its key, and its new name. One that is not filled yet must not be shared before it is."""
        block = self._blocks[number]
        assert block.key is None
        assert key not in self._by_key
        self._num_names += 1
        block.key, block.name, block.is_filled = key, self._num_names, is_filled
        self._by_key[key] = block
        return block.name

    def fill(self, number: int) -> None:
        """It may be shared from now on, if it has a key."""
        block = self._blocks[number]
        block.is_filled = block.key is not None

    def forget_others(self, generations: Container[int]) -> None:
        """Forget what was computed with weights that are not among these."""
        for block in [block for key, block in self._by_key.items() if key[0] not in generations]:
            self._forget(block)
            if not block.num_users:
                del self._kept[block.number]
                self._blank.append(block.number)

    def check(self) -> None:
        """Every block is in one place. Raises RuntimeError: a leaked or doubled block corrupts answers later."""
        used = {block.number for block in self._blocks if block.num_users}
        places = used | self._kept.keys() | set(self._blank)
        if len(used) != self.num_used or len(places) != self.num_usable:
            raise RuntimeError(f"KV blocks: {self.num_free} free + {len(used)} used of {self.num_usable}")
        if any(block.key != key for key, block in self._by_key.items()):
            raise RuntimeError("KV blocks: one is found under a key that is not its own")
        if any(self._blocks[number].key is None for number in self._kept):
            raise RuntimeError("KV blocks: one is kept that nobody can find")

    def _take(self) -> int:
        if self._blank:
            number = self._blank.pop()
        else:
            number, _ = self._kept.popitem(last=False)
            self._forget(self._blocks[number])
        self._blocks[number].num_users = 1
        return number

    def _put(self, block: Block) -> None:
        if block.is_filled:
            self._kept[block.number] = None
        else:
            self._forget(block)
            self._blank.append(block.number)

    def _forget(self, block: Block) -> None:
        if block.key is not None:
            del self._by_key[block.key]
        block.key, block.name, block.is_filled = None, NO_NAME, False
