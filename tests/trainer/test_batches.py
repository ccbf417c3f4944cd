from __future__ import annotations

import math
import random
from array import array

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.batches import collate, epoch_steps
from trainer.data.examples import Example, Pair


def example(length: int, trained: list[int]) -> Example:
    return Example(array("i", range(100, 100 + length)), array("i", trained))


def test_rows_are_padded_on_the_right_to_a_multiple_of_eight() -> None:
    batch = collate([example(3, [2]), example(9, [8])])
    assert batch.input_ids.shape == batch.positions.shape == (2, 16)
    assert batch.input_ids[0].tolist() == [100, 101, 102] + [0] * 13
    assert batch.positions[1].tolist() == list(range(16))
    assert batch.num_tokens == 12


def test_a_target_is_predicted_by_the_row_before_it() -> None:
    batch = collate([example(3, [1, 2]), example(9, [8])])
    assert batch.targets.tolist() == [101, 102, 108]
    assert batch.num_trained == 3
    predictors = batch.input_ids.flatten()[batch.target_rows]
    assert torch.equal(predictors + 1, batch.targets)


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@given(lengths=lengths, batch_size=st.integers(1, 8), accumulation=st.integers(1, 4), seed=st.integers(0, 3))
def test_an_epoch_sees_every_example_once(lengths: list[int], batch_size: int, accumulation: int, seed: int) -> None:
    examples = [Example(array("i", [index] * length), array("i", [1])) for index, length in enumerate(lengths)]
    steps = list(epoch_steps(examples, batch_size=batch_size, accumulation=accumulation, seed=seed, epoch=1))
    assert len(steps) == math.ceil(len(examples) / (batch_size * accumulation))
    batches = [batch for step in steps for batch in step]
    assert sorted(target for batch in batches for target in batch.targets.tolist()) == list(range(len(examples)))
    assert all(len(step) <= accumulation for step in steps)
    assert all(len(batch.input_ids) == batch_size for step in steps for batch in step[:-1])


def order(seed: int, epoch: int, batch_size: int = 1, accumulation: int = 1) -> list[list[int]]:
    examples = [Example(array("i", [index, index]), array("i", [1])) for index in range(20)]
    steps = epoch_steps(examples, batch_size=batch_size, accumulation=accumulation, seed=seed, epoch=epoch)
    return [sorted(target for batch in step for target in batch.targets.tolist()) for step in steps]


def test_the_order_is_drawn_from_the_seed_and_the_epoch() -> None:
    assert order(seed=0, epoch=1) == order(seed=0, epoch=1)
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (1, 2)]
    assert all(a != b for index, a in enumerate(orders) for b in orders[:index])


def test_the_examples_of_a_step_do_not_depend_on_how_it_is_divided() -> None:
    assert order(0, 1, batch_size=8) == order(0, 1, batch_size=4, accumulation=2) == order(0, 1, 2, 4)


def test_batches_of_one_step_hold_examples_of_similar_length() -> None:
    examples = [example(length, [1]) for length in (40, 3, 40, 3)]
    ((short, long),) = epoch_steps(examples, batch_size=2, accumulation=2, seed=0, epoch=1)
    assert short.input_ids.shape == (2, 8)
    assert long.input_ids.shape == (2, 40)


@given(batch_size=st.integers(1, 5), accumulation=st.integers(1, 3), first_step=st.integers(0, 12))
def test_steps_can_be_left_out_and_the_others_stay(batch_size: int, accumulation: int, first_step: int) -> None:
    examples = [example(2 + index % 7, [1]) for index in range(23)]
    options = {"batch_size": batch_size, "accumulation": accumulation, "seed": 3, "epoch": 2}
    whole = [[b.input_ids.tolist() for b in step] for step in epoch_steps(examples, **options)]
    rest = [[b.input_ids.tolist() for b in step] for step in epoch_steps(examples, **options, first_step=first_step)]
    assert rest == whole[first_step:]


def test_the_order_is_the_one_that_runs_have_always_had() -> None:
    examples = [Example(array("i", [index, index]), array("i", [1])) for index in range(50)]
    (step,) = epoch_steps(examples, batch_size=50, accumulation=1, seed=7, epoch=3)
    order = random.Random(7 * 1_000_003 + 3).sample(range(50), 50)
    assert [batch.targets.tolist() for batch in step] == [order]


def test_a_batch_of_pairs_has_the_chosen_rows_and_then_the_rejected_ones() -> None:
    pairs = [Pair(example(3, [2]), example(9, [8])), Pair(example(4, [3]), example(5, [1, 4]))]
    batch = collate(pairs)
    assert batch.input_ids.shape == (4, 16)
    assert batch.targets.tolist() == [102, 103, 108, 101, 104]
    assert (batch.target_rows // 16).tolist() == [0, 1, 2, 3, 3]
    ((first,),) = epoch_steps(pairs, batch_size=2, accumulation=1, seed=0, epoch=1)
    assert first.targets.tolist() == [103, 102, 101, 104, 108]
