from __future__ import annotations

from array import array
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.runs import RECORDS, events, losses, make_run, train_here
from trainer.config import load_run_config
from trainer.data.batches import Batch, collate, in_batches
from trainer.data.examples import Example
from trainer.data.packing import pack
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


@given(examples=examples)
def test_rows_hold_every_example_in_order_and_are_not_too_long(examples: list[Example]) -> None:
    rows = pack(examples, ROW)
    assert [token for row in rows for token in row.ids] == [token for e in examples for token in e.ids]
    assert [length for row in rows for length in row.lengths or []] == [len(e.ids) for e in examples]
    trained = [row.ids[position] for row in rows for position in row.trained]
    assert trained == [e.ids[position] for e in examples for position in e.trained]
    assert all(len(row.ids) <= ROW for row in rows)
    for row, after in pairwise(rows):
        assert after.lengths is not None
        assert len(row.ids) + after.lengths[0] > ROW


def test_a_batch_of_rows_numbers_its_documents_and_begins_positions_anew() -> None:
    batch = collate(pack([example([1, 2, 3], 1), example([4, 5], 1), example([6, 7, 8, 9], 3)], 6))
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
    packed_loss, packed = loss_and_gradients(recipe, list(in_batches(pack(examples, ROW), batch_size)))
    torch.testing.assert_close(packed_loss, loss, rtol=0, atol=1e-5)
    for ours, theirs in zip(packed, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_packed_run_says_how_many_rows_it_has_and_learns(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, packed=True, max_seq_len=128, batch_size=2, epochs=2)
    recipe = train_here(run)
    (report,) = events(run, "dataset")
    assert report["records"] == len(RECORDS)
    assert report["rows"] == len(recipe.data.training) < len(RECORDS)
    assert recipe.total_steps == 2 * -(-report["rows"] // 2)
    assert losses(run)[-1] < losses(run)[0]
