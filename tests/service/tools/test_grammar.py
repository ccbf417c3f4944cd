"""Calls that a grammar holds: whatever tokens a model prefers, they are calls that can be made."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from lm.tokenizer import Tokenizer, load_tokenizer
from lm.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, ToolFormat
from service.engine.grammar import GrammarCompiler
from service.engine.sequence import Matcher
from service.schemas.messages import Function
from service.structured_output import json_object, json_schema, lark_or_gbnf, regex
from service.tools.grammar import MAX_CALLS, calls_grammar, calls_or_answer
from service.tools.parser import ArgumentsDelta, CallStart, ToolParser
from tests.support.chat_templates import add_special_tokens, write_chat_model
from tests.support.json_schemas import FORMATS as CHECKED
from tests.support.json_schemas import random_schema

FORMATS = (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS)
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 0, "maximum": 14},
        "unit": {"enum": ["C", "F", "\u00b0 \" </tool_call>"]},
        "near": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}},
}  # fmt: skip
FUNCTIONS = (
    Function(name="get_weather", parameters=WEATHER),
    Function(name="now", parameters=None),
    Function(name="noop", parameters={}),
    Function(name="set-7", parameters={"properties": {"on": {"type": "boolean"}}, "required": ["on"]}),
)


class Constrained:
    """A model that takes any token that the grammar allows."""

    def __init__(self, folder: Path, format: ToolFormat, *, tokenizer_of: str | None = None) -> None:
        write_chat_model(folder, tokenizer_of or ("mistral_v3" if format in (MISTRAL, MISTRAL_ARGS) else "qwen2.5"))
        add_special_tokens(folder / "tokenizer.json", format.markers)
        self.format = format
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.vocab_size = self.tokenizer.backend.last_id + 1
        self.compiler = GrammarCompiler(folder, self.vocab_size)

    def grammar(self, functions: tuple[Function, ...], max_calls: int, *, must_call: bool = True) -> str:
        special_tokens = self.format.special_tokens(self.tokenizer)
        return calls_grammar(
            self.format, functions, must_call=must_call, max_calls=max_calls, special_tokens=special_tokens
        )

    def takes(self, text: str, max_calls: int) -> tuple[bool, bool]:
        """Whether the model may write `text` where it need not call, and whether it may end behind it."""
        return self.follows(self.grammar(FUNCTIONS, max_calls, must_call=False), self.spell(text))

    def spell(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def follows(self, grammar: str, ids: list[int]) -> tuple[bool, bool]:
        matcher = self.compiler.build(grammar)
        for token_id in ids:
            if token_id not in self.allowed(matcher):
                return False, False
            assert matcher.accept(token_id)
        return True, self.tokenizer.eos_token_ids[0] in self.allowed(matcher)

    def answer(self, functions: tuple[Function, ...], max_calls: int, seed: int) -> str:
        matcher, rng = self.compiler.build(self.grammar(functions, max_calls)), random.Random(seed)
        ids: list[int] = []
        while not matcher.is_over:
            token_id = rng.choice(self.allowed(matcher))
            if token_id in self.tokenizer.eos_token_ids:
                break
            assert matcher.accept(token_id)
            ids.append(token_id)
            assert len(ids) < 5000
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def allowed(self, matcher: Matcher) -> list[int]:
        words = np.zeros((self.vocab_size + 31) // 32, np.int32)
        matcher.fill_mask(words)
        return [int(bit) for bit in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def calls_in(format: ToolFormat, text: str, *names: str) -> list[tuple[str, str]]:
    """All calls of `text`, which has nothing else."""
    parser = ToolParser(format.name, names or [function.name for function in FUNCTIONS])
    calls: list[tuple[str, str]] = []
    for delta in [*parser.add(text), *parser.flush()]:
        if isinstance(delta, CallStart):
            calls.append((delta.name, ""))
        else:
            assert isinstance(delta, ArgumentsDelta), text
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return calls


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_any_tokens_that_are_allowed_make_calls_whose_arguments_follow_their_schema(
    tmp_path: Path, format: ToolFormat
) -> None:
    model = Constrained(tmp_path, format)
    schemas = {function.name: {"type": "object"} | (function.parameters or {}) for function in FUNCTIONS}
    numbers, names = set(), set()
    for seed in range(40):
        calls = calls_in(format, model.answer(FUNCTIONS, MAX_CALLS, seed))
        assert 1 <= len(calls) <= MAX_CALLS
        numbers.add(len(calls))
        for name, arguments in calls:
            names.add(name)
            parsed = json.loads(arguments)
            jsonschema.validate(parsed, schemas[name])
            assert parsed.keys() <= schemas[name].get("properties", {}).keys() or name == "noop"
            assert name != "now" or parsed == {}
    assert names == schemas.keys()
    assert len(numbers) > 2


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_one_call_is_exactly_one(tmp_path: Path, format: ToolFormat) -> None:
    model = Constrained(tmp_path, format)
    for seed in range(10):
        ((name, _),) = calls_in(format, model.answer(FUNCTIONS[:1], 1, seed))
        assert name == "get_weather"


def test_arguments_follow_random_schemas(tmp_path: Path) -> None:
    model, rng = Constrained(tmp_path, HERMES), random.Random(5)
    checker = jsonschema.FormatChecker(CHECKED)
    for seed in range(30):
        schema = random_schema(rng, depth=2)
        answer = model.answer((Function(name="f", parameters=schema),), 1, seed)
        ((_, arguments),) = calls_in(HERMES, answer, "f")
        jsonschema.validate(json.loads(arguments), schema, format_checker=checker)


def test_special_tokens_mark_the_calls_where_the_model_has_them(tmp_path: Path) -> None:
    model = Constrained(tmp_path, MISTRAL_ARGS)
    special_tokens = MISTRAL_ARGS.special_tokens(model.tokenizer)
    assert list(special_tokens) == ["[TOOL_CALLS]", "[ARGS]"]
    matcher = model.compiler.build(model.grammar(FUNCTIONS[1:2], 1))
    assert model.allowed(matcher) == [special_tokens["[TOOL_CALLS]"]]


def test_a_user_cannot_loosen_the_grammar(tmp_path: Path) -> None:
    model = Constrained(tmp_path, HERMES)
    loose = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "x-guidance": {"lenient": True}}
    ((_, arguments),) = calls_in(HERMES, model.answer((Function(name="now", parameters=loose),), 1, 0))
    assert arguments == '{"a": 1}'


# ---- an answer that need not call


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_whatever_begins_as_a_call_in_a_free_text_is_one(tmp_path: Path, format: ToolFormat) -> None:
    model = Constrained(tmp_path, format)
    good = format.write("set-7", '{"on": true}')
    first = format.begin + good
    assert model.takes("", 1) == model.takes("Hello <world> [x] {} \n\n 北京", 1) == (True, True)
    assert model.takes(first + format.end, 1) == (True, True)
    assert model.takes(first + format.separator + good + format.end, 4) == (True, True)
    for broken in (good.replace("true", "1"), good.replace("set-7", "unknown"), good.replace("on", "off")):
        assert model.takes(format.begin + broken + format.end, 4) == (False, False)
    assert model.takes(first[:-3], 1)[1] is False
    assert model.takes(first + format.separator + good + format.end, 1) == (False, False)


@pytest.mark.parametrize("format", [HERMES, MISTRAL, MISTRAL_ARGS], ids=lambda format: format.name)
def test_a_call_may_follow_a_text(tmp_path: Path, format: ToolFormat) -> None:
    call = format.begin + format.write("now", "{}") + format.end
    assert Constrained(tmp_path, format).takes(f"Let me see.\n{call}", 2) == (True, True)


def test_a_llama_answer_that_begins_as_an_object_is_a_call(tmp_path: Path) -> None:
    model = Constrained(tmp_path, LLAMA3)
    assert model.takes("The set {1, 2}", 1) == (True, True)
    assert model.takes(' {"name"', 1) == model.takes('{"city"', 1) == (False, False)


NAMED = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["age"]}
ANSWERS = {
    "any JSON object": (json_object(param="x").grammar, '{"name": "now", "age": 1}', '["now"]'),
    "JSON of a schema": (json_schema(NAMED, param="x").grammar, '{"name": "now", "age": 1}', '{"name": "now"}'),
    "a regular expression": (regex("now+", param="x").grammar, "nowww", "no"),
    "Lark": (lark_or_gbnf('start: "no" thing\nthing: "thing"', param="x").grammar, "nothing", "not"),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_an_answer_with_a_form_of_its_own_may_stand_in_place_of_calls(
    tmp_path: Path, format: ToolFormat, answer: str
) -> None:
    model = Constrained(tmp_path, format, tokenizer_of="qwen2.5")
    other, good, bad = ANSWERS[answer]
    either = calls_or_answer(model.grammar(FUNCTIONS, 4), other)
    call = format.write("set-7", '{"on": true}')
    assert model.follows(either, model.spell(format.begin + call + format.end)) == (True, True)
    assert model.follows(either, model.spell(format.begin + call + format.separator + call + format.end)) == (
        True,
        True,
    )
    assert model.follows(either, model.spell(good)) == (True, True)
    assert model.follows(either, model.spell(bad))[1] is False
    assert model.follows(either, model.spell("Well")) == (False, False)
    if (format, answer) != (LLAMA3, "any JSON object"):  # a call is an object, too
        assert model.follows(either, model.spell(format.begin + call.replace("true", "1")))[0] is False
