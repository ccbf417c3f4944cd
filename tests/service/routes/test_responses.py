from __future__ import annotations

import inspect
from typing import Any

import pytest
from openai.resources.responses import Responses
from openai.types.responses import Response

from service.schemas.response_answers import ResponseAnswer
from service.schemas.responses import ResponseRequest
from tests.support.api import Api
from tests.support.responses import PATH, WEATHER, events, prompt_text
from tests.support.scripted_engine import CONTEXT

NOT_IN_THE_SDK = {"extra_headers", "extra_query", "extra_body", "timeout", "self"}
NOT_HERE = {"access_programs", "background_options", "image"}
"""What only OpenAI's own models have."""
SOME = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "a"}]}


def refused(api: Api, **body: Any) -> dict[str, Any]:
    answer = api.post(PATH, {"input": "hi", **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_a_response_has_everything_that_openai_has(api: Api) -> None:
    api.engine.num_cached_tokens = 2
    answer = api.post(PATH, {"model": "latest", "input": "hi", "metadata": {"a": "b"}, "user": "me"}).json()
    parsed = Response.model_validate(answer)
    assert parsed.output_text == "Hello there."
    assert parsed.id.startswith("resp_")
    assert (parsed.model, parsed.status, parsed.error, parsed.incomplete_details) == ("base", "completed", None, None)
    assert (parsed.metadata, parsed.user, parsed.temperature, parsed.top_p) == ({"a": "b"}, "me", 1.0, 1.0)
    assert (parsed.tools, parsed.tool_choice, parsed.parallel_tool_calls) == ([], "auto", True)
    assert answer["system_fingerprint"] == "ts-hash-of-base"
    assert answer["store"] is False
    assert answer["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    num_input, num_output = len(api.engine.received[0].prompt_ids), len(api.engine.answer) + 1
    assert answer["usage"] == {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }


def test_every_key_of_the_sdks_response_is_there_unless_only_openai_has_it() -> None:
    theirs, ours = set(Response.model_fields), set(ResponseAnswer.model_fields)
    assert theirs - ours == {
        *NOT_HERE - {"background_options"},
        *("conversation", "prompt", "moderation", "input_transformations", "tool_usage"),
        *("prompt_cache_diagnostics", "prompt_cache_options", "prompt_cache_retention"),
    }


def test_the_stream_tells_the_whole_response(api: Api) -> None:
    api.says("你好 🙂, and a bit more")
    body = {"input": "hi", "temperature": 0}
    whole = api.post(PATH, body).json()
    told = events(api, body)
    deltas = [event["delta"] for event in told if event["type"] == "response.output_text.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == "你好 🙂, and a bit more"
    assert told[-1]["type"] == "response.completed"
    assert told[-1]["response"].keys() == whole.keys()
    assert told[-1]["response"]["usage"] == whole["usage"]
    (message,) = told[-1]["response"]["output"]
    assert message["content"] == whole["output"][0]["content"]
    assert {event["response"]["id"] for event in told if "response" in event} == {told[0]["response"]["id"]}


def test_items_go_through_the_models_template(api: Api) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"role": "assistant", "content": "hello"},
        {"role": "developer", "content": "Shout."},
        {"role": "user", "content": "again"},
    ]
    api.post(PATH, {"instructions": "Be brief.", "input": items})
    assert (
        prompt_text(api)
        == "".join(
            f"<|im_start|>{role}\n{content}<|im_end|>\n"
            for role, content in [
                ("system", "Be brief."),
                ("user", "hi"),
                ("assistant", "hello"),
                ("system", "Shout."),
                ("user", "again"),
            ]
        )
        + "<|im_start|>assistant\n"
    )


def test_options_reach_the_engine(api: Api) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 5, "presence_penalty": 0.2}
    api.post(PATH, {"input": "hi", "max_output_tokens": 3, **options})
    sampling = api.engine.received[-1].sampling
    assert {name: getattr(sampling, name) for name in options} == options
    assert sampling.max_tokens == 3


def test_without_a_limit_the_answer_may_fill_the_context(api: Api) -> None:
    api.post(PATH, {"input": "hi"})
    request = api.engine.received[-1]
    assert request.sampling.max_tokens == CONTEXT - len(request.prompt_ids)


def test_a_stop_string_ends_the_answer(api: Api) -> None:
    answer = api.post(PATH, {"input": "hi", "stop": [" there"]}).json()
    assert (answer["status"], answer["output"][0]["content"][0]["text"]) == ("completed", "Hello")


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_makes_the_response_incomplete(api: Api, stream: bool) -> None:
    body = {"input": "hi", "max_output_tokens": 2}
    answer = events(api, body)[-1]["response"] if stream else api.post(PATH, body).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["usage"]["output_tokens"] == 2


@pytest.mark.parametrize(
    "asked", [{"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"top_logprobs": 2}]
)
def test_log_probabilities_stand_beside_the_text(api: Api, asked: dict[str, Any]) -> None:
    body = {"input": "hi", **asked}
    whole = api.post(PATH, body).json()
    logprobs = whole["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == whole["usage"]["output_tokens"]
    assert "".join(bytes(entry["bytes"]).decode() for entry in logprobs[:-1]) == "Hello there."
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -1.0 for entry in logprobs)
    told = events(api, body)
    assert [e for event in told if event["type"].endswith("text.delta") for e in event["logprobs"]] == logprobs
    assert told[-1]["response"]["output"][0]["content"][0]["logprobs"] == logprobs


def test_log_probabilities_are_not_there_unless_asked_for(api: Api) -> None:
    answer = api.post(PATH, {"input": "hi", "include": ["reasoning.encrypted_content"]}).json()
    assert answer["output"][0]["content"][0]["logprobs"] == []
    assert api.engine.received[-1].sampling.logprobs is None


def test_an_error_in_mid_stream_is_an_event(own_api: Api) -> None:
    own_api.engine.dies_after = 2
    told = events(own_api, {"input": "hi"})
    assert [event["type"] for event in told[-2:]] == ["error", "response.failed"]
    assert told[-2]["error"].keys() == {"message", "type", "param", "code"}
    assert told[-2]["message"] == told[-2]["error"]["message"]
    assert told[-1]["response"]["status"] == "failed"


def test_an_error_before_the_stream_is_a_plain_answer(own_api: Api) -> None:
    own_api.engine.dies_after = 0
    answer = own_api.post(PATH, {"input": "hi", "stream": True})
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "unavailable_error"


def test_an_unknown_model_is_not_found(api: Api) -> None:
    answer = api.post(PATH, {"input": "hi", "model": "gpt-9", "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path"), [("get", ""), ("delete", ""), ("post", "/cancel"), ("get", "/input_items")]
)
def test_nothing_is_stored(api: Api, method: str, path: str) -> None:
    answer = api.run(api.async_client.request(method, f"{PATH}/resp_1{path}"))
    assert answer.status_code == 404
    assert "nothing is stored" in answer.json()["error"]["message"]


@pytest.mark.parametrize("store", [True, False, None])
def test_any_store_is_taken_and_answered_with_the_truth(api: Api, store: bool | None) -> None:
    answer = api.post(PATH, {"input": "hi", "store": store})
    assert answer.status_code == 200
    assert answer.json()["store"] is False


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"input": None}, "input", "a text, or a list of items"),
        ({"input": []}, "input", "not empty"),
        ({"input": 5}, "input", "a text, or a list of items"),
        ({"input": ["hi"]}, "input.0", "an object of type message"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'user'"),
        ({"input": [{"role": "user"}]}, "input.0.content", "required"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input.0.colour", "unknown field"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content", "no images"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "nothing is stored"),
        ({"input": [{"type": "reasoning", "id": "x", "summary": []}]}, "input.0", "reasoning"),
        ({"input": [{"type": "web_search_call"}]}, "input.0", "message, function_call, function_call_output"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
        ({"prompt": {"id": "x"}}, "prompt", "send input"),
        ({"background": True}, "background", "waits"),
        ({"truncation": "auto"}, "truncation", "shorten input"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "none"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "needs a schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "odd"}}}},
            "text.format.schema",
            "odd",
        ),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            "text.format says already",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "none are built in"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name", "there twice"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "b"}}, "tool_choice", "'b'"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name", "pattern"),
        ({"tool_choice": "sometimes"}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "allowed_tools"),
        ({"tools": [WEATHER], "tool_choice": SOME}, "tool_choice", "none of the tools"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": CONTEXT}, "max_output_tokens", "lower max_output_tokens"),
        ({"input": "x " * 2 * CONTEXT}, "input", f"may have {CONTEXT}"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"include": ["everything"]}, "include.0", "message.output_text.logprobs"),
        ({"metadata": {"a": 1}}, "metadata", "'a': keys have"),
        ({"metadata": dict.fromkeys(map(str, range(17)), "x")}, "metadata", "at most 16"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream: true"),
        ({"messages": []}, "messages", "unknown field"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"n": 2}, "n", "unknown field"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(api: Api, body: dict[str, Any], param: str, told: str) -> None:
    error = refused(api, **body)
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert told in error["message"]
    assert not api.engine.received


def test_null_is_the_default_of_every_field(api: Api) -> None:
    fields = {name: None for name in ResponseRequest.model_fields if name != "input"}
    answer = api.post(PATH, {"input": "hi", **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["content"][0]["text"] == "Hello there."


def test_every_parameter_of_the_sdk_is_known() -> None:
    parameters = set(inspect.signature(Responses.create).parameters) - NOT_IN_THE_SDK - NOT_HERE
    assert parameters - set(ResponseRequest.model_fields) == set()


@pytest.mark.parametrize(
    "form", [{"type": "json_object"}, {"type": "json_schema", "name": "x", "schema": WEATHER["parameters"]}]
)
def test_a_format_constrains_the_answer_and_is_told(api: Api, form: dict[str, Any]) -> None:
    answer = api.post(PATH, {"input": "hi", "text": {"format": form}}).json()
    assert answer["text"] == {"format": form, "verbosity": "medium"}
    assert api.engine.received[-1].sampling.grammar is not None
