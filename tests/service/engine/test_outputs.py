"""What is told of a request besides its tokens, and when."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.engines import Driver

Start = Callable[..., Driver]

PROMPT = list(range(3, 103))
BLOCK_SIZE = 32


def test_cached_tokens_are_told_once_with_the_first_output(start: Start) -> None:
    driver = start(max_num_batched_tokens=128)
    driver.add("first", PROMPT, max_tokens=3)
    driver.finish()
    driver.add("second", PROMPT, max_tokens=3)
    driver.finish()
    assert [output.num_cached_tokens for output in driver.outputs["first"]] == [0, None, None]
    assert [output.num_cached_tokens for output in driver.outputs["second"]] == [96, None, None]
    assert driver.tokens("first") == driver.tokens("second")


def test_the_steps_count_what_the_prefix_cache_was_asked_and_had(start: Start) -> None:
    driver = start(max_num_batched_tokens=128)
    for index in range(3):
        driver.add(str(index), PROMPT, max_tokens=2)
    driver.finish()
    driver.add("scored", PROMPT, max_tokens=2, prompt_logprobs=0)
    driver.finish()
    assert sum(stats.num_prefix_queries for stats in driver.stats) == 3 * 100
    assert sum(stats.num_prefix_hits for stats in driver.stats) == 2 * 96
    assert sum(stats.prefill_tokens for stats in driver.stats) == 100 + 2 * 4 + 100


def test_only_blocks_that_requests_hold_count_as_used(start: Start) -> None:
    driver = start()
    driver.add("a", PROMPT, max_tokens=2)
    driver.step(4)
    assert driver.stats[-1].used_blocks == 4
    driver.finish()
    assert driver.stats[-1].used_blocks == 0


def test_a_prompt_alone_is_over_when_it_is_computed(start: Start) -> None:
    driver = start(max_num_batched_tokens=BLOCK_SIZE)
    driver.add("a", PROMPT, max_tokens=0)
    driver.finish()
    (output,) = driver.outputs["a"]
    assert (output.token_ids, output.finish_reason, output.num_cached_tokens) == ((), "length", 0)
    assert output.timing is not None
    assert output.timing.decode_tokens == 0
    assert sum(stats.num_sampled for stats in driver.stats) == 0


def test_log_probabilities_of_a_prompt_come_with_its_chunks(start: Start) -> None:
    driver = start(max_num_batched_tokens=BLOCK_SIZE)
    driver.add("a", PROMPT, max_tokens=2, prompt_logprobs=1)
    driver.finish()
    outputs = driver.outputs["a"]
    assert [len(output.prompt_logprobs) for output in outputs] == [32, 32, 32, 3, 0]
    assert [len(output.token_ids) for output in outputs] == [0, 0, 0, 1, 1]
    assert [output.num_cached_tokens for output in outputs] == [0, None, None, None, None]
    whole = start(max_num_batched_tokens=128)
    whole.add("a", PROMPT, max_tokens=0, prompt_logprobs=1)
    whole.finish()
    told = [logprobs for output in outputs for logprobs in output.prompt_logprobs]
    for one, other in zip(told, whole.last("a").prompt_logprobs, strict=True):
        assert abs(one.logprob - other.logprob) < 1e-4
        assert one.rank == other.rank


def test_log_probabilities_of_a_prompt_are_told_once_however_often_it_is_computed(start: Start) -> None:
    block_bytes = BLOCK_SIZE * 2 * 2 * 2 * 8 * 4
    driver = start(max_num_batched_tokens=BLOCK_SIZE, max_num_seqs=2, kv_cache_bytes=8 * block_bytes)
    driver.add("old", PROMPT[:90], max_tokens=80)
    driver.add("young", PROMPT[10:80], max_tokens=80, prompt_logprobs=0)
    driver.finish()
    timing = driver.last("young").timing
    assert timing is not None
    assert timing.num_preempted > 0
    assert sum(len(output.prompt_logprobs) for output in driver.outputs["young"]) == 69


def test_each_token_comes_with_its_log_probability_where_asked(start: Start) -> None:
    driver = start()
    driver.add("plain", PROMPT[:9], max_tokens=5)
    driver.add("asked", PROMPT[:9], max_tokens=5, logprobs=2)
    driver.finish()
    assert not any(output.logprobs for output in driver.outputs["plain"])
    for output in driver.outputs["asked"]:
        (logprobs,) = output.logprobs
        assert logprobs.rank == 1
        assert logprobs.top_ids[0] == output.token_ids[0]
        assert len(logprobs.top_logprobs) == 2
