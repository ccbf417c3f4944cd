from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.engine.blocks import BlockPool, blocks_for
from service.engine.messages import SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.sequence import Chunk, Sequence, Step
from tests.support.engine_model import ModelledPool, sequence

BLOCK_SIZE = 4


def scheduler(num_blocks: int = 64, *, max_num_seqs: int = 4, budget: int = 8) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks + 1), block_size=BLOCK_SIZE, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
    )


def run_step(subject: Scheduler, token: int = 7) -> Step:
    step = subject.schedule()
    subject.commit(step, [token for chunk in step.chunks if chunk.samples], 0.0)
    return step


def names(chunks: tuple[Chunk, ...]) -> list[str]:
    return [chunk.sequence.request_id for chunk in chunks]


def other_tokens(count: int, first: int) -> list[int]:
    return list(range(first, first + count))


def test_a_long_prompt_is_computed_in_chunks_of_whole_blocks_while_the_others_decode() -> None:
    subject = scheduler(budget=10)
    subject.add(sequence("short", 3, 10))
    run_step(subject)
    subject.add(sequence("long", other_tokens(21, first=50), 2))
    chunks = []
    for _ in range(3):
        step = run_step(subject)
        assert names(step.chunks) == ["short", "long"]
        assert step.num_decoding == 1
        chunks.append(step.chunks[1][1:])
    assert chunks == [(0, 8, False), (8, 16, False), (16, 21, True)]


def test_several_prompts_share_what_the_decoding_requests_leave_of_the_budget() -> None:
    subject = scheduler(budget=16)
    for index, num_prompt in enumerate((5, 6, 9, 3)):
        subject.add(sequence(str(index), other_tokens(num_prompt, first=100 * index), 5))
    step = run_step(subject)
    assert [(chunk.sequence.request_id, chunk.start, chunk.end) for chunk in step.chunks] == [
        ("0", 0, 5),
        ("1", 0, 6),
        ("2", 0, 4),
    ]
    step = run_step(subject)
    assert [(chunk.sequence.request_id, chunk.start, chunk.end) for chunk in step.chunks] == [
        ("0", 5, 6),
        ("1", 6, 7),
        ("2", 4, 9),
        ("3", 0, 3),
    ]
    assert step.num_decoding == 2


def test_a_block_of_a_prompt_is_computed_however_many_decode() -> None:
    subject = scheduler(budget=2, max_num_seqs=8)
    for index in range(6):
        subject.add(sequence(str(index), [index], 50))
    for _ in range(6):
        run_step(subject)
    subject.add(sequence("long", other_tokens(30, first=50), 2))
    step = run_step(subject)
    assert step.num_decoding == 6
    assert step.chunks[-1][1:] == (0, BLOCK_SIZE, False)


def test_no_more_than_max_num_seqs_run_and_the_oldest_go_first() -> None:
    subject = scheduler(max_num_seqs=2)
    for index in range(4):
        subject.add(sequence(str(index), 2, 3))
    started = []
    while not subject.is_idle:
        step = run_step(subject)
        assert len(step.chunks) <= 2
        started += names(step.chunks[step.num_decoding :])
    assert started == ["0", "1", "2", "3"]


def test_a_running_request_has_a_row_and_a_binding_of_its_own() -> None:
    subject = scheduler(max_num_seqs=2, num_blocks=6)
    requests = [sequence(str(index), 6, 10) for index in range(6)]
    for request in requests:
        subject.add(request)
    bindings: dict[int, str] = {}
    while not subject.is_idle:
        step = subject.schedule()
        running = [chunk.sequence for chunk in step.chunks]
        assert len({request.row for request in running}) == len(running)
        for request in running:
            assert request.row in (0, 1)
            assert bindings.setdefault(request.binding, request.request_id) == request.request_id
        subject.commit(step, [7] * sum(chunk.samples for chunk in step.chunks), 0.0)
    assert all(request.row is None for request in requests)
    num_admitted = 6 + sum(request.num_preempted for request in requests)
    assert len(bindings) == num_admitted > 6


