from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import json_source
from trainer.data.errors import MAX_RECORD_BYTES, DataError
from trainer.data.json_source import json_values
from trainer.data.records import check_records, read_records, to_record

PAIR = {"input": "Who are you?", "output": "I am Tuna."}
PAIR_MESSAGES = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Tuna."}]
GOOD = json.dumps(PAIR)


def write(folder: Path, data: str | bytes, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD}\n{GOOD}\n",
        f"{GOOD}\n{GOOD}",
        f"\n{GOOD}\r\n\r\n   \n{GOOD}\r\n",
        f"\ufeff{GOOD}\n{GOOD}\n",
        f"[{GOOD}, {GOOD}]",
        f"\ufeff \n[\n{GOOD}\n,\n{GOOD}\n]\n",
        json.dumps([PAIR, PAIR], indent=2),
    ],
    ids=["lines", "no last newline", "blank lines and CRLF", "BOM", "list", "list with BOM", "indented list"],
)
def test_lists_and_lines_of_records_read_alike(tmp_path: Path, text: str) -> None:
    assert [record.messages for record in read_records(write(tmp_path, text))] == [PAIR_MESSAGES] * 2


def test_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, *PAIR_MESSAGES, *PAIR_MESSAGES]
    (record,) = read_records(write(tmp_path, json.dumps({"messages": messages}, ensure_ascii=False)))
    assert record.messages == messages


def test_a_record_knows_its_line_and_its_number(tmp_path: Path) -> None:
    lines = read_records(write(tmp_path, f"\n{GOOD}\n\n{GOOD}"))
    assert [record.where for record in lines] == ["train.jsonl, record 1 (line 2)", "train.jsonl, record 2 (line 4)"]
    elements = read_records(write(tmp_path, f"[\n{GOOD},{GOOD},\n\n{GOOD}]", "train.json"))
    assert [record.where.removeprefix("train.json, ") for record in elements] == [
        "record 1 (line 2)",
        "record 2 (line 2)",
        "record 3 (line 4)",
    ]


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path, json.dumps({"id": 1, **PAIR, "source": None})))
    assert record.unused_columns == ("id", "source")


