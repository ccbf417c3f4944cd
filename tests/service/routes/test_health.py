from __future__ import annotations

from tests.support.api import Api
from tests.support.scripted_engine import CONTEXT

REQUEST = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


def test_a_service_that_answers_is_healthy_and_ready(api: Api) -> None:
    health = api.get("/health").json()
    assert (health["status"], health["model"], health["loaded_models"]) == ("ok", "base", ["base"])
    assert health["engine"]["state"] == "ready"
    assert (health["engine"]["device"], health["engine"]["device_reason"]) == ("cpu", "asked for")
    assert health["engine"]["max_model_len"] == CONTEXT
    assert api.get("/ready").status_code == 200
    assert api.get("/version").json()["version"] == health["version"]


def test_a_dead_engine_shows_in_health_and_makes_the_service_unready(own_api: Api) -> None:
    own_api.engine.state, own_api.engine.ready = "dead", None
    health = own_api.get("/health")
    assert (health.status_code, health.json()["engine"]) == (200, {"state": "dead", "restarts": 0})
    for answer in (own_api.get("/ready"), own_api.post("/generate", {"prompt": "a"})):
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "unavailable_error"
        assert int(answer.headers["retry-after"]) > 0


def test_metrics_count_what_was_asked_and_answered(own_api: Api) -> None:
    """Prometheus names of vLLM, and what must hold between them after R equal requests."""
    num_requests, num_prompt, num_generated = 3, 3, 4
    own_api.engine.answer = (9, 9, 9, 9)
    for _ in range(num_requests):
        assert own_api.post("/v1/completions", REQUEST).status_code == 200
    labels = {"model_name": "base", "engine": "0"}
    expected = {
        "vllm:time_to_first_token_seconds_count": num_requests,
        "vllm:inter_token_latency_seconds_count": num_requests * (num_generated - 1),
        "vllm:e2e_request_latency_seconds_count": num_requests,
        "vllm:request_prompt_tokens_sum": num_requests * num_prompt,
        "vllm:request_generation_tokens_sum": num_requests * num_generated,
        "vllm:request_decode_time_seconds_count": num_requests,
        "vllm:prompt_tokens_total": num_requests * num_prompt,
        "vllm:generation_tokens_total": num_requests * num_generated,
    }
    assert {name: own_api.metric(name, **labels) for name in expected} == expected
    assert own_api.metric("vllm:request_success_total", finished_reason="length", **labels) == num_requests
    assert own_api.metric("tuneserve:weights_info", model="base", weights_hash="hash-of-base") == 1


def test_metrics_are_in_prometheus_text_form(api: Api) -> None:
    answer = api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "tuneserve:decode_tokens_per_second"):
        assert f"\n{name}" in answer.text
