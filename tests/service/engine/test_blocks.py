from __future__ import annotations

import pytest

from service.engine.blocks import NULL_BLOCK, BlockPool, blocks_for


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert NULL_BLOCK not in pool.allocate(pool.num_usable)
    assert pool.num_free == 0


def test_freed_blocks_go_out_again_before_untouched_ones() -> None:
    pool = BlockPool(100)
    first = pool.allocate(3)
    pool.free(first)
    assert set(pool.allocate(3)) == set(first)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_are_counted_up(num_tokens: int, blocks: int) -> None:
    assert blocks_for(num_tokens, 16) == blocks


def test_a_block_freed_twice_is_refused() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(KeyError):
        pool.free(blocks)
    pool.check()
