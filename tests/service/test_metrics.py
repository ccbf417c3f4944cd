from __future__ import annotations

from typing import get_args

import pytest
from msgspec.structs import replace

from service.engine.messages import RequestTiming, StepStats
from service.metrics import AbortCause, Metrics
from service.rates import WINDOW_S, Rates
from tests.support.scripted_engine import READY

LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("m")
    metrics.engine_ready(READY)
    return metrics


def value(metrics: Metrics, name: str, labels: dict[str, str] | None = None) -> float | None:
    return metrics.registry.get_sample_value(name, labels or {})


def stats(**figures: float) -> StepStats:
    return StepStats(
        **{
            "num_running": 0, "num_waiting": 0, "used_blocks": 0, "prefill_tokens": 0, "prefill_s": 0.0,
            "decode_tokens": 0, "decode_s": 0.0, "decode_bytes": 0, "device_memory_bytes": 0, **figures,
        }  # type: ignore[arg-type]
    )  # fmt: skip


def test_steps_set_the_gauges_of_the_engine(metrics: Metrics) -> None:
    metrics.step(stats(num_running=3, num_waiting=2, used_blocks=16, device_memory_bytes=5))
    assert value(metrics, "vllm:num_requests_running", LABELS) == 3
    assert value(metrics, "vllm:num_requests_waiting", LABELS) == 2
    assert value(metrics, "vllm:kv_cache_usage_perc", LABELS) == 16 / READY.num_blocks
    assert value(metrics, "tuneserve:device_memory_bytes") == 5
    metrics.engine_gone()
    assert value(metrics, "vllm:num_requests_running", LABELS) == 0
    assert value(metrics, "vllm:kv_cache_usage_perc", LABELS) == 0


def test_rates_are_work_per_second_of_work(metrics: Metrics) -> None:
    metrics.step(stats(prefill_tokens=100, prefill_s=0.5, decode_tokens=4, decode_s=0.1, decode_bytes=10**9))
    metrics.step(stats(decode_tokens=2, decode_s=0.2, decode_bytes=5 * 10**8))
    assert value(metrics, "tuneserve:prefill_tokens_per_second") == pytest.approx(200)
    assert value(metrics, "tuneserve:decode_tokens_per_second") == pytest.approx(20)
    assert value(metrics, "tuneserve:bandwidth_bytes_per_second") == pytest.approx(5e9)
    assert value(metrics, "tuneserve:bandwidth_utilization_ratio") == pytest.approx(5e9 / READY.peak_bandwidth)
    assert value(metrics, "vllm:estimated_read_bytes_per_gpu_total", LABELS) == 1.5e9


def test_a_rate_falls_to_nothing_when_nothing_happens() -> None:
    now = 0.0
    rates = Rates(clock=lambda: now)
    rates.add(10, 2.0)
    assert rates.rate() == 5.0
    now = WINDOW_S + 1
    assert rates.rate() == 0.0


def test_iteration_tokens_count_prompts_and_generated_tokens(metrics: Metrics) -> None:
    """One request of 20 prompt tokens in two chunks, and 3 generated ones."""
    for figures in (
        {"prefill_tokens": 16},
        {"prefill_tokens": 4, "num_sampled": 1},
        {"num_sampled": 1},
        {"num_sampled": 1},
    ):
        metrics.step(stats(**figures))
    metrics.step(stats())  # an abort, which computes nothing
    assert value(metrics, "vllm:iteration_tokens_total_sum", LABELS) == 20 + 3
    assert value(metrics, "vllm:iteration_tokens_total_count", LABELS) == 4


def test_iteration_tokens_count_what_the_cache_had(metrics: Metrics) -> None:
    metrics.step(stats(num_prefix_queries=20, num_prefix_hits=16, prefill_tokens=4, num_sampled=1))
    assert value(metrics, "vllm:iteration_tokens_total_sum", LABELS) == 20 + 1
    assert value(metrics, "vllm:prefix_cache_queries_total", LABELS) == 20
    assert value(metrics, "vllm:prefix_cache_hits_total", LABELS) == 16


def test_waiting_requests_are_told_by_what_they_wait_for(metrics: Metrics) -> None:
    metrics.step(stats(num_waiting=5, num_deferred=2))
    by_reason = {
        reason: value(metrics, "vllm:num_requests_waiting_by_reason", {**LABELS, "reason": reason})
        for reason in ("capacity", "deferred")
    }
    assert by_reason == {"capacity": 3, "deferred": 2}
    metrics.engine_gone()
    assert value(metrics, "vllm:num_requests_waiting_by_reason", {**LABELS, "reason": "deferred"}) == 0


