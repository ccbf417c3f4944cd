"""How tools, calls and results reach a model: in its own format, or described where its template knows none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm.default_templates import DEFAULT_TEMPLATES
from lm.errors import UserError
from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from lm.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, ToolFormat, find_format
from service.schemas.messages import Function, Tool
from service.tools.plan import ToolPlan, plan_tools
from tests.support.chat_templates import write_chat_model
from tests.support.tiny_tokenizers import write_tokenizer

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    Tool(type="function", function=Function(name="weather", description="Tell it", parameters=PARAMETERS, strict=True)),
    Tool(type="function", function=Function(name="now")),
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Weather?"}


def call(*ids: str, content: str | None = None) -> dict[str, Any]:
    calls = [
        {"id": i, "type": "function", "function": {"name": "weather", "arguments": f'{{"city":"{i}"}}'}} for i in ids
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(call_id: str, content: str = "sunny") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def rendered(plan: ToolPlan, messages: list[dict[str, Any]]) -> str:
    return plan.template.render(plan.messages(messages), add_generation_prompt=True, tools=plan.template_tools)


def template_from(folder: Path, source: str, style: str = "smollm2") -> ChatTemplate:
    write_tokenizer(folder, style)
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_template(folder, load_tokenizer(folder))


# ---- which format


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("qwen2.5", HERMES),
        ("qwen3", HERMES),
        ("hermes2_tool_use", HERMES),
        ("llama3.1", LLAMA3),
        ("llama3.2", LLAMA3),
        ("mistral_v3", MISTRAL),
        ("mistral_nemo", MISTRAL),
        ("mistral_small", MISTRAL_ARGS),
        ("smollm2", None),
    ],
)
def test_a_template_shows_the_format_of_its_calls(tmp_path: Path, name: str, format: ToolFormat | None) -> None:
    assert find_format(write_chat_model(tmp_path, name)) is format


@pytest.mark.parametrize(
    "source", [*DEFAULT_TEMPLATES.values(), "{{ tools }} <tool_call>\n<function=f>", "{{ tools }} <function_calls>"]
)
def test_templates_without_tools_or_with_another_format_are_told_apart(tmp_path: Path, source: str) -> None:
    assert find_format(template_from(tmp_path, source)) is None


# ---- a format of its own


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "hermes2_tool_use", "llama3.2", "mistral_v3", "mistral_small"])
def test_a_template_that_knows_tools_is_shown_them_in_its_own_way(tmp_path: Path, name: str) -> None:
    template = write_chat_model(tmp_path, name)
    plan = plan_tools(TOOLS if name != "hermes2_tool_use" else TOOLS[:1], None, None, template)
    assert plan.template_tools is not None
    assert plan.template_tools[0]["function"]["name"] == "weather"
    assert "strict" not in plan.template_tools[0]["function"]
    text = rendered(plan, [USER, call("abc"), result("abc")])
    assert "Tell it" in text
    assert "You may call functions" not in text
    assert "sunny" in text


def test_mistral_gets_ids_of_nine_letters_that_still_belong_together(tmp_path: Path) -> None:
    plan = plan_tools(TOOLS, None, None, write_chat_model(tmp_path, "mistral_v3"))
    ids = ["call_0a8f", "AbCdEfGh9"]
    one, two, three = plan.messages([call(*ids), result(ids[0]), result(ids[1])])
    first, second = (made["id"] for made in one["tool_calls"])
    assert (two["tool_call_id"], three["tool_call_id"]) == (first, second)
    assert second == "AbCdEfGh9"
    assert len(first) == 9
    assert "sunny" in rendered(plan, [USER, call(*ids), result(ids[0]), result(ids[1])])


def test_calls_made_at_once_follow_each_other_where_a_template_takes_one_at_a_time(tmp_path: Path) -> None:
    plan = plan_tools(TOOLS, None, None, write_chat_model(tmp_path, "llama3.1"))
    talk = [USER, call("a", "b", "c", content="Hm."), result("b", "B"), result("a", "A"), result("x", "X"), call("d")]
    ordered = plan.messages([*talk, result("d", "D")])
    told = [[made["id"] for made in m.get("tool_calls", ())] or m["content"] for m in ordered]
    assert told == ["Weather?", ["a"], "A", ["b"], "B", ["c"], "X", ["d"], "D"]
    assert rendered(plan, [*talk, result("d")]).count('{"name": "weather", "parameters": ') == 4


@pytest.mark.parametrize("name", ["qwen2.5", "smollm2"])
def test_a_conversation_without_tools_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    messages = [SYSTEM, USER]
    for plan in (
        plan_tools(None, None, None, write_chat_model(tmp_path, name)),
        plan_tools(TOOLS, "none", None, write_chat_model(tmp_path, name)),
    ):
        assert plan.messages(messages) is messages
        assert plan.template_tools is None
        assert not plan.may_call


# ---- no format of its own


def test_any_other_model_is_told_of_its_tools_in_the_system_message(tmp_path: Path) -> None:
    plan = plan_tools(TOOLS, None, None, write_chat_model(tmp_path, "smollm2"))
    assert plan.template_tools is None
    (first, user) = plan.messages([USER])
    assert (first["role"], user) == ("system", USER)
    assert (
        '<tools>\n{"type": "function", "function": {"name": "weather", "description": "Tell it", ' in first["content"]
    )
    assert '{"name": "function-name", "arguments": {"argument-name": "value"}}' in first["content"]
    amended, _ = plan.messages([SYSTEM, USER])
    assert amended["content"] == f"Be brief.\n\n{first['content']}"


def test_calls_and_results_become_text_and_turns_still_alternate(tmp_path: Path) -> None:
    plan = plan_tools(TOOLS, None, None, write_chat_model(tmp_path, "smollm2"))
    messages = [SYSTEM, USER, call("a", "b", content="Hm."), result("a"), result("b", "雨"), {**USER, "content": "So?"}]
    _, _, called, answered = plan.messages(messages)
    assert called == {
        "role": "assistant",
        "content": 'Hm.\n<tool_call>\n{"name": "weather", "arguments": {"city": "a"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "b"}}\n</tool_call>',
    }
    assert answered == {
        "role": "user",
        "content": "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n雨\n</tool_response>\nSo?",
    }


def test_results_of_tools_that_are_no_longer_sent_are_still_text(tmp_path: Path) -> None:
    plan = plan_tools(None, None, None, write_chat_model(tmp_path, "smollm2"))
    assert [message["role"] for message in plan.messages([USER, call("a"), result("a")])] == [
        "user",
        "assistant",
        "user",
    ]


@pytest.mark.parametrize("name", ["llama2", "mistral", "llama3", "qwen", "qwen3", "chatml"])
def test_every_default_template_takes_a_conversation_with_tools(tmp_path: Path, name: str) -> None:
    template = template_from(tmp_path, DEFAULT_TEMPLATES[name], "llama3" if name == "llama3" else "zephyr")
    plan = plan_tools(TOOLS, None, None, template)
    answer = {"role": "assistant", "content": "Good."}
    text = rendered(plan, [USER, call("a"), result("a"), answer, USER])
    assert text.index('"weather"') < text.index('{"city": "a"}') < text.index("sunny") < text.index("Good.")


def test_a_template_without_system_messages_has_the_tools_before_the_first_one(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    plan = plan_tools(TOOLS, None, None, template_from(tmp_path, source))
    text = rendered(plan, [USER])
    assert text.startswith("[user]# Tools\n")
    assert text.endswith("\n\nWeather?")
    with pytest.raises(UserError, match="no system"):
        rendered(plan, [SYSTEM, USER])
