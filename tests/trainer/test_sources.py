"""CSV, Parquet and text files. JSON is in test_records.py."""

from __future__ import annotations

import contextlib
import csv
import io
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.errors import MAX_COLUMNS, MAX_RECORD_BYTES, DataError
from trainer.data.options import ReadOptions
from trainer.data.records import Record, read_records

AUTO = ReadOptions()


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_parquet(folder: Path, rows: list[dict[str, Any]], name: str = "train.parquet", **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / name, **options)
    return folder / name


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path, options=ReadOptions(**options)))
    return str(caught.value)


def pair(record: Record) -> tuple[str, ...]:
    return tuple(message["content"] for message in record.messages)


# ---- CSV


def test_a_quoted_field_holds_commas_quotes_and_newlines(tmp_path: Path) -> None:
    path = write(tmp_path, "train.csv", '\ufeffinput,id,output\r\n"a, ""b""\nc",1,d\r\n\r\ne,2,\r\n')
    first, second = read_records(path)
    assert (pair(first), pair(second)) == (('a, "b"\nc', "d"), ("e", ""))
    assert (first.where, second.where) == ("train.csv, record 1 (line 2)", "train.csv, record 2 (line 5)")
    assert first.unused_columns == ("id",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "(line 1): the header is missing"),
        ("input,output\n", "holds no records"),
        ("a,b\nc,d\n", 'record 1 (line 2): a record needs the columns "input" and "output"'),
        ("input,input\na,b\n", '(line 1): the column "input" is there twice'),
        ("input,,output\na,b,c\n", "(line 1): column 2 has no name"),
        ("input,output\na,b\nc\n", "record 2 (line 3): 1 fields, but the header names 2 columns"),
        ("input,output\na,b,c\n", "record 1 (line 2): 3 fields, but the header names 2 columns"),
        ('input,output\na,b\n"c,d\ne,f\n', "record 2 (line 3): broken CSV: unexpected end of data"),
        ('input,output\n"a"b,c\n', "record 1 (line 2): broken CSV: ',' expected after '\"'"),
        (b"input,output\na,b\nc,\xff\n", "line 3: byte 0xff is not UTF-8"),
        (",".join(f"c{n}" for n in range(MAX_COLUMNS + 1)) + "\n", "1001 columns, more than 1000"),
        (f"input,output\n{'a' * MAX_RECORD_BYTES},b\n", "line 2: longer than 4 MiB"),
        (f'input,output\n"{("a" * 99 + chr(10)) * 50_000}",b\n', "record 1 (line 2): broken CSV: field larger than"),
    ],
)
def test_broken_csv_is_refused_with_record_and_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    message = error_of(write(tmp_path, "train.csv", text))
    assert message.startswith("train.csv")
    assert expected in message


fields = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=12)


@given(pairs=st.lists(st.tuples(fields, fields), min_size=1, max_size=5))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, pairs: Any) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("input", "output"), *pairs])
    path = write(tmp_path_factory.mktemp("csv"), "train.csv", text.getvalue())
    assert [pair(record) for record in read_records(path)] == pairs


@given(data=st.binary(max_size=60) | st.text(st.sampled_from('input,output"\n\r '), max_size=60).map(str.encode))
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.parquet", "a"])
def test_any_bytes_are_records_or_a_mistake_of_the_user(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    with contextlib.suppress(DataError):
        assert list(read_records(write(tmp_path_factory.mktemp("any"), name, data)))


def test_rows_are_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "train.csv", "input,output\n" + f'"{"a" * 5000}\n","b"\n' * 2000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 2000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 10
    finally:
        tracemalloc.stop()


# ---- Parquet


def test_conversations_of_parquet_are_lists_of_structs(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a", "weight": None}, {"from": "gpt", "value": "b", "weight": None}]
    path = write_parquet(tmp_path, [{"conversations": turns, "id": 1}] * 200, row_group_size=50)
    records = list(read_records(path))
    assert [pair(record) for record in records] == [("a", "b")] * 200
    assert records[199].where == "train.parquet, record 200 (row 200)"


def test_a_field_that_only_other_rows_have_is_left_out_of_messages(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(
        [{"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]}],
        pa.schema(
            {"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()}))}
        ),
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (record,) = read_records(tmp_path / "a.parquet")
    assert record.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_parquet_that_is_no_chat_is_refused_with_its_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"input": "a", "output": "b"}, {"input": "a", "output": None}]
    assert 'record 2 (row 2): "output" must be a string, not null' in error_of(write_parquet(tmp_path, rows))
    assert '"output" must be a string, not number 3' in error_of(write_parquet(tmp_path, [{"input": "a", "output": 3}]))
    assert "must be a string, not bytes" in error_of(write_parquet(tmp_path, [{"input": b"a", "output": "a"}]))
    assert "found" in error_of(write_parquet(tmp_path, [{"q": "a"}]))
    assert "holds no records" in error_of(write_parquet(tmp_path, [{"input": "a", "output": "b"}][:0]))


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path, [{"input": f"question {n}", "output": "b"} for n in range(500)]).read_bytes()
    damages = [whole[:-9], whole[:40], b"PAR1", b"no parquet", whole[:20] + bytes(60) + whole[80:]]
    for damaged in damages:
        assert "cannot be read as Parquet" in error_of(write(tmp_path, "bad.parquet", damaged), source="parquet")


def test_a_long_record_of_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, [{"input": "a" * MAX_RECORD_BYTES, "output": "b"}])
    assert "record 1 (row 1): longer than 4 MiB" in error_of(path)


# ---- text, and telling them apart


def test_each_line_of_text_is_a_record(tmp_path: Path) -> None:
    records = list(read_records(write(tmp_path, "book.txt", "One line,\r\n\n  \n  and another.\u2028Same.\n")))
    assert [record.text for record in records] == ["One line,", "  and another.\u2028Same."]
    assert records[1].where == "book.txt, record 2 (line 4)"
    assert "line 2: byte 0xff" in error_of(write(tmp_path, "bad.txt", b"a\n\xff\n"))
    assert "holds no records" in error_of(write(tmp_path, "empty.txt", "\n\n"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("file-1", '{"input": "a", "output": "b"}'),
        ("file-2", "input,output\na,b\n"),
        ("notes.txt", '{"input": "a", "output": "b"}\n'),
        ("A.CSV", "output,input\nb,a\n"),
    ],
)
def test_a_file_is_told_by_its_ending_and_its_content(tmp_path: Path, name: str, text: str) -> None:
    (record,) = read_records(write(tmp_path, name, text))
    assert pair(record) == ("a", "b")


def test_parquet_is_known_whatever_it_is_called_and_source_goes_before_all(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, [{"input": "a", "output": "b"}], name="data.json")
    assert [pair(record) for record in read_records(path)] == [("a", "b")]
    text = write(tmp_path, "data.csv", '{"input": "a", "output": "b"}')
    assert [pair(record) for record in read_records(text, options=ReadOptions(source="json"))] == [("a", "b")]
    assert [record.text for record in read_records(text, options=ReadOptions(source="text"))] == [text.read_text()]
