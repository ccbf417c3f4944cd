from __future__ import annotations

from typing import Any

import pytest

from tests.support.api import Api
from tests.support.scripted_engine import CONTEXT

PATH = "/v1/completions"


def error(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    answer = api.post(PATH, body)
    assert answer.status_code == 400, answer.text
    assert not api.engine.received, "a refused request reached the engine"
    problem: dict[str, Any] = answer.json()["error"]
    assert problem.keys() == {"message", "type", "param", "code"}
    assert problem["type"] == "invalid_request_error"
    return problem


def test_a_completion_has_everything_that_openai_has(api: Api) -> None:
    answer = api.post(PATH, {"model": "base", "prompt": "Say hello", "max_tokens": 50}).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert (answer["model"], answer["system_fingerprint"]) == ("base", "ts-hash-of-base")
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0, "text": "Hello there.", "logprobs": None, "finish_reason": "stop", "stop_reason": None
    }  # fmt: skip
    num_prompt = len(api.engine.received[0].prompt_ids)
    num_answer = len(api.engine.answer) + 1  # the end-of-sequence token was generated, too
    assert answer["usage"] == {
        "prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip


@pytest.mark.parametrize("prompt", ["one", ["one", "two"], [4, 5, 6], [[4, 5], [6]]])
def test_every_form_of_prompt_gives_a_choice_each(api: Api, prompt: Any) -> None:
    answer = api.post(PATH, {"prompt": prompt, "max_tokens": 50}).json()
    expected = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice["index"] for choice in answer["choices"]] == list(range(expected))
    assert {choice["text"] for choice in answer["choices"]} == {"Hello there."}
    assert answer["usage"]["prompt_tokens"] == sum(len(request.prompt_ids) for request in api.engine.received)


def test_token_ids_are_used_as_they_are(api: Api) -> None:
    api.post(PATH, {"prompt": [7, 8, 9]})
    assert api.engine.received[0].prompt_ids == [7, 8, 9]


def test_the_stream_is_the_whole_answer_in_pieces(api: Api) -> None:
    api.says("你好 🙂, naïve world")
    whole = api.post(PATH, {"prompt": "hi", "max_tokens": 100}).json()
    chunks = api.events(PATH, {"prompt": "hi", "max_tokens": 100})
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"] == "你好 🙂, naïve world"
    assert not any("�" in choice["text"] for choice in choices)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_the_last_text_and_the_finish_reason_come_together(api: Api) -> None:
    last = api.events(PATH, {"prompt": "hi", "max_tokens": 2})[-1]["choices"][0]
    assert last["text"]
    assert last["finish_reason"] == "length"


