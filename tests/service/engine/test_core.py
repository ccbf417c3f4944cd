from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaForCausalLM

from service.engine.messages import LoadModel
from tests.support.engines import Driver, tiny_engine_config
from tests.support.tiny import VOCAB_SIZE, make_tiny_llama

Start = Callable[..., Driver]

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "top_k": 7, "seed": 2},
    {"temperature": 1.0, "top_p": 0.8, "seed": 3},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 4},
]


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    source = random.Random(7)
    return [[source.randrange(3, VOCAB_SIZE) for _ in range(source.randint(1, longest))] for _ in range(count)]


def transformers_tokens(folder: Path, prompt_ids: list[int], num_tokens: int) -> list[int]:
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return list(output[0, len(prompt_ids) :].tolist())


@pytest.mark.parametrize("is_tied", [True, False])
def test_greedy_answers_are_those_of_transformers(tmp_path: Path, is_tied: bool) -> None:
    folder = make_tiny_llama(tmp_path / "model", seed=5, tie_word_embeddings=is_tied)
    driver = Driver(tiny_engine_config(folder))
    driver.load(folder)
    for prompt_ids in prompts(3):  # some take several chunks
        expected = transformers_tokens(folder, prompt_ids, 40)
        assert driver.generate(prompt_ids, max_tokens=40) == expected


def test_requests_in_a_batch_get_what_each_gets_alone(start: Start) -> None:
    driver = start()
    requests = list(zip(prompts(20), SAMPLINGS * 4, strict=True))
    alone = [driver.generate(prompt_ids, max_tokens=40, **sampling) for prompt_ids, sampling in requests]
    for index, (prompt_ids, sampling) in enumerate(requests):
        driver.add(str(index), prompt_ids, max_tokens=40, **sampling)
    driver.finish()
    assert [driver.tokens(str(index)) for index in range(20)] == alone
    assert max(stats.decode_tokens for stats in driver.stats) == 8


def test_requests_join_and_leave_while_others_run(start: Start) -> None:
    driver = start()
    texts = prompts(6)
    alone = [driver.generate(prompt_ids, max_tokens=5 + 4 * index) for index, prompt_ids in enumerate(texts)]
    for index, prompt_ids in enumerate(texts):
        driver.add(str(index), prompt_ids, max_tokens=5 + 4 * index)
        driver.step(3)
    driver.finish()
    assert [driver.tokens(str(index)) for index in range(6)] == alone


def test_each_token_is_told_in_the_step_that_made_it(start: Start) -> None:
    driver = start()
    driver.add("a", [3, 4, 5], max_tokens=4)
    counts = []
    for _ in range(4):
        driver.step()
        counts.append(len(driver.tokens("a")))
    assert counts == [1, 2, 3, 4]
    assert [output.finish_reason for output in driver.outputs["a"]] == [None, None, None, "length"]


def test_a_stop_token_ends_the_answer_and_is_named(start: Start) -> None:
    driver = start()
    whole = driver.generate([3, 4, 5], max_tokens=10)
    stop = next(token for index, token in enumerate(whole) if index > 1 and token not in whole[:index])
    driver.add("a", [3, 4, 5], max_tokens=10, stop_token_ids=(stop,))
    driver.finish()
    assert driver.tokens("a") == whole[: whole.index(stop) + 1]
    assert driver.last("a").finish_reason == "stop"
    assert driver.last("a").stop_token_id == stop


def test_the_models_own_end_token_ends_the_answer_unless_it_is_ignored(tmp_path: Path, start: Start) -> None:
    whole = start().generate([3, 4, 5], max_tokens=10)
    folder = make_tiny_llama(tmp_path / "model", seed=0, eos_token_id=[1, whole[3]])
    driver = Driver(tiny_engine_config(folder))
    driver.load(folder)
    first = whole.index(whole[3])
    assert driver.generate([3, 4, 5], max_tokens=10, ignore_eos=False) == whole[: first + 1]
    assert driver.generate([3, 4, 5], max_tokens=10, ignore_eos=True) == whole


def test_a_pool_too_small_for_all_preempts_and_changes_no_token(start: Start) -> None:
    roomy = start()
    requests = list(zip(prompts(10, longest=90), SAMPLINGS * 2, strict=True))
    alone = [roomy.generate(prompt_ids, max_tokens=100, **sampling) for prompt_ids, sampling in requests]
    block_bytes = 32 * 2 * 2 * 2 * 8 * 4
    tight = start(kv_cache_bytes=9 * block_bytes, max_model_len=256)
    for index, (prompt_ids, sampling) in enumerate(requests):
        tight.add(str(index), prompt_ids, max_tokens=100, **sampling)
    tight.finish()
    assert sum(stats.num_preempted for stats in tight.stats) > 0
    assert [tight.tokens(str(index)) for index in range(10)] == alone


def test_an_abort_frees_the_blocks_in_every_state(start: Start) -> None:
    driver = start(max_num_seqs=2)
    expected = driver.generate([9, 8, 7])
    driver.add("decoding", [3, 4, 5], max_tokens=100)
    driver.step(2)
    driver.add("prefilling", list(range(3, 103)))
    driver.step()
    driver.add("waiting", [3, 4, 5])
    names = ["prefilling", "waiting", "decoding"]
    for name in names:
        driver.abort(name)
    driver.step()  # checks the blocks, being idle
    assert [driver.last(name).finish_reason for name in names] == ["abort"] * 3
    assert (driver.stats[-1].used_blocks, driver.stats[-1].num_running, driver.stats[-1].num_waiting) == (0, 0, 0)
    assert driver.generate([9, 8, 7]) == expected


