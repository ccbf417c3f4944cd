from __future__ import annotations

from typing import Any

import pytest

from service.schemas.answers import GenerationMetrics
from tests.support.api import Api
from tests.support.scripted_engine import CONTEXT, READY, WEIGHT_BYTES

PATH = "/generate"
HI = [{"role": "user", "content": "hi"}]


def test_an_answer_is_a_completion_with_metrics(api: Api) -> None:
    answer = api.post(PATH, {"prompt": "hi"}).json()
    completion = api.post("/v1/completions", {"prompt": "hi", "max_tokens": 100}).json()
    assert answer["choices"] == completion["choices"]
    assert answer["usage"] == completion["usage"]
    assert answer["object"] == "text_completion"
    assert answer["metrics"].keys() == GenerationMetrics.model_fields.keys()


def test_the_figures_follow_their_formulas(api: Api) -> None:
    answer = api.post(PATH, {"prompt": "hi"}).json()
    metrics, num_tokens = answer["metrics"], answer["usage"]["completion_tokens"]
    assert 0 < metrics["time_to_first_token_s"] <= metrics["total_time_s"]
    assert metrics["tokens_per_second"] == pytest.approx(num_tokens / metrics["total_time_s"])
    assert metrics["bandwidth_gb_s"] == pytest.approx(WEIGHT_BYTES * metrics["tokens_per_second"] / 1e9)
    # the engine said: one GB in two seconds of decoding
    assert metrics["decode_tokens_per_second"] == pytest.approx((num_tokens - 1) / 2)
    assert metrics["decode_bandwidth_gb_s"] == pytest.approx(0.5)
    assert metrics["bandwidth_utilization"] == pytest.approx(0.5e9 / READY.peak_bandwidth)
    assert (metrics["peak_bandwidth_gb_s"], metrics["peak_bandwidth_source"]) == (10.0, "measured")
    assert (metrics["device"], metrics["model"]) == ("cpu", "base")


def test_a_single_token_has_no_decode_figures(api: Api) -> None:
    metrics = api.post(PATH, {"prompt": "hi", "max_tokens": 1}).json()["metrics"]
    assert metrics["decode_tokens_per_second"] is None
    assert metrics["tokens_per_second"] > 0


def test_an_answer_that_a_stop_string_ended_has_the_engines_figures_as_well(api: Api) -> None:
    api.engine.stays_after = len(api.engine.answer) - 1
    metrics = api.post(PATH, {"prompt": "hi", "stop": "there"}).json()["metrics"]
    assert metrics["tokens_per_second"] > 0
    assert metrics["decode_tokens_per_second"] == pytest.approx(8 / 4)
    assert metrics["decode_bandwidth_gb_s"] == pytest.approx(0.25)


def test_an_engine_that_dies_behind_a_stop_string_takes_no_more_than_its_figures(own_api: Api) -> None:
    own_api.engine.stays_after = len(own_api.engine.answer) - 1
    own_api.engine.dies_at_abort = True
    answer = own_api.post(PATH, {"prompt": "hi", "stop": "there"}).json()
    assert answer["choices"][0]["text"] == "Hello "
    assert answer["metrics"]["tokens_per_second"] > 0
    assert answer["metrics"]["decode_tokens_per_second"] is None


def test_the_stream_ends_with_usage_and_metrics(api: Api) -> None:
    *chunks, last = api.events(PATH, {"messages": HI, "stream_options": {"include_usage": True}})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello there."
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(api.engine.answer) + 1
    assert last["metrics"].keys() == GenerationMetrics.model_fields.keys()


def test_a_prompt_is_raw_and_messages_are_a_chat(api: Api) -> None:
    api.post(PATH, {"prompt": "hi"})
    api.post(PATH, {"messages": HI})
    raw, chat = (api.services.codec.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
                 for request in api.engine.received)  # fmt: skip
    assert raw == "hi"
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_the_defaults_are_greedy_and_long_enough_for_an_answer(api: Api) -> None:
    api.post(PATH, {"prompt": "hi"})
    sampling = api.engine.received[0].sampling
    assert sampling.temperature == 0.0
    assert sampling.max_tokens == CONTEXT - len(api.engine.received[0].prompt_ids)  # less than 256


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [({}, "prompt", "neither is given"),
     ({"prompt": "a", "messages": HI}, "prompt", "both are given"),
     ({"prompt": {"a": 1}}, "prompt", "must be a text"),
     ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1 (got 0)"),
     ({"prompt": "a", "max_tokens": "8"}, "max_tokens", "valid integer (got '8')"),
     ({"prompt": "a", "temprature": 1}, "temprature", "did you mean temperature?"),
     ({"prompt": "a b " * 200}, "prompt", str(CONTEXT))],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field_and_what_is_allowed(
    api: Api, body: dict[str, Any], param: str, words: str
) -> None:
    answer = api.post(PATH, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert not api.engine.received
