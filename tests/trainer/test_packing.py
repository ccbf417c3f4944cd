from __future__ import annotations

from array import array
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.runs import RECORDS, events, losses, make_run, train_here
from trainer.config import load_run_config
from trainer.data.batches import Batch, collate, in_batches
from trainer.data.examples import Example
from trainer.data.packing import join, pack
from trainer.progress import Progress
from trainer.supervised import SupervisedRecipe

ROW = 48


def example(ids: list[int], first_trained: int) -> Example:
    return Example(array("i", ids), array("i", range(first_trained, len(ids))))


examples = st.lists(
    st.lists(st.integers(0, 250), min_size=2, max_size=ROW).flatmap(
        lambda ids: st.integers(1, len(ids) - 1).map(lambda first: example(ids, first))
    ),
    min_size=1,
    max_size=12,
)


def packed_rows(examples: list[Example], row_length: int) -> list[Example]:
    order, starts = pack(np.array([len(example.ids) for example in examples]), row_length)
    return [join([examples[number] for number in order[start:stop]]) for start, stop in pairwise(starts)]


@given(examples=examples)
def test_rows_hold_every_example_once_and_are_not_too_long(examples: list[Example]) -> None:
    rows = packed_rows(examples, ROW)
    assert all(len(row.ids) <= ROW for row in rows)
    parts = []
    for row in rows:
        assert row.lengths is not None
        for stop, length in zip(accumulate(row.lengths), row.lengths, strict=True):
            trained = [position - stop + length for position in row.trained if 0 <= position - stop + length < length]
            parts.append((list(row.ids[stop - length : stop]), trained))
    assert sorted(parts) == sorted((list(example.ids), list(example.trained)) for example in examples)


@given(lengths=st.lists(st.integers(1, ROW), min_size=1, max_size=60))
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    order, starts = pack(np.array(lengths), ROW)
    assert sorted(order) == list(range(len(lengths)))
    filled = sorted(sum(lengths[number] for number in order[start:stop]) for start, stop in pairwise(starts))
    assert all(one + other > ROW for one, other in pairwise(filled))


def test_rows_of_usual_lengths_are_nearly_full() -> None:
    lengths = np.random.RandomState(0).gamma(2.0, 60.0, 2000).astype(np.int64).clip(8, 512)
    _, starts = pack(lengths, 512)
    assert lengths.sum() / (512 * (len(starts) - 1)) > 0.99


def test_a_batch_of_rows_numbers_its_documents_and_begins_positions_anew() -> None:
    batch = collate([join([example([1, 2, 3], 1), example([4, 5], 1)]), join([example([6, 7, 8, 9], 3)])])
    assert batch.documents is not None
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 0, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.targets.tolist() == [2, 3, 5, 9]
    assert batch.target_rows.tolist() == [0, 1, 3, 10]
    assert collate([example([1, 2], 1)]).documents is None


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SupervisedRecipe:
    run = make_run(tmp_path_factory.mktemp("packing") / "run", tiny_llama, recipe="full")
    with Progress(run) as progress:
        recipe = SupervisedRecipe(load_run_config(run.config), run, progress, lambda: None)
        recipe.setup()
    return recipe


def loss_and_gradients(recipe: SupervisedRecipe, batches: list[Batch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    recipe.model.zero_grad()
    loss = torch.stack([recipe.sums(batch).loss for batch in batches]).sum() / sum(b.num_trained for b in batches)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in recipe.trained if parameter.grad is not None]


@settings(max_examples=25, deadline=None)
@given(examples=examples, batch_size=st.integers(1, 4))
def test_loss_and_gradients_of_packed_rows_are_those_of_the_examples(
    recipe: SupervisedRecipe, examples: list[Example], batch_size: int
) -> None:
    loss, gradients = loss_and_gradients(recipe, list(in_batches(examples, batch_size)))
    packed_loss, packed = loss_and_gradients(recipe, list(in_batches(packed_rows(examples, ROW), batch_size)))
    torch.testing.assert_close(packed_loss, loss, rtol=0, atol=1e-5)
    for ours, theirs in zip(packed, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_packed_run_says_how_many_rows_it_has_and_learns(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, packed=True, max_seq_len=128, batch_size=2, epochs=2)
    recipe = train_here(run)
    (report,) = events(run, "dataset")
    assert report["records"] == len(RECORDS)
    assert report["rows"] == len(recipe.data.training) < len(RECORDS)
    assert events(run, "step")[-1]["total_steps"] == 2 * -(-report["rows"] // 2)
    assert losses(run)[-1] < losses(run)[0]