def test_the_form_of_the_cache_is_told_once_whatever_engine_comes(metrics: Metrics) -> None:
    metrics.engine_ready(replace(READY, num_blocks=7))
    lines = [line for line in metrics.render().decode().splitlines() if line.startswith("vllm:cache_config_info")]
    labels = 'block_size="16",cache_dtype="fp32",enable_prefix_caching="True",engine="0",model_name="m"'
    assert lines == [f'vllm:cache_config_info{{{labels},num_gpu_blocks="7"}} 1.0']


def test_prompt_tokens_are_told_by_where_they_came_from(metrics: Metrics) -> None:
    metrics.first_token(10, 0.5, cached_tokens=8)
    metrics.first_token(10, 0.5)
    assert value(metrics, "vllm:prompt_tokens_total", LABELS) == 20
    assert value(metrics, "vllm:prompt_tokens_cached_total", LABELS) == 8
    for source, tokens in (("local_cache_hit", 8), ("local_compute", 12)):
        assert value(metrics, "vllm:prompt_tokens_by_source_total", {**LABELS, "source": source}) == tokens


def test_a_finished_request_is_told_with_its_times_and_sizes(metrics: Metrics) -> None:
    timing = RequestTiming(queue_s=1.0, prefill_s=2.0, decode_s=3.0, decode_tokens=6, num_preempted=2, decode_bytes=0)
    metrics.request_finished(
        "length", prompt_tokens=10, cached_tokens=8, generated_tokens=7, max_tokens=7, seconds=6.5, timing=timing
    )
    expected = {
        "request_queue_time_seconds": 1.0, "request_prefill_time_seconds": 2.0, "request_decode_time_seconds": 3.0,
        "request_inference_time_seconds": 5.0, "request_time_per_output_token_seconds": 0.5,
        "e2e_request_latency_seconds": 6.5, "request_prompt_tokens": 10, "request_prefill_kv_computed_tokens": 2,
        "request_generation_tokens": 7, "request_params_max_tokens": 7, "request_num_preemptions": 2,
    }  # fmt: skip
    assert {name: value(metrics, f"vllm:{name}_sum", LABELS) for name in expected} == expected
    assert value(metrics, "vllm:request_success_total", {**LABELS, "finished_reason": "length"}) == 1


def test_one_prompt_is_one_whatever_number_of_answers_it_has(metrics: Metrics) -> None:
    metrics.prompt_finished(n=3, longest_answer=20)
    assert value(metrics, "vllm:request_params_n_count", LABELS) == 1
    assert value(metrics, "vllm:request_params_n_sum", LABELS) == 3
    assert value(metrics, "vllm:request_max_num_generation_tokens_sum", LABELS) == 20


def test_aborted_requests_are_counted_by_cause_and_among_the_finished(metrics: Metrics) -> None:
    metrics.request_aborted("client")
    metrics.request_aborted("engine")
    metrics.request_aborted("error")
    metrics.request_aborted("shutdown")  # which request_finished tells as well
    assert [value(metrics, "tuneserve:requests_aborted_total", {"cause": cause}) for cause in get_args(AbortCause)] == [
        1, 1, 1, 1,
    ]  # fmt: skip
    assert value(metrics, "vllm:request_success_total", {**LABELS, "finished_reason": "abort"}) == 1
    assert value(metrics, "vllm:request_success_total", {**LABELS, "finished_reason": "error"}) == 2


def test_jobs_and_training_steps_are_told(metrics: Metrics) -> None:
    metrics.jobs({"running": 1, "failed": 2})
    metrics.job_step({"loss": 1.5, "step": 7, "trained_tokens_per_second": 10.0, "processed_tokens_per_second": 20.0})
    metrics.jobs({"failed": 2})
    assert value(metrics, "tuneserve:jobs", {"status": "running"}) == 0
    assert value(metrics, "tuneserve:jobs", {"status": "failed"}) == 2
    assert value(metrics, "tuneserve:train_loss") == 1.5
    assert value(metrics, "tuneserve:train_tokens_per_second", {"kind": "processed"}) == 20.0


def test_only_the_served_weights_are_told(metrics: Metrics) -> None:
    metrics.serving("a", "1")
    metrics.serving("b", "2")
    assert value(metrics, "tuneserve:weights_info", {"model": "a", "weights_hash": "1"}) is None
    assert value(metrics, "tuneserve:weights_info", {"model": "b", "weights_hash": "2"}) == 1


def test_everything_that_can_be_counted_is_there_before_it_happens() -> None:
    text = Metrics("m").render().decode()
    for line in (
        'tuneserve:jobs{status="failed"} 0.0',
        'tuneserve:requests_aborted_total{cause="client"} 0.0',
        'tuneserve:weights_swaps_total{result="failed"} 0.0',
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 0.0',
    ):
        assert line in text
