"""A real service process with the real engine on a tiny model, and the real OpenAI client in front of it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import CompletionUsage

from tests.support.server import Server, running_server
from tests.support.tiny import EOS, make_tiny_llama

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you? 你是谁?"}]
CONTEXT = 8192
LONG = 6000  # tokens: no answer of this length is complete before the client leaves


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_llama(home / "models" / "tiny", max_position_embeddings=CONTEXT)
    with running_server(home, "model=tiny", "dtype=fp32", "device=cpu", "num_threads=1") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def read_metrics(server: Server) -> dict[str, float]:
    """Metric -> the sum over its labels."""
    figures: dict[str, float] = {}
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if match := re.fullmatch(r"([a-z_:]+)(?:\{.*\})? (\S+)", line):
            figures[match[1]] = figures.get(match[1], 0.0) + float(match[2])
    return figures


def wait_until_idle(server: Server, timeout: float = 10) -> None:
    """No request computes or waits, and no block of the cache is in use."""
    deadline = time.monotonic() + timeout
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while any(read_metrics(server)[name] for name in gauges):
        assert time.monotonic() < deadline, read_metrics(server)
        time.sleep(0.05)


def counts(usage: CompletionUsage | None) -> tuple[int, int, int]:
    """Without what the cache had, which depends on what was asked before."""
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "tuneserve")
    assert client.models.retrieve("latest").id == "tiny"


def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert counts(chunks[-1].usage) == counts(whole.usage)
    prompt, completion, total = counts(whole.usage)
    assert total == prompt + completion


def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "latest", "messages": MESSAGES, "max_completion_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**options)
    *chunks, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (counts(last.usage), last.system_fingerprint) == (counts(whole.usage), whole.system_fingerprint)
    assert str(whole.system_fingerprint).startswith("ts-")


def test_a_chat_is_the_completion_of_its_rendered_prompt(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES[1:], max_tokens=20, temperature=0)
    prompt = f"<|im_start|>user\n{MESSAGES[1]['content']}<|im_end|>\n<|im_start|>assistant\n"
    text = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
    assert chat.choices[0].message.content == text.choices[0].text
    assert counts(chat.usage) == counts(text.usage)


def test_a_batch_answers_each_prompt_as_alone(client: openai.OpenAI) -> None:
    prompts = ["the", "hello", "你好", "x y z"]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "temperature": 0}
    together = client.completions.create(prompt=prompts, **options)
    alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


CHANGE_NOTHING: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "n": 1, "top_p": 1, "stop": [], "seed": 1,
    "user": "someone", "temperature": 0,
}  # fmt: skip


def test_a_chat_takes_every_parameter_of_the_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=8, max_tokens=8, logprobs=True, top_logprobs=1,
        metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="x", prompt_cache_key="y",
        prompt_cache_retention="24h", prediction={"type": "content", "content": "p"}, modalities=["text"],
        reasoning_effort="none", verbosity="medium", parallel_tool_calls=True, tool_choice="auto", tools=[],
        response_format={"type": "text"}, **CHANGE_NOTHING,
    )  # fmt: skip
    plain = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == plain.choices[0].message.content


def test_a_completion_takes_every_parameter_of_the_client(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {**CHANGE_NOTHING, "best_of": 1, "echo": False, "logprobs": 1, "suffix": None}
    answer = client.completions.create(model="tiny", prompt="the", max_tokens=8, **options)
    plain = client.completions.create(model="tiny", prompt="the", max_tokens=8, temperature=0)
    assert answer.choices[0].text == plain.choices[0].text


def test_the_clients_own_streams_end_in_the_whole_answer(client: openai.OpenAI) -> None:
    ends = {
        "logit_bias": {str(EOS): 100},
        "extra_body": {"min_tokens": 8},
    }  # the client refuses an answer that is cut off
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, **ends}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert counts(final.usage) == counts(whole.usage)


def test_the_asynchronous_client_streams_side_by_side(server: Server) -> None:
    async def text(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model="tiny", prompt=prompt, max_tokens=16, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_texts(prompts: list[str]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return [*await asyncio.gather(*(text(client, prompt) for prompt in prompts))]

    prompts = ["the", "hello", "你好", "x y z"] * 3
    found = asyncio.run(all_texts(prompts))
    assert found[:4] == found[4:8] == found[8:]


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5, "seed": seed}
        answer: openai.types.Completion = client.completions.create(model="tiny", prompt="the", **options)
        return answer.choices[0].text

    assert sample(-(2**63)) == sample(-(2**63)) != sample(8)


def test_a_stop_string_of_the_answer_cuts_it(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[5:7]
    cut = client.completions.create(**options, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [({"max_tokens": 0}, "max_tokens", None), ({"max_tokens": "8"}, "max_tokens", None), ({"n": 129}, "n", None),
     ({"prompt": [5] * CONTEXT}, "prompt", "context_length_exceeded"), ({"prompt": [99999]}, "prompt", None),
     ({"extra_body": {"max_token": 3}}, "max_token", None)],
)  # fmt: skip
def test_a_mistake_is_a_bad_request(
    client: openai.OpenAI, options: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "a", **options})
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage is not None


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.completions.create(model="gpt-9", prompt="a"),
        lambda: client.models.retrieve("gpt-9"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_what_metrics_count_is_what_was_answered(client: openai.OpenAI, server: Server) -> None:
    num_requests, num_prompt, num_generated = 3, 5, 7
    before = read_metrics(server)
    for _ in range(num_requests):
        client.completions.create(
            model="tiny", prompt=[9] * num_prompt, max_tokens=num_generated, extra_body={"ignore_eos": True}
        )
    after = read_metrics(server)
    expected = {
        "vllm:time_to_first_token_seconds_count": num_requests,
        "vllm:inter_token_latency_seconds_count": num_requests * (num_generated - 1),
        "vllm:request_prompt_tokens_sum": num_requests * num_prompt,
        "vllm:generation_tokens_total": num_requests * num_generated,
        "vllm:iteration_tokens_total_sum": num_requests * (num_prompt + num_generated),
        "vllm:iteration_tokens_total_count": num_requests * num_generated,
        "vllm:request_success_total": num_requests,
    }
    assert {name: after[name] - before[name] for name in expected} == expected
    assert after["tuneserve:decode_tokens_per_second"] > 0
    assert 0 < after["tuneserve:bandwidth_utilization_ratio"] < 1


def stream_and_leave(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body) as answer:
        next(answer.iter_lines())


def ask_and_leave(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=httpx.Timeout(10, read=0.2))


@pytest.mark.parametrize("leave", [stream_and_leave, ask_and_leave])
def test_a_client_that_leaves_frees_the_engine(server: Server, leave: Callable[[Server], None]) -> None:
    before = read_metrics(server)
    leave(server)
    wait_until_idle(server)
    after = read_metrics(server)
    aborted = "tuneserve:requests_aborted_total"
    assert after[aborted] == before[aborted] + 1
    assert after["vllm:generation_tokens_total"] < before["vllm:generation_tokens_total"] + LONG


def test_a_storm_of_clients_that_leave_ends_in_an_idle_engine(client: openai.OpenAI, server: Server) -> None:
    async def storm() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as web:
            body = {"prompt": "the", "max_tokens": LONG, "ignore_eos": True}
            tasks = [
                asyncio.create_task(web.post("/generate", json={**body, "stream": stream}))
                for stream in (True, False) * 30
            ]
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(storm())
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage is not None
    wait_until_idle(server)
