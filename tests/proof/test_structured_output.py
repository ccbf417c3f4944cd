"""SmolLM2, which has learned nothing of schemas, answers in random ones through the real service: all are valid."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest

from service.engine.grammar import GrammarCompiler
from service.structured_output import json_schema
from tests.proof.conftest import MODEL
from tests.support.json_schemas import FORMATS, random_schema
from tests.support.proof_size import proof_size
from tests.support.server import Server

pytestmark = pytest.mark.slow

NUM_SCHEMAS = proof_size(200, in_ci=60)
NUM_CLIENTS = 16
MAX_TOKENS = 1000
VOCAB_SIZE = 49152
PROMPTS = (
    "Describe a city in Norway.",
    "What is in my shopping basket?",
    "Invent a user.",
    "介绍一下你自己。",
    "Write a bug report about a printer, with all details.",
    "Fill in the form.",
    "Sag mir, wie das Wetter wird 🌦",
)
CHECKER = jsonschema.FormatChecker(FORMATS)


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def ask(sdk: openai.OpenAI, content: str, **options: Any) -> str:
    """The text of an answer that came to its end by itself."""
    messages: Any = [{"role": "user", "content": content}]
    options = {"max_tokens": 300, "temperature": 0, **options}
    answer: openai.types.chat.ChatCompletion = sdk.chat.completions.create(model=MODEL, messages=messages, **options)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop", choice
    assert choice.message.content is not None
    return choice.message.content


@pytest.mark.timeout(1200)
def test_answers_to_random_schemas_and_prompts_are_all_valid(
    server: Server, figure: Callable[[str, object], None]
) -> None:
    rng = random.Random(2024)
    asked = [
        (random_schema(rng, depth=1), rng.choice(PROMPTS), rng.choice((0, 0, 0.7, 1.5))) for _ in range(NUM_SCHEMAS)
    ]
    begin = time.perf_counter()
    outcomes = asyncio.run(answer_all(server, asked))
    seconds = time.perf_counter() - begin
    ends = Counter(finish_reason for _, finish_reason, _ in outcomes)
    invalid = [
        (schema, text)
        for (schema, _, _), (text, _, _) in zip(asked, outcomes, strict=True)
        if not is_valid(text, schema)
    ]
    num_tokens = sum(tokens for _, _, tokens in outcomes)
    figure("random strict JSON schemas answered with valid JSON", f"{NUM_SCHEMAS - len(invalid)} of {NUM_SCHEMAS}")
    figure("their finish reasons; tokens; seconds", f"{dict(ends)}; {num_tokens}; {seconds:.0f}")
    assert ends == {"stop": NUM_SCHEMAS}
    assert not invalid


async def answer_all(server: Server, asked: list[tuple[dict[str, Any], str, float]]) -> list[tuple[str, str, int]]:
    """Text, finish reason and number of tokens of each."""
    places = asyncio.Semaphore(NUM_CLIENTS)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=1000) as client:

        async def one(index: int) -> tuple[str, str, int]:
            schema, prompt, temperature = asked[index]
            async with places:
                return await (streamed if index % 4 == 0 else whole)(
                    client,
                    messages=[{"role": "user", "content": prompt}],
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": f"answer_{index}", "schema": schema, "strict": True},
                    },
                    temperature=temperature,
                    seed=index,
                )

        return list(await asyncio.gather(*map(one, range(len(asked)))))


async def whole(client: openai.AsyncOpenAI, **options: Any) -> tuple[str, str, int]:
    answer = await client.chat.completions.create(model=MODEL, max_tokens=MAX_TOKENS, **options)
    choice = answer.choices[0]
    return choice.message.content or "", choice.finish_reason, answer.usage.completion_tokens


async def streamed(client: openai.AsyncOpenAI, **options: Any) -> tuple[str, str, int]:
    text, reason, tokens = "", "", 0
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    async for chunk in await client.chat.completions.create(model=MODEL, max_tokens=MAX_TOKENS, **options):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        tokens = chunk.usage.completion_tokens if chunk.usage is not None else tokens
    return text, reason, tokens


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=CHECKER)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def test_a_mask_over_the_whole_vocabulary_costs_little(smollm2: Path, figure: Callable[[str, object], None]) -> None:
    compiler = GrammarCompiler(smollm2, VOCAB_SIZE)
    words = np.zeros(VOCAB_SIZE // 32, dtype=np.int32)
    rng = random.Random(0)
    masks: list[float] = []
    compiles: list[float] = []
    compiler.build("start: /a/")  # reads the tokenizer
    for _ in range(100):
        begin = time.thread_time()
        matcher = compiler.build(json_schema(random_schema(rng), param="", strict=True).grammar)
        compiles.append(time.thread_time() - begin)
        while not matcher.is_over:
            begin = time.thread_time()
            matcher.fill_mask(words)
            masks.append(time.thread_time() - begin)
            assert matcher.accept(
                int(rng.choice(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))))
            )
    middle, late = (np.percentile(masks, share) * 1e6 for share in (50, 99))
    tell = f"{np.mean(masks) * 1e6:.0f} us; median {middle:.0f} us, 99 % {late:.0f} us, worst {max(masks) * 1e3:.1f} ms"
    figure(f"one mask of {VOCAB_SIZE} tokens, over {len(masks)} of 100 random JSON schemas: mean", tell)
    figure("compiling such a schema, first mask included: mean", f"{np.mean(compiles) * 1e3:.1f} ms")
    assert middle < 1000


def test_a_json_object_is_one(sdk: openai.OpenAI) -> None:
    text = ask(sdk, 'Repeat this JSON: {"name": "Ann", "age": 30}', response_format={"type": "json_object"})
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("fields", [{"structured_outputs": {"regex": "PATTERN"}}, {"guided_regex": "PATTERN"}])
@pytest.mark.parametrize(
    "pattern", [r"[A-Z][a-z]{2,10} [0-9]{4}", r"(\d{1,3}\.){3}\d{1,3}", "^[a-f0-9]{8}$", "(да|нет), .{3,20}!"]
)
def test_an_answer_matches_its_regular_expression(sdk: openai.OpenAI, fields: Any, pattern: str) -> None:
    body = json.loads(json.dumps(fields).replace("PATTERN", json.dumps(pattern)[1:-1]))
    assert re.fullmatch(pattern, ask(sdk, "When was Einstein born?", extra_body=body))


@pytest.mark.parametrize("name", ["structured_outputs", "guided_choice"])
def test_an_answer_is_one_of_its_choices(sdk: openai.OpenAI, name: str) -> None:
    choices = ["Paris, of course", "巴黎", "I do not know 🤷"]
    body = {name: {"choice": choices} if name == "structured_outputs" else choices}
    found = {ask(sdk, "What is the capital of France?", temperature=2, seed=i, extra_body=body) for i in range(12)}
    assert len(found) > 1
    assert found <= set(choices)


SUM = {
    "Lark": 'start: number (" + " number){1,3}\nnumber: /[1-9][0-9]{0,2}/',
    "GBNF": 'root ::= number (" + " number){1,3}\nnumber ::= [1-9] [0-9]{0,2}',
}


@pytest.mark.parametrize("form", SUM)
@pytest.mark.parametrize("name", ["structured_outputs", "guided_grammar"])
def test_an_answer_follows_its_grammar(sdk: openai.OpenAI, form: str, name: str) -> None:
    body = {name: {"grammar": SUM[form]} if name == "structured_outputs" else SUM[form]}
    text = ask(sdk, "Write a sum of three numbers.", extra_body=body)
    assert re.fullmatch(r"[1-9][0-9]{0,2}( \+ [1-9][0-9]{0,2}){1,3}", text)


def test_a_completion_follows_a_schema_too(sdk: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "maxItems": 3}
    body = {"structured_outputs": {"json": schema}}
    answer = sdk.completions.create(
        model=MODEL, prompt=["Three colours:", "Blue, twice:"], n=2, temperature=1, max_tokens=100, extra_body=body
    )
    assert len(answer.choices) == 4
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.text), schema)


def test_a_schema_that_cannot_be_enforced_is_a_bad_request_that_names_the_keyword(sdk: openai.OpenAI) -> None:
    form = {"name": "n", "schema": {"type": "array", "uniqueItems": True}, "strict": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        ask(sdk, "hi", response_format={"type": "json_schema", "json_schema": form})
    assert caught.value.param == "response_format.json_schema.schema"
