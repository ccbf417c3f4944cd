"""What the engine refuses by itself, so that no request can fail a step for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.engines import Driver
from tests.support.tiny import VOCAB_SIZE

Start = Callable[..., Driver]


@pytest.mark.parametrize(
    ("prompt_ids", "sampling", "reason"),
    [
        ([], {}, "prompt: it is empty"),
        ([3] * 250, {"max_tokens": 7}, "prompt: 250 tokens, and max_tokens 7, are together more than the 256"),
        ([3], {"max_tokens": -1}, "max_tokens: must be at least 0 (got -1)"),
        ([3, VOCAB_SIZE], {}, "prompt: token ids must be in 0..271"),
        ([-1], {}, "prompt: token ids must be in 0..271"),
        ([3], {"stop_token_ids": (272,)}, "stop_token_ids: token ids must be in 0..271"),
        ([3], {"logit_bias": {-5: 1.0}}, "logit_bias: token ids must be in 0..271"),
        ([3], {"bad_words": ((3,), (4, 999))}, "bad_words: token ids must be in 0..271"),
        ([3], {"allowed_token_ids": (3, 300)}, "allowed_token_ids: token ids must be in 0..271"),
        ([3], {"allowed_token_ids": ()}, "allowed_token_ids: it is empty"),
        ([3], {"logprobs": 273}, "logprobs: must be in 0..272 (got 273)"),
        ([3], {"prompt_logprobs": -1}, "prompt_logprobs: must be in 0..272 (got -1)"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(
    start: Start, prompt_ids: list[int], sampling: dict[str, Any], reason: str
) -> None:
    driver = start()
    driver.add("a", prompt_ids, **sampling)
    driver.step()
    assert driver.failed["a"].kind == "invalid"
    assert reason in driver.failed["a"].message
    assert not driver.engine.num_requests


def test_a_name_that_is_in_use_is_refused_and_the_first_request_goes_on(start: Start) -> None:
    driver = start()
    driver.add("a", [3], max_tokens=4)
    driver.add("a", [5])
    driver.finish()
    assert driver.failed["a"].message == "request_id: 'a' is in use"
    assert len(driver.tokens("a")) == 4


def test_every_extreme_that_is_let_through_is_served(start: Start) -> None:
    driver = start()
    last = VOCAB_SIZE - 1
    answer = driver.generate(
        [last, 0],
        max_tokens=3,
        logprobs=VOCAB_SIZE,
        prompt_logprobs=VOCAB_SIZE,
        logit_bias={0: -100.0, last: 100.0},
        stop_token_ids=(0,),
        bad_words=((last, last),),
        allowed_token_ids=(0, last),
    )
    assert answer[0] == last
    assert not driver.failed
