from __future__ import annotations

import pytest

from service.engine.blocks import NO_NAME, NULL_BLOCK, BlockPool, Key, blocks_for


def key(*tokens: int, before: int = NO_NAME, generation: int = 1) -> Key:
    return generation, before, bytes(tokens)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (32, 1), (33, 2)])
def test_a_begun_block_counts(num_tokens: int, num_blocks: int) -> None:
    assert blocks_for(num_tokens, 32) == num_blocks


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    assert NULL_BLOCK not in {1, 2, 3}
    assert (pool.num_free, pool.num_used) == (0, 3)


def test_a_freed_block_that_nobody_can_find_goes_out_again_first() -> None:
    pool = BlockPool(10)
    blocks = pool.allocate(3)
    pool.free(blocks[1:2])
    assert pool.allocate(1) == blocks[1:2]


def test_a_block_that_is_freed_twice_is_noticed() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.free(blocks)


def test_a_lost_block_is_noticed() -> None:
    pool = BlockPool(4)
    pool._blank.pop()
    with pytest.raises(RuntimeError, match="KV blocks: 2 free"):
        pool.check()


def test_a_shared_block_is_free_when_its_last_user_has_gone() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_used == 2
    pool.free(blocks)
    assert pool.num_used == 0


def test_a_free_block_is_found_by_what_it_holds_until_its_room_is_needed() -> None:
    pool = BlockPool(3)
    old, new = pool.allocate(1), pool.allocate(1)
    pool.name(old[0], key(1), is_filled=True)
    pool.name(new[0], key(2), is_filled=True)
    pool.free(old)
    pool.free(new)
    assert pool.num_used == 0
    assert pool.allocate(1) == old, "the one that was used longest ago goes first"
    assert pool.find(key(1)) is None
    found = pool.find(key(2))
    assert found is not None
    assert found.number == new[0]
    pool.check()


def test_taking_a_found_block_again_makes_it_the_newest() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.name(first[0], key(1), is_filled=True)
    pool.name(second[0], key(2), is_filled=True)
    pool.free(first)
    pool.free(second)
    assert pool.num_free_among(first) == 1
    pool.share(first)
    assert (pool.num_used, pool.num_free_among(first)) == (1, 0)
    pool.free(first)
    assert pool.allocate(1) == second


def test_of_one_request_the_last_block_is_forgotten_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    name = NO_NAME
    for index, number in enumerate(blocks):
        name = pool.name(number, key(index, before=name), is_filled=True)
    pool.free(blocks)
    assert pool.allocate(2) == [blocks[2], blocks[1]]
    assert pool.find(key(0)) is not None


def test_a_block_that_was_not_filled_is_not_found_once_it_is_free() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.name(blocks[0], key(1), is_filled=False)
    assert pool.find(key(1)) is not None
    pool.free(blocks)
    assert pool.find(key(1)) is None
    assert pool.num_free == 2


def test_no_name_is_given_twice() -> None:
    pool = BlockPool(2)
    names: list[int] = []
    for _ in range(3):
        blocks = pool.allocate(1)
        names.append(pool.name(blocks[0], key(1, before=len(names)), is_filled=True))
        pool.free(blocks)
    assert len({*names, NO_NAME}) == 4


def test_what_weights_computed_that_have_gone_is_forgotten() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(1), pool.allocate(1)
    pool.name(old[0], key(1, generation=1), is_filled=True)
    pool.name(new[0], key(1, generation=2), is_filled=True)
    pool.free(old)
    pool.free(new)
    pool.forget_others({2})
    assert pool.find(key(1, generation=1)) is None
    assert pool.find(key(1, generation=2)) is not None
    assert pool.num_free == 3
    pool.check()
