"""`logprobs` and `echo` of /v1/completions, by which lm-eval measures a model."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.api import Api
from tests.support.scripted_engine import CONTEXT

PATH = "/v1/completions"
ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def choice(api: Api, **body: Any) -> dict[str, Any]:
    answer = api.post(PATH, {"max_tokens": 50, **body})
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["choices"]
    return dict(found)


def streamed(api: Api, **body: Any) -> dict[str, Any]:
    """The chunks put together to one choice."""
    chunks = [chunk["choices"][0] for chunk in api.events(PATH, {"max_tokens": 50, **body})]
    logprobs = {name: [item for chunk in chunks for item in (chunk["logprobs"] or {name: []})[name]] for name in ARRAYS}
    return {"text": "".join(chunk["text"] for chunk in chunks), "logprobs": logprobs}


def test_each_token_has_its_text_value_alternatives_and_place(api: Api) -> None:
    found = choice(api, prompt="hi", logprobs=1)
    ids = [*api.engine.answer, api.engine.eos]
    text_of = api.services.codec.token_bytes.text
    assert found["logprobs"]["tokens"] == [text_of(token_id) for token_id in ids]
    assert found["logprobs"]["token_logprobs"] == [-1.0] * len(ids)
    assert found["logprobs"]["top_logprobs"] == [
        {text_of(token_id - 1): -0.5, text_of(token_id): -1.0} for token_id in ids
    ]
    places = found["logprobs"]["text_offset"]
    for token, place, end in zip(found["logprobs"]["tokens"], places, [*places[1:], None], strict=True):
        assert found["text"][place:end] == token or token == "<|im_end|>"


def test_zero_alternatives_leave_the_chosen_token(api: Api) -> None:
    found = choice(api, prompt="hi", logprobs=0)["logprobs"]
    assert found["top_logprobs"] == [{token: -1.0} for token in found["tokens"]]


def test_tokens_with_one_text_share_the_larger_value(api: Api) -> None:
    token_bytes = api.services.codec.token_bytes
    halves = [token_id for token_id in range(300) if token_bytes.text(token_id) == "�"]
    second = next(token_id for token_id in halves if token_id - 1 in halves)
    api.engine.answer = (second,)
    found = choice(api, prompt="hi", logprobs=1, max_tokens=1)["logprobs"]
    assert found["top_logprobs"] == [{"�": -0.5}]


@pytest.mark.parametrize("text", ["Hello there.", "你好 \U0001f6f8, naïve"])
@pytest.mark.parametrize("prompt", ["Say hello", [5, 6, 7], "\U0001f6f8!"])
@pytest.mark.parametrize("echo", [False, True])
def test_the_stream_is_the_whole_answer_in_pieces(api: Api, text: str, prompt: Any, echo: bool) -> None:
    api.says(text)
    whole = choice(api, prompt=prompt, logprobs=2, echo=echo)
    pieces = streamed(api, prompt=prompt, logprobs=2, echo=echo)
    assert pieces == {name: whole[name] for name in pieces}
    assert len({len(whole["logprobs"][name]) for name in ARRAYS}) == 1


def test_a_character_of_several_tokens_has_one_place(api: Api) -> None:
    api.says("a\U0001f6f8b")
    found = choice(api, prompt="hi", logprobs=0)
    assert found["text"] == "a\U0001f6f8b"
    assert found["logprobs"]["text_offset"] == [0, 1, 1, 1, 2, 3]


def test_echo_puts_the_prompt_before_the_answer(api: Api) -> None:
    assert choice(api, prompt="Say it: ", echo=True)["text"] == "Say it: Hello there."
    ids = api.services.codec.tokenizer.encode("<|im_start|>Say it")
    assert choice(api, prompt=ids, echo=True)["text"] == "<|im_start|>Say itHello there."


@pytest.mark.parametrize("says", ["Hello", ""])
def test_echo_gives_an_entry_for_each_token_of_the_prompt_and_the_one_behind_it(api: Api, says: str) -> None:
    api.says(says)  # nothing is the end of the answer at once
    bodies = {"prompt": [[5, 6, 7, 8], [9]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1}
    for found, num_prompt in zip(api.post(PATH, bodies).json()["choices"], (4, 1), strict=True):
        assert {len(found["logprobs"][name]) for name in ARRAYS} == {num_prompt + 1}
        assert found["logprobs"]["token_logprobs"] == [None] + [-1.0] * num_prompt
        assert found["logprobs"]["top_logprobs"][0] is None
        assert all(-0.5 in top.values() for top in found["logprobs"]["top_logprobs"][1:])


def test_the_prompts_tokens_have_their_place_in_the_echoed_text(api: Api) -> None:
    found = choice(api, prompt="Hello world", logprobs=0, echo=True)
    for token, place in zip(found["logprobs"]["tokens"][:-1], found["logprobs"]["text_offset"], strict=False):
        assert found["text"][place:].startswith(token)


@pytest.mark.parametrize("stream", [False, True])
def test_no_new_token_is_made_where_only_the_prompt_is_asked_for(api: Api, stream: bool) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 0, "logprobs": 1, "echo": True}
    found = streamed(api, **body) if stream else choice(api, **body)
    assert len(found["logprobs"]["tokens"]) == 3
    assert found["text"] == "".join(found["logprobs"]["tokens"])
    assert api.engine.received[-1].sampling.max_tokens == 0


def test_a_prompt_as_long_as_lm_evals_longest_is_taken(api: Api) -> None:
    found = choice(api, prompt=[5] * (CONTEXT - 1), max_tokens=1, logprobs=1, echo=True)
    assert len(found["logprobs"]["tokens"]) == CONTEXT


def test_a_prompt_that_fills_the_context_is_scored_where_nothing_is_generated(api: Api) -> None:
    found = choice(api, prompt=[5] * CONTEXT, max_tokens=0, logprobs=1, echo=True)
    assert len(found["logprobs"]["token_logprobs"]) == CONTEXT


def test_echo_alone_asks_the_engine_for_no_log_probabilities(api: Api) -> None:
    choice(api, prompt="hi", echo=True)
    sampling = api.engine.received[-1].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (None, None)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [({"logprobs": 21}, "logprobs", "less than or equal to 20"),
     ({"logprobs": -1}, "logprobs", "greater than or equal to 0"),
     ({"logprobs": True}, "logprobs", "integer"),
     ({"best_of": 2, "n": 3}, "best_of", "at least n, which is 3"),
     ({"best_of": 2, "stream": True}, "best_of", "known at the end only"),
     ({"best_of": 129}, "best_of", "less than or equal to 128"),
     ({"suffix": "end"}, "suffix", "do not fill in"),
     ({"prompt": ["a"] * 128, "n": 3}, "prompt", "128 x 3 answers are more than 256")],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field_and_what_is_allowed(
    api: Api, body: dict[str, Any], param: str, words: str
) -> None:
    answer = api.post(PATH, {"prompt": "hi", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert not api.engine.received