def test_when_the_pool_is_full_the_youngest_is_computed_again_and_nobody_loses_tokens() -> None:
    subject = scheduler(num_blocks=6)
    old, young = sequence("old", 7, 12), sequence("young", other_tokens(6, first=50), 10)
    subject.add(old)
    subject.add(young)
    num_preempted = 0
    finished: list[str] = []
    for _ in range(100):
        step = run_step(subject)
        num_preempted += step.num_preempted
        finished += [chunk.sequence.request_id for chunk in step.chunks if chunk.sequence.finish_reason]
        if subject.is_idle:
            break
    assert (old.num_preempted, young.num_preempted) == (0, num_preempted)
    assert num_preempted > 0
    assert finished == ["old", "young"]
    assert (old.num_answer_tokens, young.num_answer_tokens) == (12, 10)
    subject.check_idle()


def test_a_preempted_request_goes_on_before_those_that_wait() -> None:
    subject = scheduler(num_blocks=6, max_num_seqs=2)
    for index in range(3):
        subject.add(sequence(str(index), other_tokens(6, first=100 * index), 12))
    admitted: list[str] = []
    while not subject.is_idle:
        step = run_step(subject)
        admitted += names(step.chunks[step.num_decoding :])
    assert admitted == ["0", "1", "1", "2"]


def test_a_request_waits_until_it_would_not_be_preempted_at_once() -> None:
    subject = scheduler(num_blocks=5, max_num_seqs=3)
    subject.add(sequence("old", other_tokens(7, first=0), 9))
    subject.add(sequence("young", other_tokens(12, first=50), 2))
    steps = []
    while not subject.is_idle:
        steps.append(run_step(subject))
    assert sum(step.num_preempted for step in steps) == 0


def test_a_stop_token_ends_a_request_even_as_its_last_allowed_token() -> None:
    subject = scheduler()
    request = sequence("a", 2, 1, stop_token_ids=(7,))
    subject.add(request)
    run_step(subject, token=7)
    assert request.finish_reason == "stop"
    assert subject.is_idle


def test_a_request_for_no_tokens_is_over_with_its_prompt() -> None:
    subject = scheduler(budget=8)
    request = sequence("a", 11, 0)
    subject.add(request)
    steps = [run_step(subject), run_step(subject)]
    assert [step.chunks[0][1:] for step in steps] == [(0, 8, False), (8, 11, False)]
    assert (request.finish_reason, request.num_answer_tokens) == ("length", 0)
    assert subject.is_idle
    subject.check_idle()


def test_aborts_in_every_state_give_the_blocks_back() -> None:
    subject = scheduler(max_num_seqs=3, budget=8)
    decoding, sharing = sequence("d", 9, 9), sequence("s", 9, 9)
    prefilling, waiting = sequence("p", other_tokens(30, first=50), 9), sequence("w", 3, 9)
    for request in (decoding, sharing, prefilling, waiting):
        subject.add(request)
    for _ in range(3):
        run_step(subject)
    assert decoding.blocks[:2] == sharing.blocks[:2]
    assert (subject.num_running, subject.num_waiting) == (3, 1)
    for request in (waiting, prefilling, sharing, decoding):
        subject.remove(request)
        subject.pool.check()
    assert subject.is_idle
    subject.check_idle()


def test_a_lost_block_is_noticed_when_idle() -> None:
    subject = scheduler()
    subject.pool.allocate(1)
    with pytest.raises(RuntimeError, match="belong to no request"):
        subject.check_idle()


