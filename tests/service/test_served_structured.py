"""Answers that must have a form, by the OpenAI client from a real service: a random model gives them all the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.support.served import complete, serving_tiny

MESSAGES: Any = [{"role": "user", "content": "Where are you?"}]


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    town: Literal["Delft", "Oslo", "北京"]
    floors: list[int]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"town": {"enum": ["Delft", "Oslo", "北京"]}, "old": {"type": "boolean"}},
    "required": ["town", "old"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving_tiny(tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_followed_whole_and_streamed(client: openai.OpenAI, seed: int) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "response_format": FORM, "temperature": 1.5}
    whole = client.chat.completions.create(**options, seed=seed)
    content = whole.choices[0].message.content
    assert content is not None
    jsonschema.validate(json.loads(content), SCHEMA)
    assert whole.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**options, seed=seed, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content


def test_the_clients_own_parsing_gets_its_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Place, temperature=0,
        max_tokens=200, extra_body={"bad_words": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]},
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Place)


def test_an_object_is_one_as_far_as_it_comes(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=form, max_tokens=40, temperature=1.0, seed=1
    )
    content = answer.choices[0].message.content
    assert content is not None
    assert content.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


def test_every_answer_of_several_has_the_form(client: openai.OpenAI) -> None:
    pattern = r"[ab]{3}-\d{2}"
    extra = {"ignore_eos": False, "structured_outputs": {"regex": pattern}}
    answer = complete(client, n=4, temperature=1.5, seed=2, extra=extra)
    texts = [choice.text for choice in answer.choices]
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert len({*texts}) > 1
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_choice_is_one_of_those_given(client: openai.OpenAI) -> None:
    for field in ({"guided_choice": ["yes 🛸", "no"]}, {"structured_outputs": {"choice": ["yes 🛸", "no"]}}):
        assert complete(client, extra={"ignore_eos": False, **field}).choices[0].text in ("yes 🛸", "no")


def test_a_grammar_is_followed(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": False, "guided_grammar": 'start: "x" (" then " WORD)* "."\nWORD: /[a-c]{2}/'}
    found = complete(client, max_tokens=200, temperature=1.0, seed=3, extra=extra).choices[0]
    assert re.fullmatch(r"x( then [a-c]{2})*\.", found.text) or found.finish_reason == "length"


def test_a_form_and_a_penalty_go_together(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": False, "structured_outputs": {"json": SCHEMA}, "repetition_penalty": 1.5, "min_p": 0.1}
    answer = complete(client, max_tokens=100, temperature=1.0, frequency_penalty=1.0, logit_bias={"50": 5}, extra=extra)
    jsonschema.validate(json.loads(answer.choices[0].text), SCHEMA)


@pytest.mark.parametrize("seed", range(6))
def test_beside_tools_the_answer_calls_or_has_the_form(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[TOOL], response_format=FORM, temperature=2.0, seed=seed,
        parallel_tool_calls=False,
    )  # fmt: skip
    message = answer.choices[0].message
    said = [message.content] if message.content is not None else []
    said += [call.function.arguments for call in message.tool_calls or () if call.type == "function"]
    assert len(said) == 1
    jsonschema.validate(json.loads(said[0]), SCHEMA)
