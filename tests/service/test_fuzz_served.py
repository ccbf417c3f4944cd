"""Any combination of sampling parameters is answered by the real engine, whole and as the same stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.server import running_server
from tests.support.tiny import VOCAB_SIZE, make_tiny_llama

fuzz = settings(
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
token_ids = st.integers(0, VOCAB_SIZE - 1)
PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2) | st.sampled_from([0, 1e-6, 1e-4, 2]),
    "top_p": st.floats(0, 1) | st.sampled_from([0, 1e-300, 1]),
    "top_k": st.integers(-1, 30) | st.just(2**31 - 1),
    "min_p": st.floats(0, 1) | st.sampled_from([1e-300, 1]),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100) | st.sampled_from([0.01, 100]),
    "logit_bias": st.dictionaries(token_ids.map(str), st.floats(-100, 100), max_size=5),
    "bad_words": st.lists(st.text("the lo🛸", min_size=1, max_size=4), max_size=4),
    "allowed_token_ids": st.lists(token_ids, min_size=1, max_size=5),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 3),
    "min_tokens": st.integers(0, 6),
    "stop": st.lists(st.text("the lo", min_size=1, max_size=2), max_size=4),
    "stop_token_ids": st.lists(token_ids, max_size=20),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, 20),
    "echo": st.booleans(),
}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_llama(home / "models" / "tiny")
    arguments = ("model=tiny", "dtype=fp32", "device=cpu", "num_threads=1", "max_num_seqs=4")
    with running_server(home, *arguments) as server, httpx.Client(base_url=server.url, timeout=60) as web:
        yield web


@fuzz
@given(
    prompt=st.lists(token_ids, min_size=1, max_size=40),
    options=st.sets(st.sampled_from(sorted(PARAMETERS)), max_size=8).flatmap(
        lambda names: st.fixed_dictionaries({name: PARAMETERS[name] for name in sorted(names)})
    ),
)
@example(prompt=[5], options={"allowed_token_ids": [6], "logit_bias": {"6": -100}, "bad_words": ["$"]})
@example(prompt=[5], options={"allowed_token_ids": [2], "min_tokens": 6})
@example(prompt=[5], options={"stop_token_ids": [*range(128)], "min_tokens": 6, "temperature": 2, "seed": 0})
def test_every_combination_is_answered(web: httpx.Client, prompt: list[int], options: dict[str, Any]) -> None:
    body = {"prompt": prompt, "max_tokens": 6, "seed": 1, **options}
    answer = web.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    for choice in whole["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        if "logprobs" in options:
            num_prompt = len(prompt) if options.get("echo") else 0
            assert num_prompt < len(choice["logprobs"]["tokens"]) <= num_prompt + 6
    text = web.post("/v1/completions", json={**body, "stream": True}).text
    events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    for choice in whole["choices"]:
        own = [item for event in events for item in event["choices"] if item["index"] == choice["index"]]
        assert "".join(item["text"] for item in own) == choice["text"]
        assert [item["finish_reason"] for item in own if item["finish_reason"]] == [choice["finish_reason"]]


def test_after_all_that_nothing_is_left_in_the_engine(web: httpx.Client) -> None:
    assert web.post("/generate", json={"prompt": "the", "max_tokens": 2}).status_code == 200
    gauges = [line for line in web.get("/metrics").text.splitlines() if line.startswith("vllm:num_requests_")]
    assert {float(line.rsplit(" ", 1)[1]) for line in gauges} == {0.0}
