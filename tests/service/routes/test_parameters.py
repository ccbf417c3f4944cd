"""Every parameter that an engine knows, on every endpoint that generates: what reaches it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from service.engine.messages import SamplingParams
from service.schemas.fields import MAX_BAD_WORDS, MAX_BIASES, MAX_STOP_TOKENS
from tests.support.api import Api

HI = [{"role": "user", "content": "hi"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": HI},
    "/generate": {"messages": HI},
}
VOCAB_SIZE = 4096  # of the model without weights


@pytest.fixture(params=ENDPOINTS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sampling(api: Api, path: str, **options: Any) -> SamplingParams:
    answer = api.post(path, {**ENDPOINTS[path], **options})
    assert answer.status_code == 200, answer.text
    return api.engine.received[-1].sampling


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.3},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": 9, "min_tokens": 4},
        {"ignore_eos": True, "max_tokens": 3},
    ],
)
def test_a_number_reaches_the_engine_as_it_is(api: Api, path: str, options: dict[str, Any]) -> None:
    made = sampling(api, path, **options)
    assert {name: getattr(made, name) for name in options} == options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 0.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("repetition_penalty", 1.0),
        ("logit_bias", {}), ("bad_words", ()), ("allowed_token_ids", None), ("min_tokens", 0), ("seed", None),
        ("ignore_eos", False), ("top_k", 0), ("top_p", 1.0), ("prompt_logprobs", None),
    ],
)  # fmt: skip
def test_null_is_the_default(api: Api, path: str, field: str, value: Any) -> None:
    assert getattr(sampling(api, path, **{field: None}), field) == value


@pytest.mark.parametrize(
    "field",
    ["stop", "n", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids",
     "stream", "stream_options", "response_format", "structured_outputs", "guided_json", "model"],
)  # fmt: skip
def test_null_changes_nothing(api: Api, path: str, field: str) -> None:
    assert sampling(api, path, **{field: None}) == sampling(api, path)


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("use_beam_search", False, True),
        ("length_penalty", 1.0, 1.5),
        ("priority", 0, 1),
        ("truncate_prompt_tokens", None, 5),
        ("spaces_between_special_tokens", True, False),
        ("detokenize", True, False),
        ("return_tokens_as_token_ids", False, True),
    ],
)
def test_what_vllms_clients_send_by_default_is_taken_and_anything_else_refused(
    api: Api, path: str, field: str, neutral: Any, other: Any
) -> None:
    assert sampling(api, path, **{field: neutral}) == sampling(api, path)
    refused = api.post(path, {**ENDPOINTS[path], field: other})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


def test_a_bias_goes_by_token_ids(api: Api, path: str) -> None:
    assert sampling(api, path, logit_bias={"5": -100, "17": 2.5}).logit_bias == {5: -100.0, 17: 2.5}


def test_token_ids_reach_the_engine_once_each(api: Api, path: str) -> None:
    made = sampling(api, path, allowed_token_ids=[7, 5, 7], stop_token_ids=[9, 9])
    assert made.allowed_token_ids == (7, 5)
    assert made.stop_token_ids == (*api.services.codec.tokenizer.eos_token_ids, 9)


def test_ones_own_stop_tokens_hold_where_the_models_end_is_ignored(api: Api, path: str) -> None:
    assert sampling(api, path, stop_token_ids=[9], ignore_eos=True).stop_token_ids == (9,)


def test_bad_words_are_found_at_the_start_and_behind_a_space(api: Api, path: str) -> None:
    encode = api.services.codec.tokenizer.encode
    found = sampling(api, path, bad_words=["fox", "fox"]).bad_words
    assert found == (tuple(encode("fox")), tuple(encode(" fox")))
    assert len(found[1]) == 1, "the tokenizer has no token for the word behind a space, so this shows nothing"


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [({"min_p": 1.5}, "min_p", "less than or equal to 1"),
     ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
     ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
     ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
     ({"logit_bias": {"a": 1}}, "logit_bias", "must be token ids"),
     ({"logit_bias": {"-5": 1}}, "logit_bias", "must be token ids"),
     ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
     ({"logit_bias": {"5": True}}, "logit_bias", "from -100 to 100"),
     ({"logit_bias": [5]}, "logit_bias", "must be an object"),
     ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", f"{VOCAB_SIZE} is not a token"),
     ({"logit_bias": dict.fromkeys(map(str, range(MAX_BIASES + 1)), 1)}, "logit_bias", f"at most {MAX_BIASES}"),
     ({"seed": 2**63}, "seed", "less than"),
     ({"seed": 1.5}, "seed", "integer"),
     ({"bad_words": [""]}, "bad_words.0", "at least 1 character"),
     ({"bad_words": ["a" * 257]}, "bad_words.0", "at most 256 characters"),
     ({"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, "bad_words", f"at most {MAX_BAD_WORDS}"),
     ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1 item"),
     ({"allowed_token_ids": [-1]}, "allowed_token_ids.0", "greater than or equal to 0"),
     ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids", f"{VOCAB_SIZE} is not a token"),
     ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", f"{VOCAB_SIZE} is not a token"),
     ({"stop_token_ids": [1] * (MAX_STOP_TOKENS + 1)}, "stop_token_ids", f"at most {MAX_STOP_TOKENS}"),
     ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "6 are more than the 5"),
     ({"min_tokens": 100_000}, "min_tokens", "100000 are more than"),
     ({"n": 0}, "n", "greater than or equal to 1"),
     ({"n": 129}, "n", "less than or equal to 128"),
     ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
     ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
     ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "do not come in a stream"),
     ({"temperature": "hot"}, "temperature", "valid number")],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field_and_what_is_allowed(
    api: Api, path: str, options: dict[str, Any], param: str, words: str
) -> None:
    answer = api.post(path, {**ENDPOINTS[path], **options})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert not api.engine.received


def choices(api: Api, path: str, *, stream: bool, **options: Any) -> list[dict[str, Any]]:
    """Each with its text in `text`, put together where it was streamed."""
    if not stream:
        found: list[dict[str, Any]] = api.post(path, {**ENDPOINTS[path], **options}).json()["choices"]
        return [{**choice, "text": choice.get("text", choice.get("message", {}).get("content"))} for choice in found]
    whole: dict[int, dict[str, Any]] = {}
    for chunk in api.events(path, {**ENDPOINTS[path], **options}):
        for choice in chunk["choices"]:
            before = whole.get(choice["index"], {"text": "", "token_ids": []})
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            ids = [*before["token_ids"], *choice.get("token_ids", ())]
            whole[choice["index"]] = before | choice | {"text": before["text"] + text, "token_ids": ids}
    return [whole[index] for index in sorted(whole)]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_are_told_apart_by_their_index(api: Api, path: str, stream: bool) -> None:
    found = choices(api, path, stream=stream, n=3, temperature=0)
    assert [choice["index"] for choice in found] == [0, 1, 2]
    assert {choice["text"] for choice in found} == {"Hello there."}
    assert {choice["finish_reason"] for choice in found} == {"stop"}
    assert [request.sampling.choice for request in api.engine.received] == [0, 1, 2]


def test_a_prompt_counts_once_and_each_answer_counts(api: Api, path: str) -> None:
    usage = api.post(path, {**ENDPOINTS[path], "n": 3}).json()["usage"]
    num_answer = len(api.engine.answer) + 1
    assert usage["prompt_tokens"] == len(api.engine.received[0].prompt_ids)
    assert usage["completion_tokens"] == 3 * num_answer
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_usage_tells_the_cached_tokens_of_a_prompt_once(own_api: Api, path: str) -> None:
    own_api.engine.num_cached_tokens = 1
    usage = own_api.post(path, {**ENDPOINTS[path], "n": 2}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_shown_on_request(api: Api, path: str, stream: bool) -> None:
    (choice,) = choices(api, path, stream=stream, stop=["the"], include_stop_str_in_output=True)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hello the", "stop", "the")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_ends_the_answer_and_is_its_stop_reason(api: Api, path: str, stream: bool) -> None:
    stop = api.engine.answer[-1]
    (choice,) = choices(api, path, stream=stream, stop_token_ids=[stop])
    assert choice["text"] == api.services.codec.tokenizer.decode(api.engine.answer[:-1])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_the_models_own_end_is_no_stop_reason(api: Api, path: str) -> None:
    (choice,) = choices(api, path, stream=False)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("skip", "expected"), [(True, "ab"), (None, "ab"), (False, "a<|im_start|>b")])
def test_special_tokens_are_shown_on_request(
    api: Api, path: str, stream: bool, skip: bool | None, expected: str
) -> None:
    api.says("a<|im_start|>b")
    (choice,) = choices(api, path, stream=stream, skip_special_tokens=skip)
    assert choice["text"] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_returned_on_request(api: Api, path: str, stream: bool) -> None:
    (choice,) = choices(api, path, stream=stream, return_token_ids=True)
    assert choice["prompt_token_ids"] == api.engine.received[-1].prompt_ids
    assert choice["token_ids"] == [*api.engine.answer, api.engine.eos]


def test_prompt_logprobs_come_in_vllms_form(api: Api, path: str) -> None:
    (choice,) = choices(api, path, stream=False, prompt_logprobs=1)
    ids = api.engine.received[-1].prompt_ids
    text = api.services.codec.token_bytes.text
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert rest == [
        {
            str(token_id): {"logprob": -1.0, "rank": 2, "decoded_token": text(token_id)},
            str(token_id - 1): {"logprob": -0.5, "rank": 1, "decoded_token": text(token_id - 1)},
        }
        for token_id in ids[1:]
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_not_asked_for_is_not_there(api: Api, path: str, stream: bool) -> None:
    body = {**ENDPOINTS[path], "stream": stream}
    for field in ("token_ids", "prompt_token_ids", "prompt_logprobs", "tool_calls"):
        assert f'"{field}"' not in api.post(path, body).text
