"""Which tokens requests with common beginnings compute, and that what they read is what they would have computed."""

from __future__ import annotations

from service.engine.blocks import BlockPool
from service.engine.messages import SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from tests.support.engine_model import ModelledPool, sequence

BLOCK_SIZE = 4
TEXT = list(range(100, 130))


class Bench:
    def __init__(self, num_blocks: int = 64, budget: int = 64) -> None:
        self.scheduler = Scheduler(
            BlockPool(num_blocks + 1), block_size=BLOCK_SIZE, max_num_seqs=8, max_num_batched_tokens=budget
        )
        self.pool = ModelledPool(self.scheduler, BLOCK_SIZE)

    def run(self, *requests: Sequence) -> int:
        """To the end of all; returns how many tokens were computed."""
        before = self.pool.num_computed_tokens
        for request in requests:
            self.scheduler.add(request)
        while not self.scheduler.is_idle:
            self.pool.step()
        self.scheduler.check_idle()
        return self.pool.num_computed_tokens - before


def test_the_same_prompt_again_computes_what_is_not_in_full_blocks() -> None:
    bench = Bench()
    first, second = sequence("1", TEXT[:14], 1), sequence("2", TEXT[:14], 1)
    assert bench.run(first) == 14
    assert bench.run(second) == 2
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)


def test_at_least_one_token_is_computed() -> None:
    bench = Bench()
    bench.run(sequence("1", TEXT[:12], 1))
    assert bench.run(sequence("2", TEXT[:12], 1)) == BLOCK_SIZE


def test_several_answers_to_one_prompt_compute_it_once_even_when_they_come_together() -> None:
    bench = Bench()
    assert bench.run(*[sequence(str(index), TEXT[:18], 1) for index in range(5)]) == 18 + 4 * 2


def test_they_compute_it_once_also_where_it_takes_many_steps() -> None:
    bench = Bench(budget=4)
    requests = [sequence(str(index), TEXT[:27], 2) for index in range(3)]
    num_computed = bench.run(*requests)
    assert num_computed == 27 + 2 * 3 + 3
    assert [request.num_cached_tokens for request in requests] == [0, 24, 24]


def test_a_common_system_prompt_is_computed_once() -> None:
    bench = Bench()
    system = TEXT[:16]
    requests = [sequence(str(index), [*system, index, index], 1) for index in range(4)]
    assert bench.run(*requests) == 18 + 3 * 2


def test_the_next_turn_of_a_chat_computes_neither_the_first_prompt_nor_its_answer() -> None:
    bench = Bench()
    first = sequence("1", TEXT[:10], 12)
    bench.run(first)
    second = sequence("2", [*first.token_ids, 7, 8, 9], 1)
    assert bench.run(second) == 25 - 20
    assert second.num_cached_tokens == 20


def test_equal_tokens_after_different_beginnings_share_nothing() -> None:
    bench = Bench()
    bench.run(sequence("1", [1, 2, 3, 4, *TEXT[:9]], 1))
    bench.run(sequence("2", [4, 3, 2, 1, *TEXT[9:18]], 1))
    assert bench.run(sequence("3", [4, 3, 2, 1, *TEXT[:9]], 1)) == 9


def test_a_prefix_is_not_shared_between_weights() -> None:
    bench = Bench()
    bench.run(sequence("1", TEXT[:14], 1, generation=1))
    assert bench.run(sequence("2", TEXT[:14], 1, generation=2)) == 14
    assert bench.run(sequence("3", TEXT[:14], 1, generation=1)) == 2
    bench.scheduler.forget_others({2})
    assert bench.run(sequence("4", TEXT[:14], 1, generation=2)) == 2
    assert bench.run(sequence("5", TEXT[:14], 1, generation=1)) == 14


def test_log_probabilities_of_the_prompt_are_computed_and_others_may_use_what_was() -> None:
    bench = Bench()
    scores = [sequence(name, TEXT[:14], 1) for name in "ab"]
    for request in scores:
        request.sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    assert [bench.run(request) for request in scores] == [14, 14]
    assert [request.num_cached_tokens for request in scores] == [0, 0]
    assert bench.run(sequence("c", TEXT[:14], 1)) == 2


def test_a_block_that_others_computed_too_is_kept_once() -> None:
    bench = Bench()
    scores = [sequence(name, TEXT[:14], 1) for name in "ab"]
    for request in scores:
        request.sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    bench.run(*scores)
    pool = bench.scheduler.pool
    assert len(pool._kept) == 3


def test_where_the_one_that_computes_the_beginning_is_aborted_the_next_one_computes_it() -> None:
    bench = Bench(budget=8)
    first, second = sequence("1", TEXT[:22], 1), sequence("2", TEXT[:22], 1)
    bench.scheduler.add(first)
    bench.scheduler.add(second)
    bench.pool.step()
    bench.scheduler.remove(first)
    assert bench.run() == 22 - 8, "the first two blocks were there"
    assert second.num_cached_tokens == 8


def test_a_failed_step_leaves_nothing_to_be_found() -> None:
    bench = Bench()
    first, second = sequence("1", TEXT[:22], 1), sequence("2", TEXT[:22], 1)
    bench.scheduler.add(first)
    for chunk in bench.scheduler.schedule().chunks:
        bench.scheduler.remove(chunk.sequence)
    assert bench.run(second) == 22


def test_old_blocks_make_room_for_new_requests_the_oldest_first() -> None:
    bench = Bench(num_blocks=8)
    for index, name in enumerate("ab"):
        bench.run(sequence(name, [index] * 14, 1))
    bench.run(sequence("c", [5] * 14, 1))  # needs 4 blocks; 2 were never full
    assert bench.scheduler.pool.num_used == 0
    assert bench.run(sequence("b again", [1] * 14, 1)) == 2
    assert bench.run(sequence("a again", [0] * 14, 1)) > 2


def test_a_preempted_request_finds_its_own_blocks_again_where_nobody_took_them() -> None:
    bench = Bench(num_blocks=9)
    old, young = sequence("old", TEXT[:7], 14), sequence("young", [5] * 13, 14)
    num_computed = bench.run(old, young)
    assert (old.num_preempted, young.num_preempted) == (0, 1)
    assert young.num_cached_tokens == 0, "only what others had computed counts"
    assert num_computed < (7 + 13) + (13 + 13) + 13
