"""Each form of a record: what it becomes, and what is refused. Its tokens are in tests/proof/test_data_formats.py."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data.errors import DataError
from trainer.data.options import ReadOptions
from trainer.data.records import Record, to_record

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def read(record: Any, **options: Any) -> Record:
    return to_record(record, "here", options=ReadOptions(**options))


def turns(record: Any, **options: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in read(record, **options).messages]


@pytest.mark.parametrize(
    ("record", "data_format"),
    [
        ({"input": "a", "output": "b"}, "instruct"),
        ({"instruction": "a", "input": "b", "output": "c"}, "alpaca"),
        ({"instruction": "a", "input": "b", "output": "c", "text": "whole"}, "alpaca"),
        ({"conversations": TURNS, "id": "1"}, "sharegpt"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"text": "a", "url": "b"}, "text"),
    ],
)
def test_the_columns_say_which_form_a_record_has(record: Any, data_format: str) -> None:
    assert read(record).data_format == data_format
    assert read(record, data_format=data_format) == read(record)


def test_alpaca_has_a_prompt_with_and_one_without_input() -> None:
    (prompt, answer) = turns({"instruction": "Add.", "input": "1 {input}", "output": "2"})
    assert prompt[1].startswith("Below is an instruction that describes a task, paired with an input")
    assert prompt[1].endswith("### Instruction:\nAdd.\n\n### Input:\n1 {input}\n\n### Response:\n")
    assert answer == ("assistant", "2")
    for without in ({}, {"input": ""}, {"input": None}):
        ((_, text), _) = turns({"instruction": "Greet.", "output": "Hi", **without})
        assert text.startswith("Below is an instruction that describes a task. Write")
        assert text.endswith("appropriately completes the request.\n\n### Instruction:\nGreet.\n\n### Response:\n")


def test_sharegpt_names_become_roles() -> None:
    record = {"conversations": [{"from": "system", "value": "Be kind."}, *TURNS, *TURNS]}
    assert turns(record) == [("system", "Be kind."), *[("user", "Hi"), ("assistant", "Hello.")] * 2]


def test_fields_of_turns_that_are_not_looked_at_are_named() -> None:
    record = {"id": 1, "conversations": [{**turn, "weight": 0} for turn in TURNS]}
    assert read(record).unused_columns == ("id", "conversations[].weight")


def test_column_map_says_what_a_file_calls_a_column() -> None:
    record = {"q": "a", "a": "b", "id": 1}
    assert turns(record, column_map={"input": "q", "output": "a"}) == [("user", "a"), ("assistant", "b")]
    assert read(record, column_map={"input": "q", "output": "a"}).unused_columns == ("id",)
    assert read({"body": "x"}, column_map={"text": "body"}).text == "x"
    assert turns({"chat": TURNS}, column_map={"conversations": "chat"}) == [("user", "Hi"), ("assistant", "Hello.")]


def test_a_new_system_prompt_replaces_or_is_put_in_front() -> None:
    with_system = {"conversations": [{"from": "system", "value": "old"}, *TURNS]}
    expected = [("system", "new"), ("user", "Hi"), ("assistant", "Hello.")]
    assert turns(with_system, new_system_prompt="new") == turns({"conversations": TURNS}, new_system_prompt="new")
    assert turns(with_system, new_system_prompt="new") == expected


def test_a_prompt_template_is_put_around_the_contents_of_a_role() -> None:
    record = {"input": "a long text", "output": "short"}
    expected = [("user", "Summarize:\na long text\n---"), ("assistant", "short")]
    assert turns(record, prompt_template={"user": ("Summarize:\n", "\n---")}) == expected


@pytest.mark.parametrize(
    ("record", "options", "expected"),
    [
        (
            {"instruction": "a"},
            {},
            'format alpaca needs the columns "instruction", "output"; "output" is missing, found',
        ),
        ({"instruction": 1, "output": "b"}, {}, '"instruction" must be a string, not number 1'),
        ({"instruction": "a", "input": ["b"], "output": "b"}, {}, '"input" must be a string, not list'),
        ({"conversations": []}, {}, '"conversations" must be a list of at least one turn'),
        ({"conversations": "[]"}, {}, 'must be a list of at least one turn, not string "[]"'),
        ({"conversations": [3]}, {}, 'conversations[0] needs "from" and "value", found number 3'),
        ({"conversations": [{"role": "user", "content": "a"}]}, {}, "for role and content set data_format to messages"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, {}, "conversations[0].from must be one of system, human"),
        ({"conversations": [{"from": ["a"], "value": "a"}]}, {}, "conversations[0].from must be one of system, human"),
        ({"conversations": [*TURNS, {"from": "human", "value": 1}]}, {}, "conversations[2].value must be a string"),
        ({"conversations": TURNS[:1]}, {}, 'no message has the role "assistant"'),
        ({"conversations": TURNS, "messages": []}, {}, 'has "messages" beside "conversations"'),
        ({"text": None}, {}, '"text" must be a string, not null'),
        ({"text": ""}, {}, "the text is empty"),
        ({"text": "a"}, {"new_system_prompt": "b"}, "new_system_prompt is for chats"),
        ({"text": "a"}, {"data_format": "instruct"}, 'format instruct needs the columns "input", "output"'),
        (
            {"q": "a", "output": "b"},
            {"column_map": {"input": "question"}},
            '"question" is missing, found "q", "output"',
        ),
        ({"q": "a"}, {}, '"instruction" and "output", "conversations", "text"'),
        ({"q": "a"}, {}, "column_map can say what yours are called"),
    ],
)
def test_a_bad_record_is_refused_with_what_is_wrong(record: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        read(record, **options)
    assert str(caught.value).startswith("here: ")
    assert expected in str(caught.value)
