from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lm.errors import UserError
from lm.tokenizer import Tokenizer, load_tokenizer
from service.engine.grammar import GrammarCompiler
from service.engine.sequence import Matcher
from service.json_schemas import MAX_DEPTH
from service.schemas.requests import ChatRequest
from service.structured_output import (
    MAX_BYTES,
    MAX_RULES,
    Constraint,
    choice,
    constraint_of,
    json_object,
    json_schema,
    lark_or_gbnf,
    regex,
)
from tests.support.grammars import random_answer
from tests.support.json_schemas import random_schema
from tests.support.tiny import VOCAB_SIZE, write_tiny_tokenizer

PARAM = "field"
MESSAGES = [{"role": "user", "content": "hi"}]


class Answers:
    """What a model without any sense says under a constraint."""

    def __init__(self, folder: Path) -> None:
        write_tiny_tokenizer(folder)
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self._compiler = GrammarCompiler(folder, VOCAB_SIZE)

    def matcher(self, constraint: Constraint) -> Matcher:
        return self._compiler.build(constraint.grammar)

    def one(self, constraint: Constraint, seed: int = 0) -> str:
        return self.tokenizer.decode(random_answer(self.matcher(constraint), VOCAB_SIZE, random.Random(seed)))

    def some(self, constraint: Constraint, count: int = 20) -> list[str]:
        return [self.one(constraint, seed) for seed in range(count)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("tokenizer"))


# ---- what answers look like


def test_json_is_written_on_one_line_with_single_spaces(answers: Answers) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": [1, "x"]}}, "required": ["a", "b"]}
    assert set(answers.some(json_schema(schema, param=PARAM))) == {'{"a": 1, "b": [1, "x"]}'}


def test_an_answer_follows_its_schema(answers: Answers) -> None:
    rng = random.Random(5)
    for _ in range(40):
        schema = random_schema(rng)
        text = answers.one(json_schema(schema, param=PARAM), rng.randrange(100))
        jsonschema.validate(json.loads(text), schema)
        assert json.dumps(json.loads(text), ensure_ascii=False).count(" ") == text.count(" ")


def test_a_json_object_is_an_object(answers: Answers) -> None:
    for begin, is_right in (("{", True), ("[", False), (" ", False), ("1", False), ('"', False), ("n", False)):
        (token_id,) = answers.tokenizer.encode(begin)
        assert answers.matcher(json_object(param=PARAM)).accept(token_id) is is_right


def test_no_property_is_added_to_those_that_a_schema_lists(answers: Answers) -> None:
    inner = {"type": "object", "properties": {"b": {"const": 2}}, "required": ["b"]}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": inner, "maxItems": 2}},
        "required": ["a"],
    }
    for text in answers.some(json_schema(schema, param=PARAM)):
        assert json.loads(text).keys() == {"a"}
        assert all(item == {"b": 2} for item in json.loads(text)["a"])


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object", "properties": {"a": {"const": 1}}, "required": ["b"]}, '{"a": 1, "b": 0}'),
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}},
            '{"a": 1, "z": 2}',
        ),
        (
            {
                "allOf": [
                    {"properties": {"a": {"const": 1}}},
                    {"properties": {"b": {"const": 2}}, "required": ["a", "b"]},
                ]
            },
            '{"a": 1, "b": 2}',
        ),
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "anyOf": [{"required": ["c"]}, {"required": ["d"]}]},
            '{"a": 1, "d": 0}',
        ),
        (
            {
                "properties": {"a": {"const": 1}},
                "required": ["a"],
                "anyOf": [{"properties": {"b": {}}, "required": ["b"]}],
            },
            '{"a": 1, "b": 0}',
        ),
        (
            {
                "$defs": {"b": {"properties": {"b": {}}}},
                "$ref": "#/$defs/b",
                "properties": {"a": {}},
                "required": ["a"],
            },
            '{"b": 0, "a": 1}',
        ),
        (
            {"type": "object", "properties": {"properties": {"const": 1}}, "required": ["properties"]},
            '{"properties": 1}',
        ),
    ],
)
def test_a_schema_that_asks_for_others_stays_open(answers: Answers, schema: Any, text: str) -> None:
    jsonschema.validate(json.loads(text), schema)
    matcher = answers.matcher(json_schema(schema, param=PARAM))
    assert all(map(matcher.accept, answers.tokenizer.encode(text)))


def test_a_schema_may_be_text_or_true(answers: Answers) -> None:
    assert answers.one(json_schema('{"const": "x"}', param=PARAM)) == '"x"'
    answers.matcher(json_schema(True, param=PARAM))


def test_without_strict_what_cannot_be_enforced_is_ignored(answers: Answers) -> None:
    schema = {"type": "array", "items": {"const": 1}, "uniqueItems": True, "minItems": 2, "maxItems": 2}
    assert answers.one(json_schema(schema, param=PARAM, strict=False)) == "[1, 1]"
    with pytest.raises(UserError, match="uniqueItems"):
        answers.matcher(json_schema(schema, param=PARAM, strict=True))


def test_the_options_of_llguidance_are_not_a_users(answers: Answers) -> None:
    schema = {"const": [1, 2], "x-guidance": {"whitespace_pattern": " {5}", "nonsense": 1}}
    assert answers.one(json_schema(schema, param=PARAM)) == "[1, 2]"