def num_lines(work: Callable[[], object]) -> int:
    """Lines of Python that `work` runs."""
    count = 0

    def trace(frame: object, event: str, _: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_step_and_an_abort_cost_the_same_however_many_wait() -> None:
    def lines(num_waiting: int) -> int:
        subject = scheduler(max_num_seqs=2, num_blocks=8)
        requests = [sequence(str(index), 9, 1000) for index in range(num_waiting)]
        for request in requests:
            subject.add(request)
        for _ in range(5):
            run_step(subject)

        def work() -> None:
            run_step(subject)
            subject.remove(requests[-1])  # a waiting one
            subject.remove(requests[0])  # a running one, so that another begins
            run_step(subject)

        return num_lines(work)

    assert lines(10_000) == lines(10)


def test_a_long_prompt_that_does_not_fit_yet_costs_the_steps_nothing() -> None:
    def lines(num_shared: int) -> int:
        subject = scheduler(num_blocks=1000, budget=4000)
        subject.add(sequence("over", [1], 1))
        run_step(subject)
        running = sequence("running", 3000, 50)
        subject.add(running)
        subject.add(sequence("waiting", [*running.token_ids[:num_shared], *other_tokens(1050, first=5000)], 1))
        for _ in range(3):
            run_step(subject)
        assert subject.num_waiting == 1
        return num_lines(lambda: run_step(subject))

    assert lines(2900) == lines(100)


PREFIXES = [list(range(first, first + 30)) for first in (0, 0, 500)]
PREFIXES[1][9] = 77  # as the first one for two blocks


class Requests(RuleBasedStateMachine):
    """Whatever arrives, is aborted or fails: everyone else finishes, in order, reading only what is there."""

    @initialize(
        num_blocks=st.integers(blocks_for(30 + 16, BLOCK_SIZE), 30), rows=st.integers(1, 5), budget=st.integers(1, 20)
    )
    def start(self, num_blocks: int, rows: int, budget: int) -> None:
        self.subject = scheduler(num_blocks, max_num_seqs=rows, budget=budget)
        self.pool = ModelledPool(self.subject, BLOCK_SIZE)
        self.requests: list[Sequence] = []
        self.wanted: list[int] = []
        self.gone: set[str] = set()
        self.first_bindings: dict[str, int] = {}
        self.generation = 1

    @rule(
        prefix=st.sampled_from(PREFIXES), length=st.integers(1, 30), max_tokens=st.integers(0, 16), scores=st.booleans()
    )
    def add(self, prefix: list[int], length: int, max_tokens: int, scores: bool) -> None:
        request = sequence(str(len(self.requests)), prefix[:length], max_tokens, generation=self.generation)
        if scores:
            request.sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=1)
        self.requests.append(request)
        self.wanted.append(max_tokens)
        self.subject.add(request)

    @rule(turn=st.integers(0, 100))
    def add_next_turn(self, turn: int) -> None:
        over = [request for request in self.requests if request.finish_reason and request.num_tokens < 28]
        if over:
            tokens = [*over[turn % len(over)].token_ids, 5, 6]
            self.requests.append(sequence(str(len(self.requests)), tokens, 2, generation=self.generation))
            self.wanted.append(2)
            self.subject.add(self.requests[-1])

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            step = self.subject.schedule()
            assert bool(step.chunks) == (not self.subject.is_idle)
            for chunk in step.chunks:
                self.first_bindings.setdefault(chunk.sequence.request_id, chunk.sequence.binding)
            self.pool.compute(step)
            self.subject.commit(step, [self.pool._next(chunk) for chunk in step.chunks if chunk.samples], 0.0)

    @precondition(lambda self: not self.subject.is_idle)
    @rule()
    def fail_a_step(self) -> None:
        for chunk in self.subject.schedule().chunks:
            self.subject.remove(chunk.sequence)
            self.gone.add(chunk.sequence.request_id)

    @rule(index=st.integers(0, 100))
    def abort(self, index: int) -> None:
        left = [r for r in self.requests if r.finish_reason is None and r.request_id not in self.gone]
        if left:
            self.subject.remove(left[index % len(left)])
            self.gone.add(left[index % len(left)].request_id)

    @rule()
    def swap_weights(self) -> None:
        self.generation += 1
        used = {r.generation or 0 for r in self.requests if r.finish_reason is None and r.request_id not in self.gone}
        self.subject.forget_others({*used, self.generation})

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.subject.pool.check()
        held = Counter(block for request in self.requests for block in request.blocks)
        assert len(held) == self.subject.pool.num_used
        assert all(self.subject.pool[block].num_users == count for block, count in held.items())
        for request in self.requests:
            assert len(request.blocks) == len(set(request.blocks))
            assert (request.row is None) == (not request.blocks)

    def teardown(self) -> None:
        for _ in range(3000):
            if self.subject.is_idle:
                break
            self.step(1)
        self.subject.check_idle()
        for request, wanted in zip(self.requests, self.wanted, strict=True):
            if request.request_id not in self.gone:
                assert (request.finish_reason, request.num_answer_tokens) == ("length", wanted)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
