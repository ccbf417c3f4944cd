"""What /metrics counts, by vLLM's rules, of requests to a real service with a real engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import running_server
from tests.support.tiny import make_tiny_llama

PROMPT = list(range(10, 60))
LENGTH = 6
CONTEXT = 16_384

Counts = dict[str, float]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_llama(home / "models" / "tiny", max_position_embeddings=CONTEXT)
    arguments = ("model=tiny", "dtype=fp32", "device=cpu", "num_threads=1", "max_num_seqs=4")
    with (
        running_server(home, *arguments, "max_num_batched_tokens=128") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def read(client: httpx.Client) -> Counts:
    """Every sample by its name, with its own label's value behind it."""
    counts = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            own = [value for label, value in sample.labels.items() if label not in ("model_name", "engine", "le")]
            if "le" not in sample.labels:
                counts[" ".join((sample.name.removeprefix("vllm:"), *own))] = sample.value
    return counts


def counted(client: httpx.Client, work: Callable[[], Any]) -> Counts:
    """What `work` adds."""
    before = read(client)
    work()
    return {name: value - before.get(name, 0) for name, value in read(client).items()}


def complete(client: httpx.Client, *, times: int = 1, **options: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0, **options}
    for _ in range(times):
        assert client.post("/v1/completions", json=body).status_code == 200


def assert_counts(found: Counts, expected: dict[str, float]) -> None:
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("stream", [False, True])
def test_requests_one_by_one_are_counted_as_vllm_counts_them(client: httpx.Client, stream: bool) -> None:
    num, prompt, generated = 5, len(PROMPT), LENGTH
    found = counted(client, lambda: complete(client, times=num, stream=stream))
    assert_counts(
        found,
        {
            "time_to_first_token_seconds_count": num,
            "inter_token_latency_seconds_count": num * (generated - 1),
            "e2e_request_latency_seconds_count": num,
            "request_queue_time_seconds_count": num,
            "request_prefill_time_seconds_count": num,
            "request_decode_time_seconds_count": num,
            "request_inference_time_seconds_count": num,
            "request_time_per_output_token_seconds_count": num,
            "request_prompt_tokens_sum": num * prompt,
            "request_generation_tokens_sum": num * generated,
            "request_max_num_generation_tokens_sum": num * generated,
            "request_params_max_tokens_sum": num * generated,
            "request_params_n_count": num,
            "request_params_n_sum": num,
            "request_num_preemptions_count": num,
            "request_num_preemptions_sum": 0,
            "prompt_tokens_total": num * prompt,
            "generation_tokens_total": num * generated,
            "iteration_tokens_total_sum": num * (prompt + generated),
            "iteration_tokens_total_count": num * generated,
            "request_success_total length": num,
            "request_success_total stop": 0,
            "prefix_cache_queries_total": num * prompt,
        },
    )
    hits = found["prefix_cache_hits_total"]
    assert 0 < hits < num * prompt
    assert_counts(
        found,
        {
            "prompt_tokens_cached_total": hits,
            "prompt_tokens_by_source_total local_cache_hit": hits,
            "prompt_tokens_by_source_total local_compute": num * prompt - hits,
            "request_prefill_kv_computed_tokens_sum": num * prompt - hits,
        },
    )


def test_each_answer_to_a_prompt_is_a_request_of_its_own(client: httpx.Client) -> None:
    found = counted(client, lambda: complete(client, prompt=[PROMPT, PROMPT[:9]], n=3, temperature=1, seed=0))
    assert_counts(
        found,
        {
            "time_to_first_token_seconds_count": 6,
            "request_success_total length": 6,
            "prompt_tokens_total": 3 * (len(PROMPT) + 9),
            "generation_tokens_total": 6 * LENGTH,
            "inter_token_latency_seconds_count": 6 * (LENGTH - 1),
            "request_params_n_count": 2,
            "request_params_n_sum": 6,
            "request_max_num_generation_tokens_count": 2,
            "request_max_num_generation_tokens_sum": 2 * LENGTH,
            "iteration_tokens_total_sum": 3 * (len(PROMPT) + 9) + 6 * LENGTH,
        },
    )


def test_a_stop_string_and_an_end_token_are_counted_with_the_tokens_that_usage_tells(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 1.5, "seed": 3}
    usage: dict[str, int] = {}

    def work() -> None:
        answer = client.post("/v1/completions", json={**body, "stop": ["e", "t", "a", "\n"]}).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        usage.update(answer["usage"])

    found = counted(client, work)
    num_generated = usage["completion_tokens"]
    assert 1 < num_generated < 200
    assert_counts(
        found,
        {
            "request_success_total stop": 1,
            "generation_tokens_total": num_generated,
            "request_generation_tokens_sum": num_generated,
            "inter_token_latency_seconds_count": num_generated - 1,
            "request_params_max_tokens_sum": 200,
            "request_queue_time_seconds_count": 1,
        },
    )


def test_a_refused_request_is_not_counted(client: httpx.Client) -> None:
    def work() -> None:
        for body in ({"prompt": PROMPT, "max_tokens": CONTEXT}, {"prompt": [10**6]}, {"prompt": "a", "model": "nope"}):
            assert client.post("/v1/completions", json=body).status_code in (400, 404)

    found = counted(client, work)
    names = ("request_success", "request_params", "prompt_tokens", "tuneserve:requests_aborted", "e2e")
    assert not [name for name, value in found.items() if name.startswith(names) and value]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_is_counted(client: httpx.Client, stream: bool) -> None:
    """As one aborted request without a token."""
    body = {"prompt": [10 + number % 200 for number in range(16_000)], "max_tokens": 8, "stream": stream}

    def work() -> None:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.3)
        deadline = time.monotonic() + 20
        while (gauges := read(client))["num_requests_running"] or gauges["kv_cache_usage_perc"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    found = counted(client, work)
    assert 0 < found["iteration_tokens_total_sum"] < 16_000
    assert_counts(
        found,
        {
            "tuneserve:requests_aborted_total client": 1,
            "request_success_total abort": 1,
            "time_to_first_token_seconds_count": 0,
            "prompt_tokens_total": 0,
            "e2e_request_latency_seconds_count": 0,
        },
    )


def test_what_is_put_back_for_want_of_blocks_is_counted_with_its_request(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "models" / "tiny", max_position_embeddings=512)
    arguments = ("model=tiny", "dtype=fp32", "device=cpu", "num_threads=1", "max_num_seqs=8")
    # 8 x 300 tokens do not fit into it: a token takes 2 layers x 2 heads x 8 x 4 bytes, for keys and for values
    with (
        running_server(tmp_path, *arguments, f"kv_cache_memory={1000 * 2 * 2 * 2 * 8 * 4}") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        found = counted(client, lambda: complete(client, prompt=[[10 + i, 20] for i in range(8)], max_tokens=300))
    assert found["num_preemptions_total"] > 0
    assert_counts(
        found,
        {
            "request_num_preemptions_sum": found["num_preemptions_total"],
            "request_num_preemptions_count": 8,
            "time_to_first_token_seconds_count": 8,
            "generation_tokens_total": 8 * 300,
            "inter_token_latency_seconds_count": 8 * 299,
            "request_success_total length": 8,
        },
    )