@pytest.mark.parametrize("pattern", ["[a-c]{2,4}", "^[a-c]{2,4}$", "(?i:yes|no)", "a/b\n", r"\d+\.\d{2}", "é|日本|🙂"])
def test_an_answer_matches_its_regular_expression(answers: Answers, pattern: str) -> None:
    if pattern == r"\d+\.\d{2}":
        pattern = r"[0-9]{1,3}\.[0-9]{2}"
    for text in answers.some(regex(pattern, param=PARAM)):
        assert re.fullmatch(pattern, text)


CHOICES = [
    "yes",
    "no",
    "a b",
    "a\nb",
    '"q"',
    "\\",
    "/x/",
    "日本🙂",
    "\x01\x7f",
    "\u2028",
    "%json",
    "#",
    "//",
    "a|b",
    "(?i)z",
]


def test_an_answer_is_one_of_its_choices(answers: Answers) -> None:
    assert set(answers.some(choice(CHOICES, param=PARAM), 200)) == set(CHOICES)


LARK = 'start: greeting " " NAME\ngreeting: "hello" | "bye"\nNAME: /[A-Z][a-z]{1,5}/'
GBNF = 'root ::= greeting " " name\ngreeting ::= "hello" | "bye"\nname ::= [A-Z] [a-z]{1,5}'


@pytest.mark.parametrize("text", [LARK, GBNF])
def test_a_grammar_may_be_in_larks_form_or_in_gbnf(answers: Answers, text: str) -> None:
    for answer in answers.some(lark_or_gbnf(text, param=PARAM)):
        assert re.fullmatch("(hello|bye) [A-Z][a-z]{1,5}", answer)


# ---- which fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}, "response_format"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": LARK}}, "structured_outputs.grammar"),
        ({"guided_json": '{"type": "object"}'}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"guided_grammar": GBNF}, "guided_grammar"),
    ],
)
def test_each_field_gives_a_constraint(fields: dict[str, Any], param: str) -> None:
    constraint = constraint_of(ChatRequest.model_validate({"messages": MESSAGES, **fields}))
    assert constraint is not None
    assert constraint.param.startswith(param)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"guided_json": None}])
def test_no_field_gives_none(fields: dict[str, Any]) -> None:
    assert constraint_of(ChatRequest.model_validate({"messages": MESSAGES, **fields})) is None


def test_two_of_them_are_refused() -> None:
    fields = {"response_format": {"type": "json_object"}, "guided_regex": "a"}
    with pytest.raises(UserError, match="guided_regex: response_format says already") as caught:
        constraint_of(ChatRequest.model_validate({"messages": MESSAGES, **fields}))
    assert caught.value.param == "guided_regex"


# ---- what is refused at a glance


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: json_schema({"enum": ["x" * MAX_BYTES]}, param=PARAM), f"bytes are more than {MAX_BYTES}"),
        (lambda: json_schema(nested(MAX_DEPTH), param=PARAM), "within each other"),
        (lambda: json_schema(nested(100_000), param=PARAM), "within each other"),
        (lambda: json_schema("[" * 60_000, param=PARAM), "not JSON"),
        (lambda: json_schema('{"type": ', param=PARAM), "not JSON"),
        (lambda: json_schema("[1]", param=PARAM), r"is an object \(got \[1\]\)"),
        (lambda: json_schema(False, param=PARAM), "is an object"),
        (lambda: json_schema({"const": "\ud800"}, param=PARAM), "half a character"),
        (lambda: json_schema({"\udfff": 1}, param=PARAM), "half a character"),
        (lambda: json_schema({"$ref": "http://example.com/x.json"}, param=PARAM), "nothing is fetched"),
        (lambda: json_schema({"items": [{"$ref": "other.json#/a"}]}, param=PARAM), "nothing is fetched"),
        (lambda: regex("a" * (MAX_BYTES + 1), param=PARAM), "bytes are more"),
        (lambda: regex("", param=PARAM), "empty"),
        (lambda: regex("\ud800", param=PARAM), "half a character"),
        (lambda: choice([], param=PARAM), "between 1 and"),
        (lambda: choice(["a"] * 5000, param=PARAM), "between 1 and"),
        (lambda: choice(["a", ""], param=PARAM), r"field\.1: an answer of no text"),
        (lambda: choice(["x" * MAX_BYTES, "y"], param=PARAM), "bytes are more"),
        (lambda: choice(["\ud800"], param=PARAM), "half a character"),
        (lambda: lark_or_gbnf(" \n", param=PARAM), "empty"),
        (lambda: lark_or_gbnf('{"grammars": []}', param=PARAM), "for JSON send a schema"),
        (lambda: lark_or_gbnf("root ::= nothing", param=PARAM), "Rule 'nothing' not found"),
        (lambda: lark_or_gbnf('root ::= "a', param=PARAM), "not a grammar in GBNF"),
        (lambda: lark_or_gbnf("root ::= " + "(" * 30_000, param=PARAM), "not a grammar in GBNF"),
        (lambda: lark_or_gbnf('root ::= "a"\n' + 'b ::= "c"\n' * MAX_RULES, param=PARAM), "more than"),
    ],
)
def test_what_can_be_told_at_a_glance_is_refused_at_once(make: Callable[[], Constraint], reason: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(UserError, match=reason) as caught:
        make()
    assert caught.value.param == PARAM
    assert str(caught.value).startswith(PARAM)
    assert len(str(caught.value)) < 500
    assert time.perf_counter() - begin < 2
