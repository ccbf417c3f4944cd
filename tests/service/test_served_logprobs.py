"""Log probabilities, and streams that are the whole answer in pieces: the OpenAI client, a real service, a tiny model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.served import LENGTH, PROMPT, complete, ids_of, serving_tiny
from tests.support.tiny import EOS

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you? 你是谁?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving_tiny(tmp_path_factory.mktemp("home")) as client:
        yield client


def test_greedy_takes_the_largest_of_its_log_probabilities(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=20).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == max(top.values())
        assert math.fsum(map(math.exp, top.values())) <= 1 + 1e-6


def test_penalties_and_temperature_leave_log_probabilities_as_they_are(client: openai.OpenAI) -> None:
    plain = complete(client, logprobs=3, max_tokens=1).choices[0].logprobs
    options: dict[str, Any] = {"logit_bias": {"77": 100}, "temperature": 1.7, "frequency_penalty": 1.0}
    odd = complete(client, logprobs=3, max_tokens=1, **options).choices[0].logprobs
    assert plain is not None
    assert odd is not None
    assert plain.top_logprobs is not None
    assert odd.top_logprobs is not None
    assert plain.top_logprobs[0].items() <= odd.top_logprobs[0].items()


def test_an_answer_read_back_as_a_prompt_has_the_same_log_probabilities(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=2, temperature=1, seed=3)
    prompt = answer.choices[0].prompt_token_ids  # type: ignore[attr-defined]
    told = answer.choices[0].logprobs
    assert told is not None
    for end in (0, 1):
        back = complete(client, prompt=[*prompt, *ids_of(answer)], max_tokens=end, logprobs=2, echo=True)
        read = back.choices[0].logprobs
        assert read is not None
        assert read.token_logprobs is not None
        assert len(read.token_logprobs) == len(prompt) + LENGTH + end
        assert read.token_logprobs[0] is None
        answered = slice(len(prompt), len(prompt) + LENGTH)
        assert read.token_logprobs[answered] == pytest.approx(told.token_logprobs, abs=1e-4)
        assert read.tokens is not None
        assert read.tokens[answered] == told.tokens


def test_echo_has_an_entry_behind_the_prompt_also_where_the_answer_ends_at_once(client: openai.OpenAI) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    options: dict[str, Any] = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    answer = client.completions.create(
        model="tiny", prompt=prompts, temperature=0, logit_bias={str(EOS): 100}, **options
    )
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        assert choice.logprobs is not None
        for array in (choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs):
            assert array is not None
            assert len(array) == len(prompt) + 1


def test_prompt_logprobs_are_those_of_echo(client: openai.OpenAI) -> None:
    echo = complete(client, max_tokens=1, logprobs=2, echo=True).choices[0].logprobs
    choice = complete(client, max_tokens=1, extra={"prompt_logprobs": 2}).choices[0]
    first, *rest = choice.prompt_logprobs  # type: ignore[attr-defined]
    assert first is None
    assert echo is not None
    assert echo.token_logprobs is not None
    ids = choice.prompt_token_ids[1:]  # type: ignore[attr-defined]
    values = [entry[str(token_id)]["logprob"] for entry, token_id in zip(rest, ids, strict=True)]
    assert values == pytest.approx(echo.token_logprobs[1:-1], abs=1e-5)


def test_chat_log_probabilities_have_the_bytes_of_the_content(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=LENGTH, temperature=0, logprobs=True, top_logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == LENGTH
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    spelled = b"".join(bytes(entry.bytes or ()) for entry in content if entry.token not in special)
    assert spelled.decode("utf-8", "replace") == choice.message.content
    for entry in content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.logprob == entry.top_logprobs[0].logprob


# ---- streamed = whole

PARAMETERS: list[dict[str, Any]] = [
    {},
    {"n": 3, "seed": 1, "temperature": 1.2},
    {"logprobs": 3, "echo": True},
    {"logprobs": 0, "n": 2, "seed": 2, "temperature": 1.0},
    {"stop": ["e", "o"], "seed": 3, "temperature": 1.0, "logprobs": 1},
    {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"min_p": 0.02, "top_k": 30, "top_p": 0.95, "seed": 4, "temperature": 1.3},
    {"include_stop_str_in_output": True, "stop": "a", "seed": 5, "temperature": 1.0},
    {"skip_special_tokens": False, "seed": 6, "temperature": 2.0},
    {"max_tokens": 0, "echo": True, "logprobs": 2},
]
SDK_FIELDS = {"n", "seed", "temperature", "logprobs", "echo", "stop", "frequency_penalty", "presence_penalty", "top_p",
              "max_tokens"}  # fmt: skip


def rounded(value: Any) -> Any:
    """Log probabilities move in their last digits with the batch and with what the cache has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize("options", PARAMETERS)
def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI, options: dict[str, Any]) -> None:
    known = {name: value for name, value in options.items() if name in SDK_FIELDS}
    extra = {name: value for name, value in options.items() if name not in SDK_FIELDS}
    whole = complete(client, **known, extra=extra)
    body = {"ignore_eos": True, "return_token_ids": True, **extra}
    settings = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, **known}
    chunks = client.completions.create(
        model="tiny", **settings, extra_body=body, stream=True, stream_options={"include_usage": True}
    )
    told = [chunk.model_dump() for chunk in chunks]
    assert told[-1]["usage"]["completion_tokens"] == whole.model_dump()["usage"]["completion_tokens"]
    for choice in whole.model_dump()["choices"]:
        own = [item for chunk in told for item in chunk["choices"] if item["index"] == choice["index"]]
        assert "".join(item["text"] for item in own) == choice["text"]
        assert [part for item in own for part in item["token_ids"]] == choice["token_ids"]
        assert (own[-1]["finish_reason"], own[-1]["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
        for name, values in (choice["logprobs"] or {}).items():
            assert rounded([value for item in own for value in (item["logprobs"] or {name: []})[name]]) == rounded(
                values
            )


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "seed": 1, "temperature": 1.0}, {"logprobs": True, "top_logprobs": 2}]
)
def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": LENGTH,
        "temperature": 0,
        **options,
    }
    whole = client.chat.completions.create(**settings)
    told = [chunk.model_dump() for chunk in client.chat.completions.create(**settings, stream=True)]
    for choice in whole.model_dump()["choices"]:
        own = [item for chunk in told for item in chunk["choices"] if item["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(item["delta"]["content"] or "" for item in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        values = (choice["logprobs"] or {"content": []})["content"]
        told_values = [value for item in own for value in (item["logprobs"] or {"content": []})["content"]]
        assert rounded(told_values) == rounded(values)


def test_usage_on_every_chunk_counts_the_tokens_so_far(client: openai.OpenAI) -> None:
    """As guidellm asks, which takes its token counts from there."""
    body: dict[str, Any] = {
        "messages": MESSAGES, "max_completion_tokens": LENGTH, "stop": None, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    chunks = list(client.chat.completions.create(model="tiny", **body))
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == LENGTH
    assert chunks[-1].choices == []
