"""What the tools of a request mean, and which requests are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from service.schemas.messages import (
    AllowedFunctions,
    AllowedToolChoice,
    Function,
    NamedFunction,
    NamedToolChoice,
    Tool,
    parse_tool_choice,
)
from service.tools.plan import ToolPlan, plan_tools
from tests.support.chat_templates import add_special_tokens, write_chat_model


def tool(name: str, **parameters: Any) -> Tool:
    return Tool(type="function", function=Function(name=name, parameters=parameters or None))


def named(name: str) -> NamedToolChoice:
    return NamedToolChoice(type="function", function=NamedFunction(name=name))


def names(plan: ToolPlan) -> list[str]:
    return [function.name for function in plan.functions]


@pytest.fixture
def template(tmp_path: Path) -> ChatTemplate:
    return write_chat_model(tmp_path, "qwen2.5")


@pytest.mark.parametrize("choice", [None, "auto"])
def test_calls_that_may_be_are_free(template: ChatTemplate, choice: str | None) -> None:
    plan = plan_tools([tool("f"), tool("g")], choice, None, template)
    assert (plan.grammar, plan.max_calls, names(plan)) == (None, None, ["f", "g"])


def test_calls_of_strict_functions_follow_their_schemas_where_they_may_be(template: ChatTemplate) -> None:
    strict = Tool(type="function", function=Function(name="f", strict=True))
    plan = plan_tools([strict, tool("g")], "auto", None, template)
    assert plan.grammar is not None
    assert "start: (opened call)* TEXT" in plan.grammar
    assert plan_tools([strict], "none", None, template).grammar is None


def test_calls_that_must_be_are_held_by_a_grammar(template: ChatTemplate) -> None:
    plan = plan_tools([tool("f"), tool("g")], "required", None, template)
    assert plan.grammar is not None
    assert all(part in plan.grammar for part in ('\\"f\\"', '\\"g\\"', "{0,15}"))
    single = plan_tools([tool("f"), tool("g")], "required", False, template)
    assert (single.max_calls, "{0," in str(single.grammar)) == (1, False)


def test_an_answer_may_call_or_have_the_form_that_is_asked_for(template: ChatTemplate) -> None:
    plan = plan_tools([tool("f")], "auto", None, template)
    assert "start: @answer | " in plan.grammar_beside('start: "yes"')


def test_a_named_function_is_the_only_one_and_called_once(template: ChatTemplate) -> None:
    plan = plan_tools([tool("f"), tool("g")], named("g"), True, template)
    assert (names(plan), plan.max_calls, len(plan.tools)) == (["g"], 1, 2)
    assert plan.grammar is not None
    assert '\\"f\\"' not in plan.grammar


@pytest.mark.parametrize(("mode", "must_call"), [("auto", False), ("required", True)])
def test_of_the_tools_that_are_shown_some_may_be_called(template: ChatTemplate, mode: Any, must_call: bool) -> None:
    allowed = AllowedToolChoice(type="allowed_tools", allowed_tools=AllowedFunctions(mode=mode, tools=[named("g")] * 2))
    plan = plan_tools([tool("f"), tool("g"), tool("h")], allowed, None, template)
    assert (names(plan), len(plan.tools), plan.must_call) == (["g"], 3, must_call)
    assert plan.finish_reason("stop", 1) == "tool_calls"
    with pytest.raises(UserError, match=r"'g' is none of the tools \(f\)"):
        plan_tools([tool("f")], allowed, None, template)


def test_the_finish_reason_is_openais(template: ChatTemplate) -> None:
    free = plan_tools([tool("f")], None, None, template)
    assert free.finish_reason("stop", 1) == "tool_calls"
    assert free.finish_reason("stop", 0) == "stop"
    assert free.finish_reason("length", 1) == "length"
    assert plan_tools([tool("f")], "required", None, template).finish_reason("stop", 1) == "tool_calls"
    assert plan_tools([tool("f")], named("f"), None, template).finish_reason("stop", 1) == "stop"


def test_none_shows_no_tools_and_finds_no_calls(template: ChatTemplate) -> None:
    plan = plan_tools([tool("f")], "none", None, template)
    assert (plan.template_tools, plan.grammar, plan.parser().format) == (None, None, None)


def test_special_tokens_are_shown_where_calls_are_marked_by_them(tmp_path: Path) -> None:
    template = write_chat_model(tmp_path, "mistral_v3")
    assert plan_tools([tool("f")], None, None, template).skip_special_tokens
    add_special_tokens(tmp_path / "tokenizer.json", ("[TOOL_CALLS]",))
    template = load_template(tmp_path, load_tokenizer(tmp_path))
    assert not plan_tools([tool("f")], None, None, template).skip_special_tokens
    assert plan_tools([tool("f")], "none", None, template).skip_special_tokens


@pytest.mark.parametrize(
    ("tools", "choice", "param", "reason"),
    [
        ([tool("f"), tool("g"), tool("f")], None, "tools.2.function.name", "'f' is there twice"),
        ([tool("f", type="array")], None, "tools.0.function.parameters", r"type object \(got type 'array'\)"),
        ([tool("f", type=["object", "null"])], "none", "tools.0.function.parameters", r"of type object"),
        (
            [tool("f", properties={"a": {"$ref": "http://x"}})],
            None,
            "tools.0.function.parameters",
            "nothing is fetched",
        ),
        ([tool("f")], named("g"), "tool_choice", r"'g' is none of the tools \(f\)"),
        ([], "required", "tool_choice", "there are no tools to choose from"),
        (None, named("f"), "tool_choice", "there are no tools to choose from"),
    ],
)
def test_tools_and_choices_that_cannot_be_are_refused(
    template: ChatTemplate, tools: Any, choice: Any, param: str, reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        plan_tools(tools, choice, None, template)
    assert caught.value.param == param


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_a_choice_that_asks_for_nothing_needs_no_tools(template: ChatTemplate, choice: str | None) -> None:
    assert not plan_tools([], choice, True, template).may_call


def test_the_choices_of_openais_clients_are_read() -> None:
    one = {"type": "function", "function": {"name": "f"}}
    several = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [one]}}
    assert parse_tool_choice(one) == named("f")
    assert parse_tool_choice(several) == AllowedToolChoice(
        type="allowed_tools", allowed_tools=AllowedFunctions(mode="auto", tools=[named("f")])
    )
    wrong: Any
    for wrong in ("any", {"type": "function", "name": "f"}, {**several, "tools": []}, {"type": "allowed_tools"}, 1, []):
        with pytest.raises(ValueError, match="must be one of none, auto, required, or"):
            parse_tool_choice(wrong)
