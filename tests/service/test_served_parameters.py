"""What each parameter does to the answer: the OpenAI client, a real service, the real engine on a tiny model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.served import LENGTH, complete, ids_of, serving_tiny
from tests.support.tiny import EOS


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving_tiny(tmp_path_factory.mktemp("home")) as client:
        yield client


# ---- which token is chosen


def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_bans_it(client: openai.OpenAI) -> None:
    usual = ids_of(complete(client))
    assert ids_of(complete(client, logit_bias={"77": 100})) == [77] * LENGTH
    assert usual[0] not in ids_of(complete(client, logit_bias={str(usual[0]): -100}))


def test_only_allowed_tokens_are_chosen(client: openai.OpenAI) -> None:
    allowed = [40, 41, 42]
    assert set(ids_of(complete(client, temperature=2, extra={"allowed_token_ids": allowed}))) <= {*allowed}


def test_bad_words_are_not_written(client: openai.OpenAI) -> None:
    bias = {str(token("a")): 100, str(token("b")): 90}
    assert complete(client, logit_bias=bias).choices[0].text == "a" * LENGTH
    assert complete(client, logit_bias=bias, extra={"bad_words": ["a"]}).choices[0].text == "b" * LENGTH


def test_a_word_of_several_tokens_is_banned_and_its_parts_are_not(client: openai.OpenAI) -> None:
    bias = {str(token("a")): 100, str(token("b")): 90}
    held = complete(client, logit_bias=bias, extra={"bad_words": ["aaa"]}).choices[0].text
    assert held == "aab" * (LENGTH // 3)


def token(character: str) -> int:
    """The id of an ASCII character in the tiny tokenizer: the special tokens, then the bytes in GPT-2's order."""
    return 3 + ord(character) - ord("!")


def test_a_repetition_penalty_lets_nothing_come_twice(client: openai.OpenAI) -> None:
    found = ids_of(complete(client, extra={"repetition_penalty": 100}))
    assert len(set(found)) == len(found)
    prompt = complete(client).choices[0].prompt_token_ids  # type: ignore[attr-defined]
    assert not {*found} & {*prompt}


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_makes_repetition_rarer(client: openai.OpenAI, penalty: str) -> None:
    bias = {"77": 3.0, "78": 2.5}  # two likely tokens, near each other
    options: dict[str, Any] = {"logit_bias": bias, "max_tokens": 64}
    usual = Counter(ids_of(complete(client, **options)))
    held = Counter(ids_of(complete(client, **options | {penalty: 2.0})))
    encouraged = Counter(ids_of(complete(client, **options | {penalty: -2.0})))
    assert max(held.values()) < max(usual.values()) <= max(encouraged.values())


@pytest.mark.parametrize("extra", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_what_leaves_one_token_is_greedy(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    assert ids_of(complete(client, temperature=2, extra=extra)) == ids_of(complete(client))


def test_a_seed_gives_each_choice_its_own_answer_and_repeats_them(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 5}
    three = complete(client, n=3, **options)
    answers = [tuple(ids_of(three, index)) for index in range(3)]
    assert len({*answers}) == 3
    assert tuple(ids_of(complete(client, **options))) == answers[0]
    assert [tuple(ids_of(complete(client, n=3, **options), index)) for index in range(3)] == answers


def test_greedy_answers_are_equal_copies(client: openai.OpenAI) -> None:
    answer = complete(client, n=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {tuple(ids_of(answer, index)) for index in range(4)} == {tuple(ids_of(complete(client)))}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4 * LENGTH


def test_the_best_answers_are_those_with_the_likeliest_tokens(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 7, "logprobs": 0}
    made = complete(client, n=5, **options)
    best = complete(client, n=2, best_of=5, **options)

    def mean(index: int) -> float:
        logprobs = made.choices[index].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        return math.fsum(logprobs.token_logprobs) / len(logprobs.token_logprobs)

    expected = sorted(range(5), key=mean, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [made.choices[index].text for index in expected]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage == made.usage, "all answers that were made count"


# ---- where it ends


def test_min_tokens_holds_the_end_back(client: openai.OpenAI) -> None:
    eager = {"logit_bias": {str(EOS): 100}}
    assert ids_of(complete(client, **eager, extra={"ignore_eos": False})) == [EOS]
    held = complete(client, **eager, extra={"ignore_eos": False, "min_tokens": 5})
    assert EOS not in ids_of(held)[:5]
    assert ids_of(held)[5:] == [EOS]


def test_min_tokens_holds_stop_strings_and_stop_tokens_back(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"logit_bias": {str(token("a")): 100}}
    by_text = complete(client, **options, stop=["aa"], extra={"min_tokens": 6})
    assert len(ids_of(by_text)) >= 6
    by_token = complete(client, logit_bias={"77": 100}, extra={"min_tokens": 4, "stop_token_ids": [77]})
    assert 77 not in ids_of(by_token)[:4]
    assert ids_of(by_token)[4:] == [77]


def test_a_stop_token_ends_the_answer(client: openai.OpenAI) -> None:
    usual = ids_of(complete(client))
    stop = usual[4]
    answer = complete(client, extra={"stop_token_ids": [stop]})
    end = usual.index(stop) + 1
    assert ids_of(answer) == usual[:end]
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)  # type: ignore[attr-defined]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == end


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_answer_where_it_begins_or_ends(client: openai.OpenAI, include: bool) -> None:
    whole = complete(client).choices[0].text
    stop = whole[3:6]
    cut = complete(client, stop=[stop, "never written"], extra={"include_stop_str_in_output": include}).choices[0]
    assert cut.text == whole[: whole.index(stop) + (len(stop) if include else 0)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)  # type: ignore[attr-defined]


def test_special_tokens_are_shown_on_request(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"logit_bias": {"1": 100}, "max_tokens": 2}
    assert complete(client, **options).choices[0].text == ""
    shown = complete(client, **options, extra={"skip_special_tokens": False})
    assert shown.choices[0].text == "<|im_start|><|im_start|>"


def test_a_prompt_that_was_there_before_is_told_as_cached(client: openai.OpenAI) -> None:
    prompt = [9 + index % 100 for index in range(200)]
    cached = []
    for n in (3, 1):
        usage = complete(client, prompt=prompt, n=n, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens or 0)
    assert cached[0] == 0
    assert 100 < cached[1] < len(prompt)
