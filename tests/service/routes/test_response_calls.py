"""Calls in /v1/responses, and the real SDK in front of it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.support.api import Api
from tests.support.responses import PATH, WEATHER, events, prompt_text

CALLS = """Let me look.
<tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Rom"}}
</tool_call>"""


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_items(roomy_api: Api, stream: bool) -> None:
    roomy_api.says(CALLS)
    body = {"input": "hi", "tools": [WEATHER], "tool_choice": "auto"}
    answer = events(roomy_api, body)[-1]["response"] if stream else roomy_api.post(PATH, body).json()
    message, *calls = answer["output"]
    assert message["content"][0]["text"].strip() == "Let me look."
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("weather", {"city": "Oslo"}),
        ("weather", {"city": "Rom"}),
    ]
    assert len({call["call_id"] for call in calls} | {call["id"] for call in calls}) == 4
    assert answer["status"] == "completed"
    assert answer["tools"] == [WEATHER]


def test_a_call_and_its_result_can_be_sent_back(roomy_api: Api) -> None:
    roomy_api.says(CALLS)
    first = roomy_api.post(PATH, {"input": "hi", "tools": [WEATHER]}).json()
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
        for item in first["output"]
        if item["type"] == "function_call"
    ]
    roomy_api.says("Rain.")
    said = [{"role": "user", "content": "hi"}, *first["output"], *results]
    answer = roomy_api.post(PATH, {"input": said, "tools": [WEATHER]}).json()
    assert answer["output"][0]["content"][0]["text"] == "Rain."
    assert prompt_text(roomy_api).count("rain") == 2
    assert prompt_text(roomy_api).count('"Oslo"') == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_choice_that_must_call_constrains_the_answer(roomy_api: Api, choice: Any) -> None:
    answer = roomy_api.post(PATH, {"input": "hi", "tools": [WEATHER], "tool_choice": choice}).json()
    assert answer["tool_choice"] == choice
    assert roomy_api.engine.received[-1].sampling.grammar is not None


def test_log_probabilities_of_calls_are_left_out(roomy_api: Api) -> None:
    roomy_api.says(CALLS)
    told = events(roomy_api, {"input": "hi", "tools": [WEATHER], "top_logprobs": 1})
    (message, *_) = told[-1]["response"]["output"]
    text = "".join(entry["token"] for entry in message["content"][0]["logprobs"])
    assert text.startswith("Let me look.")
    assert "Oslo" not in text


def sdk_of(api: Api) -> openai.AsyncOpenAI:
    web: Any = api.async_client
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=web)


@pytest.fixture
def sdk(api: Api) -> openai.AsyncOpenAI:
    """The real SDK in front of the API."""
    return sdk_of(api)


def test_the_sdk_creates(api: Api, sdk: openai.AsyncOpenAI) -> None:
    response = api.run(sdk.responses.create(model="base", input="hi"))
    assert (response.output_text, response.status) == ("Hello there.", "completed")
    assert response.usage is not None
    assert response.usage.output_tokens == len(api.engine.answer) + 1


def test_the_sdk_streams(api: Api, sdk: openai.AsyncOpenAI) -> None:
    async def texts() -> list[str]:
        stream = await sdk.responses.create(model="base", input="hi", stream=True)
        return [event.delta async for event in stream if event.type == "response.output_text.delta"]

    assert "".join(api.run(texts())) == "Hello there."


def test_the_sdk_puts_a_stream_together(roomy_api: Api, sdk: openai.AsyncOpenAI) -> None:
    roomy_api.says(CALLS)

    async def final() -> tuple[list[str], Any]:
        async with sdk.responses.stream(model="base", input="hi", tools=[WEATHER]) as stream:  # type: ignore[list-item]
            snapshots = [e.snapshot async for e in stream if e.type == "response.function_call_arguments.delta"]
            return snapshots, await stream.get_final_response()

    snapshots, response = roomy_api.run(final())
    assert json.loads(snapshots[-1]) == {"city": "Rom"}
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    assert [item.parsed_arguments for item in response.output[1:]] == [{"city": "Oslo"}, {"city": "Rom"}]


def test_the_sdk_raises_what_happens_in_mid_stream(own_api: Api) -> None:
    own_api.engine.dies_after = 2
    client = sdk_of(own_api)

    async def read() -> None:
        async for _ in await client.responses.create(model="base", input="hi", stream=True):
            pass

    with pytest.raises(openai.APIError, match="engine"):
        own_api.run(read())


def test_the_sdk_names_what_is_wrong(api: Api, sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.run(sdk.responses.create(model="base", input="hi", previous_response_id="resp_1"))
    assert (caught.value.param, caught.value.type) == ("previous_response_id", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="nothing is stored"):
        api.run(sdk.responses.retrieve("resp_1"))
    with pytest.raises(openai.NotFoundError, match="nothing is stored"):
        api.run(sdk.responses.delete("resp_1"))
