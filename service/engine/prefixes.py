"""Requests that begin with the same tokens compute them once.

A request takes over the full blocks at its beginning that the pool has; while another one is filling the next of them,
it waits for that. Blocks that fill up while an answer is made are found as well, by the next turn of the same chat.
"""

from __future__ import annotations

from array import array

from service.engine.blocks import NO_NAME, BlockPool, Key
from service.engine.sequence import Sequence


class Prefixes:
    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size

    def match(self, sequence: Sequence) -> list[int] | None:
        """The blocks that hold the longest known beginning of a request, never all of its tokens.

        None while another request fills the next one. A request that wants log probabilities of its prompt gets no
        blocks, since these come from computing it.
        """
        blocks: list[int] = []
        name = NO_NAME
        if sequence.sampling.prompt_logprobs is not None:
            return blocks
        for index in range((sequence.num_tokens - 1) // self._block_size):
            block = self._pool.find(self._key(sequence, index, name))
            if block is None:
                break
            if not block.is_filled:
                return None
            blocks.append(block.number)
            name = block.name
        return blocks

    def begin(self, sequence: Sequence, num_shared: int) -> None:
        """Name the full blocks of all its tokens; the first `num_shared` come from `match`."""
        sequence.num_computed = num_shared * self._block_size
        sequence.num_named_blocks = num_shared
        sequence.last_name = self._pool[sequence.blocks[num_shared - 1]].name if num_shared else NO_NAME
        for _ in range(num_shared, sequence.num_tokens // self._block_size):
            self._name_next(sequence, is_filled=False)

    def fill(self, sequence: Sequence, start: int, end: int) -> None:
        """Tokens [start, end) are computed."""
        for index in range(start // self._block_size, end // self._block_size):
            if index == sequence.num_named_blocks:
                self._name_next(sequence, is_filled=True)
            else:
                self._pool.fill(sequence.blocks[index])

    def _name_next(self, sequence: Sequence, *, is_filled: bool) -> None:
        """Where the same tokens have a block with a name already, that name goes on and this block has none."""
        index = sequence.num_named_blocks
        key = self._key(sequence, index, sequence.last_name)
        known = self._pool.find(key)
        if known is None:
            sequence.last_name = self._pool.name(sequence.blocks[index], key, is_filled=is_filled)
        else:
            sequence.last_name = known.name
        sequence.num_named_blocks = index + 1

    def _key(self, sequence: Sequence, index: int, name: int) -> Key:
        assert sequence.generation is not None
        start = index * self._block_size
        tokens = array("i", sequence.token_ids[start : start + self._block_size])
        return sequence.generation, name, tokens.tobytes()
