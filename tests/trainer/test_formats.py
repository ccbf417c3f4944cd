"""Each form of a record: what it becomes, and what is refused. Its tokens are in tests/proof/test_data_formats.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainer.data.errors import DataError
from trainer.data.options import ReadOptions
from trainer.data.records import Record, to_record

USER = {"role": "user", "content": "Really?"}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
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
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": []}, "preference"),
        ({"input": {"messages": [USER]}, "preferred_output": [YES], "non_preferred_output": [NO]}, "preference"),
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
    record = {"id": 1, "conversations": [{**turn, "note": 0} for turn in TURNS]}
    assert read(record).unused_columns == ("id", "conversations[].note")


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
        ({"conversations": [{"from": "bot", "value": "a"}]}, {}, "conversations[0].from must be one of system, human"),
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


# ---- tools and weights


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "12:00"}


def test_messages_may_have_tools_calls_and_weights() -> None:
    record = read({"messages": [USER, CALL, RESULT, {**YES, "weight": 0}], "tools": [TOOL]})
    assert record.messages == [USER, CALL, RESULT, {**YES, "weight": 0}]
    assert record.tools == [TOOL]
    assert record.unused_columns == ()
    assert read({"messages": [USER, {**YES, "weight": 1}], "tools": "[]"}).messages == [USER, YES]


def test_tools_may_be_a_text_of_json_and_bare_functions() -> None:
    for tools in (json.dumps([TOOL]), [TOOL["function"]], json.dumps([TOOL["function"]])):
        assert read({"messages": [USER, YES], "tools": tools}).tools == [TOOL]
    assert read({"messages": [USER, YES], "tools": None}).tools is None


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "Really"}, {"type": "text", "text": "?"}]
    assert read({"messages": [{**USER, "content": parts}, YES]}).messages == [USER, YES]


def test_sharegpt_may_have_tools_and_a_column_for_the_system_prompt() -> None:
    turns = [
        {"from": "human", "value": "Really?"},
        {"from": "function_call", "value": '{"name": "now", "arguments": {}}'},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Yes.", "weight": 0},
    ]
    record = read({"conversations": turns, "tools": json.dumps([TOOL["function"]]), "system": "Be brief."})
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
    assert record.messages == [SYSTEM, USER, call, RESULT, {**YES, "weight": 0}]
    assert record.tools == [TOOL]
    assert record.unused_columns == ()


def test_a_prompt_template_leaves_calls_alone() -> None:
    record = read({"messages": [USER, CALL, RESULT, YES]}, prompt_template={"assistant": ("<", ">")})
    assert record.messages == [USER, CALL, RESULT, {**YES, "content": "<Yes.>"}]


# ---- completion and preference


def test_a_completion_is_a_text_whose_beginning_is_no_answer() -> None:
    record = read({"prompt": "a", "completion": "b", "id": 1})
    assert (record.text, record.prompt, record.unused_columns) == ("ab", "a", ("id",))
    assert record.messages == []


def test_a_completion_of_messages_is_trained_and_what_is_before_it_is_not() -> None:
    record = read({"prompt": [USER, YES, USER], "completion": [NO]})
    assert record.messages == [USER, {**YES, "weight": 0}, USER, NO]
    assert (record.text, record.data_format) == (None, "completion")
    assert read({"prompt": "Really?", "completion": [NO]}).messages == [USER, NO]
    with pytest.raises(DataError, match='no message has the role "assistant"'):
        read({"prompt": [USER, YES], "completion": [USER]})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Really?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": "Really?", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"input": {"messages": [USER]}, "preferred_output": [YES], "non_preferred_output": [NO]},
        {
            "conversations": [{"from": "human", "value": "Really?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"prompt": [USER], "chosen": YES, "rejected": NO},
    ],
    ids=["texts", "answers", "chats beside a prompt", "chats", "OpenAI's", "LLaMA-Factory's", "single messages"],
)
def test_preferences_are_two_conversations_with_one_beginning(record: Any) -> None:
    for options in ({}, {"data_format": "preference"}):
        found = read(record, **options)
        assert (found.messages, found.rejected) == ([USER, YES], [USER, NO])
    with_system = read(record, new_system_prompt="Be brief.")
    assert (with_system.messages, with_system.rejected) == ([SYSTEM, USER, YES], [SYSTEM, USER, NO])


def test_column_map_names_the_columns_of_preferences() -> None:
    record = {"question": "Really?", "response_j": "Yes.", "response_k": "No."}
    columns = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    found = read(record, column_map=columns)
    assert (found.messages, found.rejected, found.data_format) == ([USER, YES], [USER, NO], "preference")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [USER, {**YES, "weight": 0.5}]}, "messages[1].weight: must be 0 (not trained) or 1 (got 0.5)"),
        ({"messages": [USER, {**YES, "weight": True}]}, "messages[1].weight: must be 0"),
        ({"messages": [{**USER, "weight": 1}, YES]}, "messages[0].weight: unknown field"),
        ({"messages": [USER, YES], "tools": {}}, '"tools" must be a list of functions, not object'),
        ({"messages": [USER, YES], "tools": "{"}, '"tools" is a text that is not JSON'),
        ({"messages": [USER, YES], "tools": [{"type": "function"}]}, '"tools"[0] must be {"type": "function"'),
        (
            {"messages": [USER, {**CALL, "tool_calls": [{"function": {"name": "now", "arguments": "{"}}]}]},
            "messages[1].tool_calls[0].function.arguments: must be a JSON object",
        ),
        ({"conversations": [{"from": "function_call", "value": "now()"}]}, "is not the JSON of a call"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, 'must be {"name", "arguments"}'),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"prompt": 1, "completion": "b"}, '"prompt" must be a string, not number 1'),
        ({"chosen": "a", "rejected": "b"}, '"chosen" is a text, so the record needs "prompt", too'),
        ({"chosen": [YES], "rejected": [NO]}, '"chosen" holds only the answer, so the record needs "prompt"'),
        ({"prompt": "a", "chosen": "b", "rejected": None}, '"rejected" must be a text or a list of messages, not null'),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, '"prompt" must be a text or a list of messages, not number 3'),
        ({"chosen": [USER], "rejected": [USER, NO]}, 'here, chosen: no message has the role "assistant"'),
        ({"input": "a", "preferred_output": [YES], "non_preferred_output": [NO]}, '"input" must be an object with'),
        ({"input": {"messages": [USER]}, "preferred_output": [YES]}, '"non_preferred_output" is missing'),
    ],
)
def test_what_is_wrong_with_tools_weights_and_preferences_is_said(record: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        read(record)
    assert str(caught.value).startswith("here")
    assert expected in str(caught.value)