def test_usage_in_a_stream_comes_once_and_at_the_end(api: Api) -> None:
    body = {"prompt": "hi", "max_tokens": 100}
    whole = api.post(PATH, body).json()
    *chunks, last = api.events(PATH, {**body, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_continuous_usage_grows_with_every_chunk(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = api.events(PATH, {"prompt": "hi", "max_tokens": 100, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == last["usage"]["completion_tokens"]


def test_the_choices_of_a_stream_are_told_apart_by_their_index(api: Api) -> None:
    chunks = api.events(PATH, {"prompt": ["one", "two", "three"], "max_tokens": 100})
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == "Hello there."
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it_and_stops_the_engine(api: Api, stream: bool) -> None:
    api.says("First line.\nUSER: and more than that")
    api.engine.stays_after = len(api.engine.answer) - 1
    body = {"prompt": "hi", "max_tokens": 100, "stop": ["nothing", "\nUSER:"]}
    if stream:
        choices = [chunk["choices"][0] for chunk in api.events(PATH, body)]
        text, last = "".join(choice["text"] for choice in choices), choices[-1]
    else:
        last = api.post(PATH, body).json()["choices"][0]
        text = last["text"]
    assert text == "First line."
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "\nUSER:")
    assert not api.engine.running


def test_sampling_options_reach_the_engine(api: Api) -> None:
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": -3, "ignore_eos": True, "max_tokens": 3}
    api.post(PATH, {"prompt": "hi", **options})
    sampling = api.engine.received[0].sampling
    assert {name: getattr(sampling, name) for name in options} == options


@pytest.mark.parametrize(("ignore_eos", "expected"), [(None, True), (False, True), (True, False)])
def test_the_tokenizers_end_tokens_end_an_answer_whatever_the_models_config_says(
    api: Api, ignore_eos: bool | None, expected: bool
) -> None:
    api.post(PATH, {"prompt": "hi", "ignore_eos": ignore_eos})
    ends = api.services.codec.tokenizer.eos_token_ids
    assert ends
    assert api.engine.received[0].sampling.stop_token_ids == (ends if expected else ())


def test_without_options_the_defaults_are_those_of_openai(api: Api) -> None:
    api.post(PATH, {"prompt": "hi", "max_tokens": None, "temperature": None, "stop": None, "top_p": None, "seed": None})
    sampling = api.engine.received[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1e-7}, {"top_p": 0}])
def test_what_leaves_one_token_is_greedy(api: Api, options: dict[str, float]) -> None:
    api.post(PATH, {"prompt": "hi", **options})
    assert (api.engine.received[0].sampling.temperature, api.engine.received[0].sampling.top_p) == (0.0, 1.0)


def test_fields_that_change_nothing_are_accepted(api: Api) -> None:
    neutral = {
        "user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "n": 1, "best_of": 1, "echo": False,
        "logprobs": None, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "min_p": 0,
        "repetition_penalty": 1.0, "top_k": -1, "stream_options": None,
    }  # fmt: skip
    assert api.post(PATH, {"prompt": "hi", **neutral}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [({}, "prompt", "required"),
     ({"prompt": None}, "prompt", "must be"),
     ({"prompt": ""}, "prompt", "empty"),
     ({"prompt": []}, "prompt", "not empty"),
     ({"prompt": [[]]}, "prompt", "none empty"),
     ({"prompt": [1, "a"]}, "prompt", "all its items"),
     ({"prompt": [1, True]}, "prompt", "all its items"),
     ({"prompt": [-1]}, "prompt", "0 or more"),
     ({"prompt": [4096]}, "prompt", "4096 is not a token"),
     ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
     ({"prompt": "\ud800"}, "prompt", "not valid Unicode"),
     ({"prompt": "a b " * 5000}, "prompt", str(CONTEXT)),
     ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo: true"),
     ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0 (got -1)"),
     ({"prompt": "a", "max_tokens": "10"}, "max_tokens", "valid integer (got '10')"),
     ({"prompt": "a", "max_tokens": 2.5}, "max_tokens", "integer"),
     ({"prompt": "a", "max_tokens": True}, "max_tokens", "integer"),
     ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
     ({"prompt": "a", "temperature": 2.1}, "temperature", "less than or equal to 2"),
     ({"prompt": "a", "top_p": 1.5}, "top_p", "less than or equal to 1"),
     ({"prompt": "a", "top_k": -2}, "top_k", "greater than or equal to -1"),
     ({"prompt": "a", "seed": 2**63}, "seed", "less than"),
     ({"prompt": "a", "stop": ["a"] * 17}, "stop", "at most 16"),
     ({"prompt": "a", "stop": ""}, "stop", "1 to 1024 characters"),
     ({"prompt": "a", "stop": ["a", 3]}, "stop", "a list of such strings"),
     ({"prompt": "a", "stream": "yes"}, "stream", "valid boolean"),
     ({"prompt": "a", "stream_options": {"include_usage": None}}, "stream_options", "stream: true"),
     ({"prompt": "a", "max_token": 5}, "max_token", "did you mean max_tokens?"),
     ({"prompt": "a", "stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "unknown field")],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field_and_what_is_allowed(
    api: Api, body: dict[str, Any], param: str, words: str
) -> None:
    if body.get("prompt") == "\ud800":
        answer = api.post(PATH, content=b'{"prompt": "\\ud800"}', headers={"content-type": "application/json"})
        assert answer.status_code == 400
        problem = answer.json()["error"]
    else:
        problem = error(api, body)
    assert problem["param"] == param
    assert words in problem["message"]


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(api: Api) -> None:
    problem = error(api, {"prompt": [5] * CONTEXT})
    assert (problem["param"], problem["code"]) == ("prompt", "context_length_exceeded")
    assert problem["message"].count(str(CONTEXT)) == 2
    problem = error(api, {"prompt": [5] * 100, "max_tokens": 29, "stream": True})
    assert (problem["param"], problem["code"]) == ("max_tokens", "context_length_exceeded")
    assert all(number in problem["message"] for number in ("100", "29", str(CONTEXT)))


def test_a_prompt_that_leaves_room_for_one_token_is_answered(api: Api) -> None:
    answer = api.post(PATH, {"prompt": [5] * (CONTEXT - 1)}).json()
    assert answer["usage"]["completion_tokens"] == 1
    assert api.post(PATH, {"prompt": [5] * (CONTEXT - 1), "max_tokens": 1}).status_code == 200


def test_an_unknown_model_is_a_404(api: Api) -> None:
    answer = api.post(PATH, {"model": "gpt-9", "prompt": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "gpt-9" in answer.json()["error"]["message"]
