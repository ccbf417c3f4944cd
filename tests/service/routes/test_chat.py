from __future__ import annotations

import inspect
from typing import Any

import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from service.schemas.requests import ChatRequest, CompletionRequest
from tests.support.api import Api
from tests.support.scripted_engine import CONTEXT

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
ANSWER = "<|im_start|>assistant\n"


def prompt_text(api: Api) -> str:
    return api.services.codec.tokenizer.decode(api.engine.received[-1].prompt_ids, skip_special_tokens=False)


def test_a_chat_completion_has_everything_that_openai_has(api: Api) -> None:
    answer = api.post(PATH, {"model": "latest", "messages": HI}).json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"], answer["system_fingerprint"]) == (
        "chat.completion",
        "base",
        "ts-hash-of-base",
    )
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len(api.engine.received[0].prompt_ids)
    assert answer["usage"]["completion_tokens"] == len(api.engine.answer) + 1


def test_the_stream_has_the_role_once_then_text_then_an_empty_delta_with_the_reason(api: Api) -> None:
    api.says("你好 🙂")
    choices = [chunk["choices"][0] for chunk in api.events(PATH, {"messages": HI})]
    first, *texts, last = choices
    assert first == {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert "".join(choice["delta"]["content"] for choice in texts) == "你好 🙂"
    assert all(choice["delta"].keys() == {"content"} and choice["finish_reason"] is None for choice in texts)
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")


def test_an_empty_answer_still_has_its_role_and_reason(api: Api) -> None:
    api.says("")
    deltas = [chunk["choices"][0]["delta"] for chunk in api.events(PATH, {"messages": HI})]
    assert deltas == [{"role": "assistant", "content": ""}, {}]
    assert api.post(PATH, {"messages": HI}).json()["choices"][0]["message"]["content"] == ""


def test_messages_go_through_the_models_template(api: Api) -> None:
    conversation = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "four", "name": "ann"},
    ]
    api.post(PATH, {"messages": conversation})
    assert prompt_text(api) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>user\nfour<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_limit_the_answer_may_fill_the_context(api: Api) -> None:
    api.post(PATH, {"messages": HI})
    request = api.engine.received[0]
    assert request.sampling.max_tokens == CONTEXT - len(request.prompt_ids)


@pytest.mark.parametrize("limit", [{"max_tokens": 3}, {"max_completion_tokens": 3}])
def test_both_names_of_the_limit_work(api: Api, limit: dict[str, int]) -> None:
    answer = api.post(PATH, {"messages": HI, **limit}).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [({}, "messages", "required"),
     ({"messages": []}, "messages", "at least 1"),
     ({"messages": "hi"}, "messages", "valid list"),
     ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
     ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role", "'tool' (got 'robot')"),
     ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "required"),
     ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "must be a text"),
     ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
      "messages.0.content", "only parts"),
     ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages.0.weight", "unknown field"),
     ({"messages": HI, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
     ({"messages": HI, "max_completion_tokens": "9"}, "max_completion_tokens", "valid integer"),
     ({"messages": HI, "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "one of the two"),
     ({"messages": HI, "max_tokens": CONTEXT}, "max_tokens", f"context of {CONTEXT} tokens"),
     ({"messages": [{"role": "user", "content": "word " * CONTEXT}]}, "messages", str(CONTEXT)),
     ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages", str(CONTEXT))],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field_and_what_is_allowed(
    api: Api, body: dict[str, Any], param: str, words: str
) -> None:
    answer = api.post(PATH, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert not api.engine.received


@pytest.mark.parametrize(
    ("method", "body"), [(ChatCompletions.create, ChatRequest), (Completions.create, CompletionRequest)]
)
def test_every_field_that_the_sdk_can_send_is_known(method: Any, body: type[ChatRequest]) -> None:
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert inspect.signature(method).parameters.keys() - transport <= body.model_fields.keys()


@pytest.mark.parametrize(("begin", "end"), [(None, ANSWER), (True, ANSWER), (False, "hi<|im_end|>\n")])
def test_the_prompt_ends_where_the_answer_begins_unless_told_otherwise(api: Api, begin: bool | None, end: str) -> None:
    api.post(PATH, {"messages": HI, "add_generation_prompt": begin})
    assert prompt_text(api).endswith(end)


def test_the_answer_goes_on_with_an_open_message(api: Api) -> None:
    talk = [*HI, {"role": "assistant", "content": "Once upon"}]
    for begin in (None, False):
        api.post(PATH, {"messages": talk, "continue_final_message": True, "add_generation_prompt": begin})
        assert prompt_text(api).endswith(f"{ANSWER}Once upon")


def test_logprobs_have_each_tokens_text_bytes_and_alternatives(api: Api) -> None:
    api.says("a\U0001f6f8")
    body = {"messages": HI, "logprobs": True, "top_logprobs": 1}
    content = api.post(PATH, body).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == "a\U0001f6f8"
    assert content[-1]["token"] == "<|im_end|>"
    assert [entry["logprob"] for entry in content] == [-1.0] * len(content)
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in content] == [[-0.5]] * len(content)
    chunks = [chunk["choices"][0]["logprobs"] for chunk in api.events(PATH, body)]
    assert [entry for logprobs in chunks if logprobs is not None for entry in logprobs["content"]] == content


def test_without_alternatives_logprobs_are_of_the_tokens_alone(api: Api) -> None:
    content = api.post(PATH, {"messages": HI, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert {tuple(entry["top_logprobs"]) for entry in content} == {()}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
     ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
     ({"logprobs": 5}, "logprobs", "valid boolean"),
     ({"functions": [{"name": "f"}]}, "functions", "send tools"),
     ({"function_call": "f"}, "function_call", "send tool_choice"),
     ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
     ({"web_search_options": {}}, "web_search_options", "not supported"),
     ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "one of the two"),
     ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
     ({"best_of": 2}, "best_of", "unknown field"),
     ({"echo": True}, "echo", "other values than null or false")],
)  # fmt: skip
def test_what_a_chat_cannot_do_is_told(api: Api, body: dict[str, Any], param: str, words: str) -> None:
    answer = api.post(PATH, {"messages": HI, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert not api.engine.received
