"""The OpenAI client calls tools of real engines with random weights, whose models write calls in different formats.

A random model has never seen a call: what comes right here is the service's doing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel

from tests.support.chat_templates import add_special_tokens, source_of
from tests.support.server import running_server
from tests.support.tiny import VOCAB_SIZE, make_tiny_llama

FORMATS = ("described", "llama3.2", "mistral_small")
MARKERS = {"mistral_small": ("[TOOL_CALLS]", "[ARGS]")}
"""Special tokens of the format, which decoding leaves out of a text."""
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 14},
        "unit": {"enum": ["C", "\u00b0F"]},
    },
    "required": ["city", "unit"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Tell the weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "Tell the time"}},
]
SCHEMAS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in 北京?"}]
DEFAULTS: dict[str, Any] = {
    "model": "tiny",
    "messages": MESSAGES,
    "tools": TOOLS,
    "max_completion_tokens": 4000,
    "seed": 1,
}


@pytest.fixture(scope="module", params=FORMATS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    home = tmp_path_factory.mktemp("home")
    make_model(home / "models" / "tiny", request.param)
    with (
        running_server(home, "model=tiny", "dtype=fp32", "device=cpu", "num_threads=1") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def make_model(folder: Path, format: str) -> None:
    markers = MARKERS.get(format, ())
    make_tiny_llama(folder, max_position_embeddings=8192, vocab_size=VOCAB_SIZE + len(markers))
    add_special_tokens(folder / "tokenizer.json", markers)
    if format != "described":
        (folder / "chat_template.jinja").write_text(source_of(format), encoding="utf-8")


def ask(client: openai.OpenAI, **options: Any) -> ChatCompletion:
    answer: ChatCompletion = client.chat.completions.create(**DEFAULTS | options)
    return answer


def calls_of(answer: ChatCompletion, index: int = 0) -> list[tuple[str, str]]:
    """Names and arguments, which are held to their schemas."""
    calls = []
    for call in answer.choices[index].message.tool_calls or ():
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        calls.append((call.function.name, call.function.arguments))
    return calls


@pytest.mark.parametrize("seed", range(2))
def test_a_required_call_is_made_and_follows_its_schema(client: openai.OpenAI, seed: int) -> None:
    answer = ask(client, tool_choice="required", seed=seed, temperature=1.5)
    assert len(calls_of(answer)) >= 1
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_named_function_is_called_once(client: openai.OpenAI) -> None:
    answer = ask(client, tool_choice=NAMED, n=3)
    for index, choice in enumerate(answer.choices):
        ((name, _),) = calls_of(answer, index)
        assert (name, choice.finish_reason) == ("get_weather", "stop")


def test_one_call_is_made_where_they_are_not_parallel(client: openai.OpenAI) -> None:
    for seed in range(4):
        assert len(calls_of(ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed))) == 1


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_streamed_call_is_the_one_of_the_whole_answer(client: openai.OpenAI, choice: Any) -> None:
    options: dict[str, Any] = {**DEFAULTS, "tool_choice": choice, "temperature": 0}
    whole = ask(client, **options)
    with client.chat.completions.stream(**options) as stream:
        events = list(stream)
        put_together = stream.get_final_completion()
    assert calls_of(put_together) == calls_of(whole)
    assert not put_together.choices[0].message.content  # the first chunk has an empty one
    assert put_together.choices[0].finish_reason == whole.choices[0].finish_reason
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, event.arguments) for event in done] == calls_of(whole) != []


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_streamed_text_is_the_one_of_the_whole_answer(client: openai.OpenAI, choice: Any) -> None:
    options: dict[str, Any] = {**DEFAULTS, "tool_choice": choice, "temperature": 0, "max_completion_tokens": 60}
    whole = ask(client, **options).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason
    assert not any(chunk.delta.tool_calls for chunk in chunks)


def test_without_a_choice_the_model_writes_what_it_likes(client: openai.OpenAI) -> None:
    answer = ask(client, max_completion_tokens=60)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_results_go_back_as_they_came(client: openai.OpenAI) -> None:
    """The loop of an application: what the model calls is answered, and the model asked again."""
    messages = list(MESSAGES)
    num_prompt = []
    for _ in range(2):
        message = ask(client, messages=messages, tool_choice="required").choices[0].message
        messages.append(message)
        for call in message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"sky": "晴"}'})
        answer = ask(client, messages=messages, max_completion_tokens=8)
        assert answer.usage is not None
        num_prompt.append(answer.usage.prompt_tokens)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or "Fine."})
        messages.append({"role": "user", "content": "And now?"})
    assert num_prompt[1] > num_prompt[0]


class GetWeather(BaseModel):
    """Tell the weather."""

    city: Literal["Oslo", "北京"]
    days: list[bool]


def test_the_clients_own_parser_reads_the_arguments(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(GetWeather)
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=3
    )
    calls = answer.choices[0].message.tool_calls or []
    assert len(calls) == 1
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)