def test_an_abort_of_a_request_that_is_over_is_nothing(start: Start) -> None:
    driver = start()
    driver.generate([3])
    num_events = len(driver.stats)
    driver.abort("alone-0")
    driver.abort("never heard of")
    driver.step()
    assert len(driver.stats) == num_events


def test_the_longest_request_that_is_taken_is_served(start: Start) -> None:
    driver = start(kv_cache_bytes=8 * 32 * 2 * 2 * 2 * 8 * 4)
    assert driver.engine.ready.max_model_len == 256
    assert len(driver.generate([3] * 200, max_tokens=56)) == 56


def test_a_request_for_a_model_that_nobody_loads_is_unavailable(start: Start) -> None:
    driver = start()
    driver.add("a", [3], model_id="unheard of")
    driver.step()
    assert driver.failed["a"].kind == "unavailable"
    assert "'unheard of' is not loaded" in driver.failed["a"].message


def test_a_request_may_come_before_its_weights_have(tiny: Path) -> None:
    driver = Driver(tiny_engine_config(tiny))
    driver.engine.handle(LoadModel(model_id="m", base_dir=str(tiny)))
    driver.add("a", [3, 4])
    driver.add("aborted", [3, 4])
    driver.abort("aborted")
    driver.run_until(lambda: driver.is_finished("a"))
    assert len(driver.tokens("a")) == 12
    assert driver.last("aborted").finish_reason == "abort"


def test_an_error_in_a_step_fails_its_requests_and_no_others(start: Start) -> None:
    driver = start(max_num_seqs=1)
    expected = driver.generate([9, 8, 7])
    norm = driver.engine._weights.find("m").model.model.norm  # type: ignore[union-attr]
    driver.add("unlucky", [3, 4, 5])
    driver.add("later", [9, 8, 7])
    weight = norm.weight
    norm.weight = torch.nn.Parameter(torch.ones(3))
    driver.step()
    norm.weight = weight
    driver.finish()
    assert driver.failed["unlucky"].kind == "internal"
    assert "RuntimeError" in driver.failed["unlucky"].message
    assert driver.tokens("later") == expected


def test_a_failed_step_leaves_no_blocks_and_nothing_that_others_would_read(start: Start) -> None:
    driver = start(max_num_batched_tokens=32)
    prompt = list(range(3, 103))
    expected = start().generate(prompt)
    driver.add("unlucky", prompt)
    driver.step(2)  # two of its blocks are there
    with patch.object(driver.engine._parts.runner, "run", side_effect=ValueError("no")):
        driver.step()
    assert driver.failed["unlucky"].message == "the engine failed in this step: ValueError: no"
    assert driver.stats[-1].used_blocks == 0
    assert driver.generate(prompt) == expected
    (first, *_) = driver.outputs[next(reversed(driver.outputs))]
    assert first.num_cached_tokens == 64


def test_a_lost_device_is_no_failure_of_one_step(start: Start) -> None:
    driver = start()
    driver.add("a", [3, 4, 5])
    lost = torch.AcceleratorError("the device is lost")
    with patch.object(driver.engine._parts.runner, "run", side_effect=lost), pytest.raises(torch.AcceleratorError):
        driver.step()


def test_a_request_without_a_seed_draws_one_from_the_engines(start: Start) -> None:
    first, again, other = start(seed=1), start(seed=1), start(seed=2)
    answers = [driver.generate([3, 4, 5], temperature=1.0) for driver in (first, again, other)]
    assert answers[0] == answers[1] != answers[2]
    assert first.generate([3, 4, 5], temperature=1.0) != answers[0]


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_step_reads_each_weight_once_and_the_keys_and_values_so_far(tmp_path: Path, is_tied: bool) -> None:
    folder = make_tiny_llama(tmp_path / "model", tie_word_embeddings=is_tied)
    driver = Driver(tiny_engine_config(folder))
    loaded = driver.load(folder)
    driver.add("a", [3] * 10, max_tokens=2)
    driver.add("b", [3] * 20, max_tokens=3)
    driver.finish()
    weight_bytes = loaded.weight_bytes  # type: ignore[union-attr]
    embedding = 0 if is_tied else VOCAB_SIZE * 32 * 4
    row, kv_token = 0 if is_tied else 32 * 4, 2 * 2 * 2 * 8 * 4
    reads = [stats.decode_bytes for stats in driver.stats if stats.decode_tokens]
    assert reads == [
        weight_bytes - embedding + 2 * row + (11 + 21) * kv_token,
        weight_bytes - embedding + row + 22 * kv_token,
    ]
    timing = driver.last("b").timing
    assert timing is not None
    assert (timing.decode_tokens, timing.decode_bytes) == (2, sum(reads))
    assert min(timing.queue_s, timing.prefill_s, timing.decode_s) > 0
    assert sum(stats.prefill_tokens for stats in driver.stats) == 30
    assert sum(stats.num_sampled for stats in driver.stats) == 5


def test_an_engine_that_stops_tells_every_request(start: Start) -> None:
    driver = start(max_num_seqs=1)
    for name in "abc":
        driver.add(name, [3, 4])
    driver.step()
    driver.engine.abort_all()
    driver.step()
    assert [driver.last(name).finish_reason for name in "abc"] == ["abort"] * 3