def test_the_last_of_duplicate_keys_counts(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path, '{"input": "a", "input": "b", "output": "c"}'))
    assert record.messages[0]["content"] == "b"


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path, '{"input": "a\u2028b\u0085c", "output": "d"}'))
    assert record.messages[0]["content"] == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input": "a"}, 'needs the columns "input" and "output", or "messages"; "output" is missing, found "input"'),
        ({"question": "a", "answer": "b"}, '"input", "output" is missing, found "question", "answer"'),
        ({}, "found no column"),
        ([], "must be an object, not list"),
        ("text", 'must be an object, not string "text"'),
        ({"input": 3, "output": "b"}, '"input" must be a string, not number 3'),
        ({"input": "a", "output": None}, '"output" must be a string, not null'),
        ({"input": "a", "output": True}, '"output" must be a string, not boolean true'),
        ({"input": "a", "output": ["b"]}, '"output" must be a string, not list'),
        ({"input": "a\ud83d", "output": "b"}, '"input" has half of a surrogate pair (\\ud83d) at character 1'),
        ({**PAIR, "messages": PAIR_MESSAGES}, 'has "messages" beside "input" or "output"'),
        ({"messages": "hello"}, "messages: must be a list of at least one message"),
        ({"messages": []}, "messages: must be a list of at least one message"),
        ({"messages": ["hello"]}, "messages[0]: must be an object with role and content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: must be a string (it is missing)"),
        ({"messages": PAIR_MESSAGES[:1]}, 'no message has the role "assistant"'),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role: must be one of system, user, assistant"),
        ({"messages": [*PAIR_MESSAGES, {"role": "user", "content": 1}]}, "messages[2].content: must be a string"),
        ({"messages": [*PAIR_MESSAGES, {"role": "user", "content": "\udc00"}]}, "messages[2].content has half of a"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "messages[0].weight: unknown field"),
    ],
)
def test_a_bad_record_is_named_with_its_number_and_what_is_wrong(tmp_path: Path, record: Any, expected: str) -> None:
    line = json.dumps(record)
    message = error_of(write(tmp_path, f"{GOOD}\n\n{line}"))
    assert message.startswith("train.jsonl, record 2 (line 3)")
    assert expected in message
    assert expected in error_of(write(tmp_path, f"[{GOOD},\n\n{line}]"))
    with pytest.raises(DataError) as caught:
        check_records([PAIR, record], param="dataset.records")
    assert str(caught.value).startswith("dataset.records, record 2")
    assert expected in str(caught.value)
    assert caught.value.param == "dataset.records.1"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (f'{GOOD}\n{{"input": "a" "output": "b"}}\n', "record 2 (line 2, column 15): broken JSON: Expecting ','"),
        (f"{GOOD}\n{{", "record 2 (line 2, column 2): broken JSON"),
        (f"{GOOD} {GOOD}", "record 1 (line 1, column 51): broken JSON: Extra data"),
        (json.dumps(PAIR, indent=2), "in a JSONL file every line is one whole record"),
        (f"[{GOOD},\n {{]", "record 2 (line 2, column 3): broken JSON"),
        (f"[{GOOD}\n {GOOD}]", "(line 2, column 2): broken JSON: expected a comma or ] after record 1"),
        (f"[{GOOD},\n]", "record 2 (line 2, column 1): broken JSON: Expecting value"),
        (f"[{GOOD}", "broken JSON: expected a comma or ] after record 1"),
        (f"[{GOOD}]\n\n x", "(line 3, column 2): broken JSON: text after the end of the list"),
        ("[", "record 1 (line 1, column 2): broken JSON"),
        ("", "holds no records"),
        ("\n \r\n", "holds no records"),
        ("[ ]", "holds no records"),
        (f"{GOOD}\n".encode() + b'{"input": "\xff"}', "line 2: byte 0xff is not UTF-8"),
        (b'[\n{"input": "\xe9t\xe9"}]', "line 2: byte 0xe9 is not UTF-8"),
        (GOOD.encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ('{"input": ' + "1" * 5000 + "}", "record 1 (line 1): unreadable JSON"),
        ("[" + '{"input": ' + "1" * 5000 + "}]", "record 1 (line 1): unreadable JSON"),
        ("{" + '"a":{' * 100_000, "record 1 (line 1): unreadable JSON"),
        (f"{GOOD}\n" + "[" * 100_000, "record 2 (line 2): unreadable JSON"),
        ("[" * 100_000, "record 1 (line 1): unreadable JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_place(tmp_path: Path, data: str | bytes, expected: str) -> None:
    message = error_of(write(tmp_path, data))
    assert message.startswith("train.jsonl")
    assert expected in message


def test_a_record_may_not_be_longer_than_the_bound(tmp_path: Path) -> None:
    line = json.dumps({"input": "a" * MAX_RECORD_BYTES, "output": "b"})
    assert "record 2 (line 2): longer than 4 MiB" in error_of(write(tmp_path, f"{GOOD}\n{line}"))
    assert "record 2 (line 1): longer than 4 MiB" in error_of(write(tmp_path, f"[{GOOD},{line}]"))


def test_a_missing_file_and_a_folder_are_mistakes_of_the_user(tmp_path: Path) -> None:
    assert "cannot read the data file none.jsonl: No such file" in error_of(tmp_path / "none.jsonl")
    assert "Is a directory" in error_of(tmp_path)


def test_a_file_is_called_what_the_caller_says(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^my data\.jsonl, record 1 \(line 1\)"):
        list(read_records(write(tmp_path, "3"), name="my data.jsonl"))


def test_no_records_in_a_request_are_refused() -> None:
    with pytest.raises(DataError, match=r"dataset\.records holds no records") as caught:
        check_records([], param="dataset.records")
    assert caught.value.param == "dataset.records"


def test_lines_are_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    line = json.dumps({"input": "a" * 10_000, "output": "b"})
    path = write(tmp_path, f"{line}\n" * 1000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 1000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 10
    finally:
        tracemalloc.stop()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=5), indent=st.sampled_from([None, 1]))
def test_every_text_survives_both_forms(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], indent: int | None
) -> None:
    records = [{"input": prompt, "output": answer} for prompt, answer in pairs]
    expected = [to_record(record, "here").messages for record in records]
    folder = tmp_path_factory.mktemp("records")
    lines = "\n".join(json.dumps(record, ensure_ascii=indent is None) for record in records)
    assert [r.messages for r in read_records(write(folder, lines))] == expected
    assert [r.messages for r in read_records(write(folder, json.dumps(records, indent=indent)))] == expected


@given(data=st.binary(max_size=60) | st.text(st.sampled_from('[]{},:"ainputo \n1'), max_size=60).map(str.encode))
def test_any_bytes_are_records_or_a_mistake_of_the_user(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = write(tmp_path_factory.mktemp("records"), data)
    with contextlib.suppress(DataError):
        assert list(read_records(path))


elements = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(values=st.lists(elements, max_size=6), indent=st.sampled_from([None, 1]), size=st.integers(1, 40))
def test_a_list_is_read_block_by_block(values: list[Any], indent: int | None, size: int) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    with contextlib.suppress(UnicodeDecodeError), pytest.MonkeyPatch.context() as patch:
        text.decode()
        whole = list(json_values(io.BytesIO(text), "a"))
        assert [value for _, value in whole] == values
        patch.setattr(json_source, "BLOCK_BYTES", size)
        assert list(json_values(io.BytesIO(text), "a")) == whole


@given(cut=st.integers(1, 60), size=st.integers(1, 40), put=st.sampled_from([b"", b"x", b"]", b'"', b"\xff", b"}"]))
def test_what_is_wrong_with_a_list_does_not_depend_on_its_blocks(cut: int, size: int, put: bytes) -> None:
    text = b'[{"input": "a",\n "output": "b"},\n\n {"input": "\xe4\xbd\xa0", "n": [1, 2.5]}]'
    text = text[:cut] + put + text[cut + 1 :]
    told = []
    for block in (1 << 20, size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_source, "BLOCK_BYTES", block)
            try:
                told.append(str(list(json_values(io.BytesIO(text), "a"))))
            except DataError as error:
                told.append(str(error))
    assert told[0] == told[1]
