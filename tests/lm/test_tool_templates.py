"""Tools, calls, results and options through the templates of well-known models, beside transformers.

The templates (tests/support/chat_templates) are written down from memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lm.checkpoint import COMPANIONS
from lm.errors import UserError
from lm.template import TOOL_TEMPLATE_FILE, ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from tests.support.chat_templates import NAMES, source_of, write_chat_model
from tests.support.tiny_tokenizers import write_json, write_tokenizer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city — now",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name, '北京' for one"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How is the weather in 北京?"}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"sky": "晴"}'}
ANSWER = {"role": "assistant", "content": "Clear sky."}
AGAIN = {"role": "user", "content": "And tomorrow?"}


def call(content: str | None = None, *, arguments: str = '{"city": "北京", "days": 1}') -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def parsed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the arguments as objects, which is what transformers' callers have to send."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for one in message.get("tool_calls", ()):
            one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    return messages


CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [USER],
    [SYSTEM, USER],
    [USER, call(), RESULT],
    [SYSTEM, USER, call(), RESULT],
    [USER, call(), RESULT, ANSWER, AGAIN],
)
KNOWS_TOOLS = [name for name in NAMES if name != "smollm2"]


def both(folder: Path, name: str) -> tuple[ChatTemplate, Any]:
    """Our template, and transformers' tokenizer on the same folder."""
    return write_chat_model(folder, name), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("name", KNOWS_TOOLS)
def test_tools_calls_and_results_are_written_as_transformers_writes_them(
    tmp_path: Path, name: str, tools: list[dict[str, Any]] | None
) -> None:
    ours, theirs = both(tmp_path, name)
    conversations = CONVERSATIONS if tools or name != "hermes2_tool_use" else CONVERSATIONS[:2]
    for messages in conversations:
        options: dict[str, Any] = {"add_generation_prompt": messages[-1]["role"] != "assistant", "tools": tools}
        expected = theirs.apply_chat_template(parsed(messages), tokenize=False, **options)
        assert ours.render(messages, **options) == expected
        ids = theirs.apply_chat_template(parsed(messages), tokenize=True, **options)["input_ids"]
        assert ours.encode(messages, **options) == list(ids)
    assert not tools or "get_weather" in ours.render([USER], add_generation_prompt=True, tools=tools)


def test_a_text_beside_calls_and_several_calls_are_written(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, "qwen2.5")
    several = call("Let me see.")
    several["tool_calls"] = [*several["tool_calls"], *call(arguments="")["tool_calls"]]
    messages = [USER, several, RESULT, RESULT]
    rendered = ours.render(messages, add_generation_prompt=True, tools=TOOLS)
    several["tool_calls"][1]["function"]["arguments"] = "{}"
    assert rendered == theirs.apply_chat_template(
        parsed(messages), tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert rendered.count("<tool_call>\n{") == 3  # the prompt shows the form, too


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("qwen3", {"enable_thinking": False}),
        ("qwen3", {"enable_thinking": True}),
        ("llama3.1", {"date_string": "1 Jan 2030", "tools_in_user_message": False}),
        ("llama3.1", {"builtin_tools": ["code_interpreter", "brave_search"]}),
        ("smollm2", {"unknown": [1, {"a": None}], "another": "x"}),
    ],
)
def test_variables_of_a_request_reach_the_template(tmp_path: Path, name: str, variables: dict[str, Any]) -> None:
    ours, theirs = both(tmp_path, name)
    expected = theirs.apply_chat_template(
        [SYSTEM, USER], tokenize=False, add_generation_prompt=True, tools=TOOLS, **variables
    )
    options: dict[str, Any] = {"add_generation_prompt": True, "tools": TOOLS}
    assert ours.render([SYSTEM, USER], **options, variables=variables) == expected
    if name != "smollm2" and variables != {"enable_thinking": True}:
        assert ours.render([SYSTEM, USER], **options) != expected


