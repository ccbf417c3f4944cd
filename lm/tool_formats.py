"""How models write calls of tools, and which way a model has learned, as its chat template shows.

hermes        `<tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>`, one behind the other (Hermes, Qwen 2.5, 3)
llama3        `{"name": "f", "parameters": {...}}` and nothing else, several with `; ` between (Llama 3.1 to 3.3)
mistral       `[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]` (Mistral v3, Nemo)
mistral_args  `[TOOL_CALLS]f[ARGS]{...}`, one behind the other (Mistral's later models)

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from lm.template import ChatTemplate
from lm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    name: str
    begin: str = ""
    """Before all calls."""
    before_name: str
    before_arguments: str
    after_arguments: str
    separator: str
    """Between two calls."""
    end: str = ""
    """Behind all calls."""
    markers: tuple[str, ...]
    """Texts that show that a call begins, and that special tokens may stand for."""

    def write(self, name: str, arguments: str) -> str:
        """One call, without `begin` and `end`."""
        return self.before_name + name + self.before_arguments + arguments + self.after_arguments

    def special_tokens(self, tokenizer: Tokenizer) -> dict[str, int]:
        """The markers that are special tokens of `tokenizer`, which decoding leaves out of a text, and their ids."""
        ids = {marker: tokenizer.encode(marker, add_special_tokens=False) for marker in self.markers}
        return {marker: one[0] for marker, one in ids.items() if len(one) == 1 and not tokenizer.decode(one)}


HERMES = ToolFormat(
    name="hermes",
    before_name='<tool_call>\n{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}\n</tool_call>",
    separator="\n",
    markers=("<tool_call>", "</tool_call>"),
)
LLAMA3 = ToolFormat(
    name="llama3",
    before_name='{"name": "',
    before_arguments='", "parameters": ',
    after_arguments="}",
    separator="; ",
    markers=(),  # without <|python_tag|> the call is the same
)
MISTRAL = ToolFormat(
    name="mistral",
    begin="[TOOL_CALLS][",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}",
    separator=", ",
    end="]",
    markers=("[TOOL_CALLS]",),
)
MISTRAL_ARGS = ToolFormat(
    name="mistral_args",
    before_name="[TOOL_CALLS]",
    before_arguments="[ARGS]",
    after_arguments="",
    separator="",
    markers=("[TOOL_CALLS]", "[ARGS]"),
)


def find_format(template: ChatTemplate) -> ToolFormat | None:
    """The one that the template writes; None where it shows no tools to the model, or writes calls in another way."""
    if "tools" not in template.tool_use.variables:
        return None
    source = template.tool_use.source
    if "[TOOL_CALLS]" in source:
        return MISTRAL_ARGS if "[ARGS]" in source else MISTRAL
    if "<tool_call>" in source:
        return None if "<function=" in source or "<arg_key>" in source else HERMES
    return LLAMA3 if '"parameters": ' in source and "ipython" in source else None
