"""/v1/responses through the OpenAI client, over a real service and the real engine on a tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from jsonschema import validate
from openai.types.responses import Response
from pydantic import BaseModel

from tests.support.server import Server, running_server
from tests.support.tiny import make_tiny_llama

QUESTION = "Who are you? 你是谁?"
LONG = 6000  # tokens: no answer of this length is complete before the client leaves
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rom"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": PLACE, "strict": True}
TIME: Any = {"type": "function", "name": "time", "parameters": {"type": "object", "properties": {}}, "strict": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_llama(home / "models" / "tiny", max_position_embeddings=8192)
    with running_server(home, "model=tiny", "dtype=fp32", "device=cpu", "num_threads=1") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def respond(client: openai.OpenAI, **options: Any) -> Response:
    answer: Response = client.responses.create(
        **{"model": "tiny", "input": QUESTION, "max_output_tokens": 30, "temperature": 0, **options}
    )
    return answer


def test_a_response_is_the_chat_in_another_form(client: openai.OpenAI) -> None:
    response = respond(client, instructions="Be brief.")
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        max_completion_tokens=30,
        temperature=0,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.status == {"length": "incomplete", "stop": "completed"}[chat.choices[0].finish_reason]


def test_a_streamed_response_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = respond(client)
    stream = client.responses.create(
        model="tiny", input=QUESTION, max_output_tokens=30, temperature=0, stream=True, include=None
    )
    events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type in ("response.incomplete", "response.completed")
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens


def test_a_conversation_that_goes_on_is_not_computed_again(client: openai.OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": QUESTION * 4}]
    first = respond(client, input=items)
    again = respond(client, input=[*items, *first.output, {"role": "user", "content": "And who am I?"}])
    assert first.usage is not None
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens // 2


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        return respond(client, temperature=1.5, extra_body={"seed": seed, "top_k": 50}).output_text

    assert sample(7) == sample(7) != sample(8)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_choice_that_must_call_yields_valid_calls_of_any_model(
    client: openai.OpenAI, choice: Any, parallel: bool
) -> None:
    response = respond(
        client,
        tools=[WEATHER, TIME],
        tool_choice=choice,
        parallel_tool_calls=parallel,
        max_output_tokens=1000,
        temperature=1,
    )
    calls = [item for item in response.output if item.type == "function_call"]
    whole = [call for call in calls if call.status == "completed"]
    assert whole
    assert [item.type for item in response.output] == ["function_call"] * len(calls)
    assert len(calls) == 1 or parallel
    for call in whole:
        assert call.name in (("weather", "time") if choice == "required" else ("weather",))
        validate(json.loads(call.arguments), {"weather": PLACE}.get(call.name, {"type": "object"}))


def test_streamed_calls_are_put_together_by_the_sdk(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="tiny",
        input=QUESTION,
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        max_output_tokens=500,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        response = stream.get_final_response()
    (call,) = response.output
    assert call.type == "function_call"
    assert len(deltas) > 1
    assert "".join(deltas) == call.arguments
    assert call.parsed_arguments == json.loads(call.arguments)
    validate(call.parsed_arguments, PLACE)


class Place(BaseModel):
    city: Literal["Oslo", "Rom"]
    days: Literal[1, 2, 3]


def test_a_response_is_parsed_into_what_it_must_be(client: openai.OpenAI) -> None:
    response = client.responses.parse(model="tiny", input=QUESTION, text_format=Place, max_output_tokens=500)
    assert isinstance(response.output_parsed, Place)
    with client.responses.stream(model="tiny", input=QUESTION, text_format=Place, max_output_tokens=500) as stream:
        done = [event.parsed for event in stream if event.type == "response.output_text.done"]
        final = stream.get_final_response()
    assert done == [final.output_parsed]
    assert isinstance(final.output_parsed, Place)


def test_what_was_parsed_can_be_sent_back(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "tools": [WEATHER], "text_format": Place, "max_output_tokens": 500}
    named: Any = {"type": "function", "name": "weather"}
    first = client.responses.parse(input=QUESTION, tool_choice=named, **options)
    (call,) = first.output
    assert call.type == "function_call"
    validate(call.parsed_arguments, PLACE)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    items: list[Any] = [{"role": "user", "content": QUESTION}, *first.output, result]
    second = client.responses.parse(input=items, tool_choice="none", **options)
    assert isinstance(second.output_parsed, Place)


def test_tools_and_a_format_leave_two_ways_to_answer(client: openai.OpenAI) -> None:
    for seed in range(5):
        response = client.responses.parse(
            model="tiny",
            input=QUESTION,
            tools=[WEATHER],
            text_format=Place,
            max_output_tokens=1000,
            extra_body={"seed": seed},
        )
        assert response.output_parsed is not None or response.output[0].type == "function_call"


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    response = respond(client, text={"format": {"type": "json_object"}}, max_output_tokens=1000, temperature=1)
    if response.status == "completed":
        assert isinstance(json.loads(response.output_text), dict)
    assert response.output_text.lstrip().startswith("{")


def stream_and_leave(server: Server, body: dict[str, Any]) -> None:
    with httpx.stream("POST", f"{server.url}/v1/responses", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())


def ask_and_leave(server: Server, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/responses", json=body, timeout=httpx.Timeout(10, read=0.2))


@pytest.mark.parametrize("leave", [stream_and_leave, ask_and_leave])
def test_a_client_that_leaves_frees_the_engine(server: Server, leave: Callable[[Server, dict[str, Any]], None]) -> None:
    leave(server, {"input": QUESTION, "max_output_tokens": LONG, "ignore_eos": True})
    deadline = time.monotonic() + 10
    while "vllm:num_requests_running" in running(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(server: Server) -> list[str]:
    """Names of the gauges that tell of a request."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
    return [line.partition("{")[0] for line in lines if line.startswith(gauges) and float(line.split()[-1]) > 0]
