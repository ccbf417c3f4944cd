"""The bodies that real clients send, as they send them: each is answered, and nothing in it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.api import Api

HI = [{"role": "user", "content": "hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
USAGE = {"include_usage": True, "continuous_usage_stats": True}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "guidellm, chat": (
        CHAT,
        {"messages": PARTS, "stream": True, "stream_options": USAGE, "ignore_eos": True, "stop": None,
         "max_completion_tokens": 5},
    ),
    "guidellm, text": (
        COMPLETIONS,
        {"prompt": "hi", "stream": True, "stream_options": USAGE, "ignore_eos": True, "stop": None, "max_tokens": 5},
    ),
    "vllm bench serve": (
        COMPLETIONS,
        {"prompt": "hi", "repetition_penalty": 1.0, "max_tokens": 5, "logprobs": None, "stream": True,
         "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0},
    ),
    "vllm bench serve, chat": (
        CHAT,
        {"messages": PARTS, "max_completion_tokens": 5, "stream": True, "stream_options": {"include_usage": True},
         "ignore_eos": True, "temperature": 0.0},
    ),
    "sglang bench_serving": (
        COMPLETIONS,
        {"prompt": "hi", "temperature": 0.0, "best_of": 1, "max_tokens": 5, "stream": True, "ignore_eos": True,
         "stream_options": {"include_usage": True}},
    ),
    "lm_eval, log likelihood": (
        COMPLETIONS,
        {"prompt": [[5, 6, 7], [8, 9]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},
    ),
    "lm_eval, generation": (
        COMPLETIONS,
        {"prompt": [[5, 6, 7]], "max_tokens": 50, "temperature": 0, "stop": ["\n\n", "Q:", "</s>", "<|im_end|>"],
         "seed": 1234},
    ),
    "lm_eval, chat": (
        CHAT,
        {"messages": HI, "max_tokens": 50, "temperature": 0, "stop": ["<|im_end|>"], "seed": 1234},
    ),
    "llmperf": (CHAT, {"messages": HI, "stream": True, "max_tokens": 5}),
    "langchain": (
        CHAT,
        {"messages": HI, "n": 1, "stream": False, "temperature": 0.7, "logprobs": None, "parallel_tool_calls": None},
    ),
    "evalscope": (
        CHAT,
        {"messages": HI, "max_tokens": 5, "min_tokens": 5, "temperature": 0.0, "top_p": 1.0, "top_k": -1,
         "frequency_penalty": 0.0, "seed": 0, "stream": True, "stream_options": {"include_usage": True}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES)
def test_it_is_answered(api: Api, path: str, body: dict[str, Any]) -> None:
    if not body.get("stream"):
        answer = api.post(path, {"model": "base", **body})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        return
    chunks = api.events(path, {"model": "base", **body})
    if "stream_options" in body:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == min(5, len(api.engine.answer) + 1)
    else:
        assert chunks[-1]["choices"][0]["finish_reason"] is not None


@pytest.mark.parametrize("name", ["guidellm, chat", "guidellm, text"])
def test_guidellm_reads_exact_counts_from_every_chunk(api: Api, name: str) -> None:
    path, body = BODIES[name]
    *chunks, last = api.events(path, body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 5
    num_prompt = len(api.engine.received[-1].prompt_ids)
    assert {chunk["usage"]["prompt_tokens"] for chunk in [*chunks, last]} == {num_prompt}