@pytest.mark.parametrize("content", ["Clear", "Clear sky and ", "", "  sunny\n\n", "🙂"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "hermes2_tool_use"])
def test_the_last_message_is_left_open_where_transformers_leaves_it(tmp_path: Path, name: str, content: str) -> None:
    ours, theirs = both(tmp_path, name)
    messages = [USER, {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.render(messages, continue_final_message=True) == expected
    assert expected.rstrip().endswith(content.strip())


def test_any_last_message_can_be_left_open(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, "qwen2.5")
    for messages in ([USER], [USER, call("Let me")], [USER, call(), RESULT]):
        expected = theirs.apply_chat_template(parsed(messages), tokenize=False, continue_final_message=True)
        assert ours.render(messages, continue_final_message=True) == expected
        assert expected.endswith(messages[-1]["content"])


# ---- several templates


def test_the_template_named_tool_use_is_the_one_for_tools(tmp_path: Path) -> None:
    template = write_chat_model(tmp_path, "hermes2_tool_use")
    assert template.origin == "chat_template.jinja"
    assert template.tool_use.origin == TOOL_TEMPLATE_FILE
    assert "<tools>" not in template.render([USER], add_generation_prompt=True)
    assert "<tools>" in template.render([USER], add_generation_prompt=True, tools=TOOLS)
    assert TOOL_TEMPLATE_FILE in COMPANIONS  # so that what is trained from it has it, too


def test_named_templates_may_stand_in_tokenizer_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    (tmp_path / "chat_template.jinja").unlink()
    named = [
        {"name": "default", "template": source_of("smollm2")},
        {"name": "tool_use", "template": source_of("hermes2_tool_use")},
    ]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", settings | {"chat_template": named})
    ours, theirs = load_template(tmp_path, load_tokenizer(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for tools in (None, TOOLS):
        options: dict[str, Any] = {"add_generation_prompt": True, "tools": tools}
        assert ours.render([USER], **options) == theirs.apply_chat_template([USER], tokenize=False, **options)


# ---- refusals


@pytest.mark.parametrize(
    ("message", "param", "reason"),
    [
        (call() | {"tool_calls": "f"}, "messages[1].tool_calls", "must be a list"),
        (call() | {"tool_calls": ["f"]}, "messages[1].tool_calls[0]", "must have a function with name and arguments"),
        (call() | {"tool_calls": []}, "messages[1].content", r"must be a string \(got None\)"),
        (call(arguments="{"), "messages[1].tool_calls[0].function.arguments", "must be a JSON object as a text"),
        (call(arguments="[1]"), "messages[1].tool_calls[0].function.arguments", r"must be a JSON object \(got \[1\]"),
        (call(arguments='{"a": NaN}'), "messages[1].tool_calls[0].function.arguments", "NaN is not JSON"),
        (call(arguments='{"a":' * 9999), "messages[1].tool_calls[0].function.arguments", "must be a JSON object"),
        (
            call(arguments='{"a":' * 101 + "1" + "}" * 101),
            "messages[1].tool_calls[0].function.arguments",
            "more than 100 objects and lists",
        ),
        (USER | {"tool_calls": call()["tool_calls"]}, "messages[1]", r"tool_calls: unknown field"),
        (USER | {"tool_call_id": "x"}, "messages[1]", r"tool_call_id: unknown field; a message has role and content"),
        (RESULT | {"content": None}, "messages[1].content", "must be a string"),
    ],
)
def test_malformed_calls_and_results_are_refused(tmp_path: Path, message: Any, param: str, reason: str) -> None:
    template = write_chat_model(tmp_path, "qwen2.5")
    with pytest.raises(UserError, match=reason) as caught:
        template.render([USER, message], add_generation_prompt=True)
    assert caught.value.param == param


def test_deep_arguments_are_still_written(tmp_path: Path) -> None:
    deep = '{"a":' * 100 + "1" + "}" * 100
    text = write_chat_model(tmp_path, "qwen2.5").render([USER, call(arguments=deep)], add_generation_prompt=False)
    assert text.count('{"a": ') == 100


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "mistral_v3"])
def test_calls_and_answers_are_trained_and_results_are_not(tmp_path: Path, name: str) -> None:
    template = write_chat_model(tmp_path, name)
    messages = [USER, call(), RESULT, ANSWER]
    ids, mask = template.encode_with_mask(messages, tools=TOOLS)
    assert ids == template.encode(messages, tools=TOOLS, add_generation_prompt=False)
    trained = template.tokenizer.decode([token for token, is_trained in zip(ids, mask, strict=True) if is_trained])
    assert "get_weather" in trained
    assert "北京" in trained or "\\u5317" in trained
    assert "Clear sky." in trained
    assert "晴" not in trained
    assert "How is the weather" not in trained
    _, only_last = template.encode_with_mask(messages, tools=TOOLS, answers=[3])
    _, both = template.encode_with_mask(messages, tools=TOOLS, answers=[1, 3])
    assert both == mask
    first = mask.index(True)
    assert only_last == [False] * only_last.index(True) + mask[only_last.index(True) :]
    assert only_last.index(True) > first
    _, without_call = template.encode_with_mask(messages, tools=TOOLS, answers=[3], train_on_input=True)
    assert [not one for one in without_call] == [one and not last for one, last in zip(mask, only_last, strict=True)]


def test_what_a_template_does_not_write_is_not_trained_in_silence(tmp_path: Path) -> None:
    template = write_chat_model(tmp_path, "smollm2")
    with pytest.raises(UserError, match="does not write tools, so they cannot be learned"):
        template.encode_with_mask([USER, ANSWER], tools=TOOLS)
    with pytest.raises(UserError, match="does not write tool_calls"):
        template.encode_with_mask([USER, call(), RESULT, ANSWER])


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"messages": []}, "messages: the service sets this variable itself"),
        ({"tools": []}, "tools: the service sets"),
        ({"bos_token": ""}, "bos_token: the service sets"),
        ({"add_generation_prompt": False}, "add_generation_prompt: the service sets"),
        ({"a b": 1}, "a b: is no name of a variable"),
        ({"": 1}, "is no name of a variable"),
        ({f"v{index}": 1 for index in range(65)}, r"at most 64 variables of 65536 characters in all \(got 65"),
        ({"v": "x" * 70_000}, r"at most 64 variables of 65536 characters in all \(got 1 of 70001\)"),
        ({"v": [["x" * 40_000], {"w": "x" * 40_000}]}, "got 1 of 80"),
        ({"v": json.loads("[" * 20 + "]" * 20)}, "chat_template_kwargs.v: nested deeper than 8"),
    ],
)
def test_variables_that_are_taken_or_too_large_are_refused(
    tmp_path: Path, variables: dict[str, Any], reason: str
) -> None:
    template = write_chat_model(tmp_path, "qwen2.5")
    with pytest.raises(UserError, match=reason) as caught:
        template.render([USER], add_generation_prompt=True, variables=variables)
    assert caught.value.param == "chat_template_kwargs"


SILENT = "{% for message in messages %}{{ message.role }}{% endfor %}"
SHOUTING = "{% for message in messages %}{{ message.content | upper }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "messages", "options", "reason"),
    [
        (None, [USER, ANSWER], {"add_generation_prompt": True}, "add_generation_prompt begins a new message"),
        (None, [USER, call()], {}, "the last message has no content to go on with"),
        (SILENT, [USER, ANSWER], {}, "does not show the whole last message"),
        (SHOUTING, [USER, ANSWER], {}, "does not show the whole last message"),
    ],
)
def test_a_message_that_cannot_be_left_open_is_refused(
    tmp_path: Path, source: str | None, messages: Any, options: Any, reason: str
) -> None:
    template = write_chat_model(tmp_path, "qwen2.5")
    if source is not None:
        (tmp_path / "chat_template.jinja").write_text(source)
        template = load_template(tmp_path, load_tokenizer(tmp_path))
    with pytest.raises(UserError, match=reason) as caught:
        template.render(messages, continue_final_message=True, **options)
    assert caught.value.param == "continue_final_message"
