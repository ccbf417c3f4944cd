"""What the tools of a request mean for its prompt, its sampling and its answer, decided once before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.errors import UserError
from lm.messages import Message
from lm.template import ChatTemplate
from lm.tool_formats import HERMES, ToolFormat, find_format
from lm.tool_prompt import prompt_messages, shown_tool
from service.json_schemas import check_schema
from service.schemas.messages import AllowedToolChoice, Function, NamedToolChoice, Tool
from service.tools.grammar import MAX_CALLS, calls_grammar, calls_or_answer
from service.tools.parser import ToolParser

Choice = str | NamedToolChoice | AllowedToolChoice | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    template: ChatTemplate
    native_format: ToolFormat | None
    """In which the template writes calls; None where it cannot."""
    tools: Sequence[dict[str, Any]]
    """Shown to the model, in OpenAI's form."""
    functions: Sequence[Function]
    """Those that the answer may call."""
    max_calls: int | None = None
    must_call: bool = False
    is_named: bool = False
    """The request names the function that is called."""
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    """By their text, those that mark calls."""

    @property
    def may_call(self) -> bool:
        return bool(self.functions)

    @property
    def format(self) -> ToolFormat:
        return self.native_format or HERMES

    @property
    def template_tools(self) -> Sequence[dict[str, Any]] | None:
        """The `tools` of RenderOptions."""
        return self.tools if self.tools and self.native_format is not None else None

    @property
    def skip_special_tokens(self) -> bool:
        """False where special tokens mark the calls: the text of the answer is needed with them."""
        return not self.special_tokens

    @property
    def grammar(self) -> str | None:
        """Of an answer that must call, or that may and whose calls must follow their schemas."""
        if self.must_call or any(function.strict for function in self.functions):
            return self._grammar(must_call=self.must_call)
        return None

    def grammar_beside(self, answer: str) -> str:
        """Of an answer that calls or, if it does not, follows the grammar `answer`."""
        return calls_or_answer(self._grammar(must_call=True), answer)

    def _grammar(self, *, must_call: bool) -> str:
        return calls_grammar(
            self.format,
            self.functions,
            must_call=must_call,
            max_calls=self.max_calls or MAX_CALLS,
            special_tokens=self.special_tokens,
        )

    def messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """As the template takes them. Raises UserError for calls whose arguments are no JSON object."""
        return prompt_messages(messages, self.tools, self.template)[0]

    def parser(self) -> ToolParser:
        """For one answer."""
        format = self.format.name if self.may_call else None
        names = frozenset(function.name for function in self.functions)
        return ToolParser(format, names, self.max_calls, self.must_call)

    def finish_reason(self, reason: str, num_calls: int) -> str:
        """As OpenAI has it: `tool_calls` for an answer that ended with calls, but `stop` where the function was named."""
        return "tool_calls" if reason == "stop" and num_calls and not self.is_named else reason


def plan_tools(
    tools: Sequence[Tool] | None,
    tool_choice: Choice,
    parallel_tool_calls: bool | None,
    template: ChatTemplate,
) -> ToolPlan:
    """Raises UserError naming the field: tools that are not unique or whose parameters are no object, a choice among
    tools that are not there.
    """
    functions = _checked([tool.function for tool in tools or ()])
    chosen = _chosen(functions, tool_choice)
    native_format = find_format(template)
    is_named = isinstance(tool_choice, NamedToolChoice)
    mode = tool_choice.allowed_tools.mode if isinstance(tool_choice, AllowedToolChoice) else tool_choice
    return ToolPlan(
        template=template,
        native_format=native_format,
        tools=[shown_tool(one.name, one.description, one.parameters) for one in functions] if chosen else (),
        functions=chosen,
        max_calls=1 if is_named or parallel_tool_calls is False else None,
        must_call=is_named or mode == "required",
        is_named=is_named,
        special_tokens=(native_format or HERMES).special_tokens(template.tokenizer) if chosen else {},
    )


def _checked(functions: Sequence[Function]) -> Sequence[Function]:
    seen: set[str] = set()
    for index, function in enumerate(functions):
        where = f"tools.{index}.function"
        if function.name in seen:
            raise UserError(f"{where}.name: {function.name!r} is there twice; names must differ", param=f"{where}.name")
        seen.add(function.name)
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            reason = f"must be a JSON schema of type object (got type {kind!r:.80})"
            raise UserError(f"{where}.parameters: {reason}", param=f"{where}.parameters")
        check_schema(function.parameters or {}, f"{where}.parameters")
    return functions


def _chosen(functions: Sequence[Function], choice: Choice) -> Sequence[Function]:
    """Those that the answer may call."""
    if choice == "none":
        return ()
    if choice not in (None, "auto") and not functions:
        raise UserError(
            "tool_choice: there are no tools to choose from; send tools, or leave it out", param="tool_choice"
        )
    if isinstance(choice, NamedToolChoice):
        names = [choice.function.name]
    elif isinstance(choice, AllowedToolChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
    else:
        return functions
    by_name = {function.name: function for function in functions}
    if unknown := [name for name in names if name not in by_name]:
        known = ", ".join(by_name)[:200]
        raise UserError(f"tool_choice: {unknown[0]!r:.80} is none of the tools ({known})", param="tool_choice")
    return [by_name[name] for name in dict.fromkeys(names)]
