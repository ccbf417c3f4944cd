"""SmolLM2, whose template knows no tools, calls them through the real service: with what the user said, and by schema."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.proof.conftest import MODEL
from tests.support.json_schemas import FORMATS, random_schema
from tests.support.server import Server

pytestmark = pytest.mark.slow

NUM_REQUESTS = 8
NUM_CLIENTS = 4
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the weather in a city", "parameters": WEATHER},
}


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        yield client


def test_a_call_has_what_the_user_said(sdk: openai.OpenAI) -> None:
    for city in ("Paris", "London"):
        answer = sdk.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"What is the weather in {city}?"}],
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            temperature=0,
        )
        calls = answer.choices[0].message.tool_calls or []
        assert len(calls) == 1
        call = calls[0]
        assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
        assert json.loads(call.function.arguments)["city"].startswith(city)


@pytest.mark.timeout(900)
def test_calls_of_random_tools_follow_their_schemas(server: Server, figure: Callable[[str, object], None]) -> None:
    rng = random.Random(11)
    asked = [[random_schema(rng, depth=1) for _ in range(rng.randint(1, 2))] for _ in range(NUM_REQUESTS)]
    outcomes = asyncio.run(call_all(server, asked))
    checker = jsonschema.FormatChecker(FORMATS)
    num_calls = 0
    for schemas, (calls, _) in zip(asked, outcomes, strict=True):
        assert calls
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[int(name.removeprefix("f"))], format_checker=checker)
            num_calls += 1
    figure("calls of random tools that follow their schemas", f"{num_calls} of {num_calls} in {NUM_REQUESTS} answers")
    assert Counter(reason for _, reason in outcomes) == {"tool_calls": NUM_REQUESTS}


async def call_all(server: Server, asked: list[list[dict[str, Any]]]) -> list[tuple[list[tuple[str, str]], str]]:
    """Names and arguments of the calls, and the finish reason, of each."""
    places = asyncio.Semaphore(NUM_CLIENTS)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def one(index: int) -> tuple[list[tuple[str, str]], str]:
            tools: Any = [
                {"type": "function", "function": {"name": f"f{number}", "parameters": schema}}
                for number, schema in enumerate(asked[index])
            ]
            async with places:
                answer = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": "Call a function."}],
                    tools=tools,
                    tool_choice="required",
                    parallel_tool_calls=False,
                    temperature=(0.0, 0.7, 1.5)[index % 3],
                    seed=index,
                )
            choice = answer.choices[0]
            calls = [json.loads(call.model_dump_json())["function"] for call in choice.message.tool_calls or ()]
            return [(call["name"], call["arguments"]) for call in calls], choice.finish_reason

        return list(await asyncio.gather(*map(one, range(len(asked)))))
