"""Rows of several sets with weights, and what an epoch takes of them."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.runs import make_run
from tests.trainer.test_dataset import prepare
from trainer.data.batches import epoch_steps
from trainer.data.examples import Example, Row
from trainer.data.rows import MixedRows

Weighted = list[tuple[int, float]]


def rows(start: int, count: int) -> list[Row]:
    return [Example(array("i", [number, number]), array("i", [1])) for number in range(start, start + count)]


def mixed(sets: Weighted) -> MixedRows:
    return MixedRows([(rows(1000 * place, count), weight) for place, (count, weight) in enumerate(sets)])


def seen(data: MixedRows, epoch: int, seed: int = 0) -> Counter[int]:
    steps = epoch_steps(data, batch_size=3, accumulation=2, seed=seed, epoch=epoch)
    return Counter(target for step in steps for batch in step for target in batch.targets.tolist())


sizes = st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 4)), min_size=1, max_size=4)


@given(sets=sizes, epoch=st.integers(1, 5))
def test_each_row_is_seen_as_often_as_its_set_weighs(sets: Weighted, epoch: int) -> None:
    data = mixed(sets)
    counts = seen(data, epoch)
    assert counts.total() == len(data)
    for place, (count, weight) in enumerate(sets):
        own = [counts[number] for number in range(1000 * place, 1000 * place + count)]
        assert sum(own) == max(1, round(weight * count))
        assert max(own) - min(own) <= 1


def test_which_rows_are_left_out_is_drawn_anew_for_each_epoch_and_seed() -> None:
    data = mixed([(40, 0.5), (5, 2)])
    assert seen(data, 1) == seen(data, 1)
    left_out = [frozenset(set(range(40)) - seen(data, epoch, seed).keys()) for epoch, seed in ((1, 0), (2, 0), (1, 1))]
    assert len(set(left_out)) == 3
    assert all(len(one) == 20 for one in left_out)


def test_an_epoch_of_weighted_rows_can_begin_at_any_step() -> None:
    data = mixed([(40, 0.5), (5, 2)])
    options: dict[str, Any] = {"batch_size": 4, "accumulation": 1, "seed": 1, "epoch": 3}
    whole = [batch.targets.tolist() for (batch,) in epoch_steps(data, **options)]
    assert [batch.targets.tolist() for (batch,) in epoch_steps(data, **options, first_step=5)] == whole[5:]


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_takes_several_sets_each_read_in_its_way(tiny_llama: Path, tmp_path: Path, packed: bool) -> None:
    for name, column in (("a", "question"), ("b", "input")):
        text = "".join(f'{{"{column}": "{name} {number}", "output": "yes"}}\n' for number in range(8))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    sets = [
        {"data_files": [str(tmp_path / "a.jsonl")], "column_map": {"input": "question"}, "weight": 2},
        {"data_files": [str(tmp_path / "b.jsonl")], "split": "train[:4]", "weight": 0.5},
    ]
    run = make_run(tmp_path / "run", tiny_llama, data_files=None, datasets=sets, packed=packed, max_seq_len=64)
    data = prepare(run)
    assert data.report["records"] == 12
    if packed:
        assert len(data.training) < 18
        assert all(sum(row.lengths) == len(row.ids) <= 64 for row in data.training)  # type: ignore[union-attr, arg-type]
    else:
        assert len(data.training) == 16 + 2
