from __future__ import annotations

from itertools import product

import pytest

from lm.errors import UserError
from trainer.data.split import parse_split, take


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train", range(10)),
        ("train[:]", range(10)),
        ("train[:3]", range(3)),
        ("train[3:]", range(3, 10)),
        ("train[2:4]", range(2, 4)),
        ("train[-3:]", range(7, 10)),
        ("train[:-3]", range(7)),
        ("train[-4:-2]", range(6, 8)),
        ("train[8:100]", range(8, 10)),
        ("train[:10%]", range(1)),
        ("train[:25%]", range(2)),  # 2.5 rounds to the even one
        ("train[:35%]", range(4)),  # 3.5
        ("train[26%:74%]", range(3, 7)),
        ("train[-20%:]", range(8, 10)),
        ("train[ :50% ]", range(5)),
    ],
)
def test_a_slice_takes_what_datasets_would(text: str, expected: range) -> None:
    assert list(take(parse_split(text), lambda: iter(range(10)))) == list(expected)


def test_percent_cut_a_set_into_parts_that_do_not_overlap() -> None:
    for size, share in product((1, 7, 10, 33, 1001), range(101)):
        stop = parse_split(f"train[:{share}%]").bounds(size)[1]
        start = parse_split(f"train[{share}%:]").bounds(size)[0]
        assert start == stop == round(share * size / 100)


def test_records_are_counted_only_where_that_is_needed() -> None:
    def read() -> object:
        reads.append(1)
        return iter(range(10))

    reads: list[int] = []
    for text, times in (("train", 1), ("train[2:4]", 1), ("train[:50%]", 2), ("train[-2:]", 2)):
        reads.clear()
        list(take(parse_split(text), read))  # type: ignore[arg-type]
        assert len(reads) == times


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("test", "the split train only"),
        ("train[:10", "not a split"),
        ("train[::2]", "not a split"),
        ("train[5]", "not a split"),
        ("train[1.5%:]", "not a split"),
        ("train[:10%]+train[90%:]", "not a split"),
        ("train[10:50%]", "mixes records and percent"),
        ("train[:101%]", "beyond 100%"),
        ("train[5:5]", "holds nothing"),
        ("train[-1:-3]", "holds nothing"),
        ("train[%:]", "% without a number"),
        ("", "the split train only"),
    ],
)
def test_a_bad_split_is_refused_with_its_value(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_split(text)
    assert words in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["train[10:]", "train[:1%]", "train[:-10]"])
def test_a_slice_without_records_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="holds none") as caught:
        list(take(parse_split(text), lambda: iter(range(10))))
    assert caught.value.param == "split"
