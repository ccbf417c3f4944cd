from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.blocks import BlockPool, blocks_for
from service.engine.messages import SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.sequence import Chunk, Sequence, Step

BLOCK_SIZE = 4


def sequence(name: str, num_prompt: int, max_tokens: int, *, stop_token_ids: frozenset[int] = frozenset()) -> Sequence:
    return Sequence(
        request_id=name,
        model_id="m",
        token_ids=list(range(num_prompt)),
        num_prompt_tokens=num_prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
        stop_token_ids=stop_token_ids,
        arrived=0.0,
    )


def scheduler(num_blocks: int = 64, *, max_num_seqs: int = 4, prefill_chunk: int = 8) -> Scheduler:
    pool = BlockPool(num_blocks + 1)
    return Scheduler(pool, block_size=BLOCK_SIZE, max_num_seqs=max_num_seqs, max_num_batched_tokens=prefill_chunk)


def run_step(subject: Scheduler, token: int = 7) -> tuple[Step, list[Sequence]]:
    step = subject.schedule()
    return step, subject.commit(step, [token for chunk in step.chunks if chunk.samples], 0.0)


def names(chunks: tuple[Chunk, ...]) -> list[str]:
    return [chunk.sequence.request_id for chunk in chunks]


def test_a_long_prompt_is_computed_in_chunks_while_the_others_decode() -> None:
    subject = scheduler(prefill_chunk=8)
    subject.add(sequence("short", 3, 10))
    run_step(subject)
    subject.add(sequence("long", 20, 2))
    chunks = []
    for _ in range(3):
        step, _ = run_step(subject)
        assert names(step.chunks) == ["short", "long"]
        chunks.append(step.chunks[1][1:])
    assert chunks == [(0, 8, False), (8, 16, False), (16, 20, True)]


def test_no_more_than_max_num_seqs_run_and_the_oldest_go_first() -> None:
    subject = scheduler(max_num_seqs=2)
    for index in range(4):
        subject.add(sequence(str(index), 2, 3))
    started = []
    while not subject.is_idle:
        step, _ = run_step(subject)
        assert len(step.chunks) <= 2
        started += names(step.chunks[step.num_decoding :])
    assert started == ["0", "1", "2", "3"]


def test_when_the_pool_is_full_the_youngest_is_computed_again_and_nobody_loses_tokens() -> None:
    subject = scheduler(num_blocks=6, max_num_seqs=4)
    old, young = sequence("old", 7, 12), sequence("young", 6, 10)
    subject.add(old)
    subject.add(young)
    num_preempted = 0
    finished = []
    for _ in range(100):
        step, grown = run_step(subject)
        num_preempted += step.num_preempted
        finished += [s.request_id for s in grown if s.finish_reason]
        if subject.is_idle:
            break
    assert num_preempted > 0
    assert finished == ["old", "young"]
    assert (old.num_answer_tokens, young.num_answer_tokens) == (12, 10)
    subject.check_idle()


def test_a_stop_token_ends_a_request_even_as_its_last_allowed_token() -> None:
    subject = scheduler()
    request = sequence("a", 2, 1, stop_token_ids=frozenset({7}))
    subject.add(request)
    run_step(subject, token=7)
    assert request.finish_reason == "stop"
    assert subject.is_idle


def test_aborts_in_every_state_give_the_blocks_back() -> None:
    subject = scheduler(max_num_seqs=2, prefill_chunk=4)
    decoding, prefilling, waiting = sequence("d", 3, 9), sequence("p", 30, 9), sequence("w", 3, 9)
    for request in (decoding, prefilling, waiting):
        subject.add(request)
        run_step(subject)
    assert (subject.num_running, subject.num_waiting) == (2, 1)
    for request in (waiting, prefilling, decoding):
        subject.remove(request)
    assert subject.is_idle
    subject.check_idle()


def test_a_lost_block_is_noticed_when_idle() -> None:
    subject = scheduler()
    subject.pool.allocate(1)
    with pytest.raises(RuntimeError, match="belong to no request"):
        subject.check_idle()


def test_a_step_and_an_abort_cost_the_same_however_many_wait() -> None:
    def seconds(num_waiting: int) -> float:
        subject = scheduler(max_num_seqs=1)
        requests = [sequence(str(index), 2, 1000) for index in range(num_waiting)]
        for request in requests:
            subject.add(request)
        best = float("inf")
        for request in requests[-50:]:
            begin = time.perf_counter()
            run_step(subject)
            subject.remove(request)
            best = min(best, time.perf_counter() - begin)
        return best

    assert seconds(50_000) < 20 * seconds(100)


@dataclass
class Arrival:
    at_step: int
    num_prompt: int
    max_tokens: int
    abort_after: int | None
    steps_lived: int = 0
    started: bool = False
    done: bool = False


ARRIVAL = st.builds(
    Arrival,
    at_step=st.integers(0, 30),
    num_prompt=st.integers(1, 24),
    max_tokens=st.integers(1, 16),
    abort_after=st.none() | st.integers(0, 20),
)


@dataclass
class Simulation:
    """Runs arrivals and aborts, and checks after each step what must always hold."""

    subject: Scheduler
    requests: dict[str, Sequence] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)

    def step(self) -> None:
        step, grown = run_step(self.subject)
        self.started += [name for name in names(step.chunks) if name not in self.started]
        self.finished |= {s.request_id for s in grown if s.finish_reason}
        self.check()

    def abort(self, name: str) -> None:
        if name not in self.finished:
            self.subject.remove(self.requests[name])
            self.aborted.add(name)
            self.check()

    def check(self) -> None:
        self.subject.pool.check()
        held = [block for request in self.requests.values() for block in request.blocks]
        assert len(held) == len(set(held)) == self.subject.pool.num_used
        for name, request in self.requests.items():
            assert request.num_computed <= len(request.blocks) * BLOCK_SIZE
            if name in self.finished | self.aborted:
                assert not request.blocks


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(ARRIVAL, max_size=12),
    num_blocks=st.integers(blocks_for(24 + 16, BLOCK_SIZE), 24),
    max_num_seqs=st.integers(1, 5),
    prefill_chunk=st.integers(1, 16),
)
def test_whatever_arrives_and_is_aborted_everyone_finishes_in_order_and_no_block_is_lost(
    arrivals: list[Arrival], num_blocks: int, max_num_seqs: int, prefill_chunk: int
) -> None:
    subject = scheduler(num_blocks, max_num_seqs=max_num_seqs, prefill_chunk=prefill_chunk)
    simulation = Simulation(subject)
    arrivals.sort(key=lambda arrival: arrival.at_step)
    for now in range(3000):
        for index, arrival in enumerate(arrivals):
            if arrival.at_step == now:
                request = sequence(str(index), arrival.num_prompt, arrival.max_tokens)
                simulation.requests[str(index)] = request
                subject.add(request)
            if arrival.abort_after is not None and now == arrival.at_step + arrival.abort_after:
                simulation.abort(str(index))
        simulation.step()
        if now > 60 and subject.is_idle:
            break
    subject.check_idle()
    assert simulation.finished | simulation.aborted == set(simulation.requests)
    assert simulation.started == sorted(simulation.started, key=int)
    for name in simulation.finished:
        assert simulation.requests[name].num_answer_tokens == arrivals[int(name)].max_tokens
