"""Every way to choose a token on the device: the CPU's tokens, the stated copies a step, and no other wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.messages import Logprobs, ModelLoaded
from tests.npu.simulated.device import SimulatedNpu
from tests.support.bigram import bigram_desk, decoding, random_table
from tests.support.engines import Driver, tiny_engine_config

NUM_TOKENS = 8
PROMPT = [1 + place * 7 % 250 for place in range(40)]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8, "seed": 7},
    "filters": {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "seed": 7},
    "top-p alone": {"temperature": 1.2, "top_p": 0.7, "seed": 7},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "bias and bans": {"logit_bias": {9: 3.0, 11: -100.0}, "bad_words": ((5,), (9, 11)), "min_tokens": 4},
    "allowed tokens": {"allowed_token_ids": tuple(range(20, 60)), "temperature": 1.0, "seed": 3},
    "log probabilities": {"logprobs": 5},
    "log probabilities of the prompt": {"prompt_logprobs": 3, "logprobs": 0},
    "grammar": {"grammar": GRAMMAR},
    "grammar, penalties and log probabilities": {"grammar": GRAMMAR, "frequency_penalty": 0.4, "logprobs": 1},
}


def start(folder: Path, device: str) -> Driver:
    driver = Driver(tiny_engine_config(folder, device=device, dtype="fp32"))
    assert isinstance(driver.load(folder), ModelLoaded)
    return driver


def add(driver: Driver, kinds: dict[str, dict[str, Any]]) -> None:
    for name, kind in kinds.items():
        driver.add(name, PROMPT, **{"max_tokens": NUM_TOKENS, **kind})
    driver.run_until(lambda: not driver.engine._compiling and not driver.engine._compiled)


def answers(driver: Driver) -> dict[str, tuple[list[int], list[Logprobs]]]:
    assert not driver.failed
    return {
        name: (driver.tokens(name), [one for output in outputs for one in (*output.prompt_logprobs, *output.logprobs)])
        for name, outputs in driver.outputs.items()
    }


def close(ours: list[Logprobs], theirs: list[Logprobs]) -> bool:
    pairs = [
        (a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip((one.logprob, *one.top_logprobs), (other.logprob, *other.top_logprobs), strict=True)
    ]
    return all(abs(a - b) < 1e-4 for a, b in pairs)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_waits_once_and_uploads_twice_only_for_a_grammar(name: str, tiny_llama: Path, npu: SimulatedNpu) -> None:
    expected = start(tiny_llama, "cpu")
    add(expected, {name: KINDS[name]})
    expected.finish()
    driver = start(tiny_llama, "npu")
    add(driver, {name: KINDS[name]})
    while driver.engine.has_work:
        npu.statistics.reset()
        with npu.statistics.forbid_host_sync("an engine step", uploads=2, downloads=1):
            driver.step()
        sampled = driver.stats[-1].num_sampled > 0
        assert npu.statistics.copies["upload"] == (2 if sampled and "grammar" in KINDS[name] else 1)
        assert npu.statistics.copies["download"] == (sampled or "prompt_logprobs" in KINDS[name])
    ours, theirs = answers(driver)[name], answers(expected)[name]
    assert ours[0] == theirs[0]
    assert close(ours[1], theirs[1])


def test_all_kinds_together_are_the_cpus_with_the_copies_of_one(tiny_llama: Path, npu: SimulatedNpu) -> None:
    expected = start(tiny_llama, "cpu")
    add(expected, KINDS)
    expected.finish()
    driver = start(tiny_llama, "npu")
    add(driver, KINDS)
    while driver.engine.has_work:
        npu.statistics.reset()
        with npu.statistics.forbid_host_sync("an engine step", uploads=2, downloads=1):
            driver.step()
    assert {name: tokens for name, (tokens, _) in answers(driver).items()} == {
        name: tokens for name, (tokens, _) in answers(expected).items()
    }


# ---- calls of the device


def launches_of_a_step(npu: SimulatedNpu, **sampling: Any) -> int:
    """What a decoding step of four rows asks of the device, beside the model's own lookup."""
    desk = bigram_desk(random_table(64).to("npu"))
    rows = [desk.sequence([1, 2, 3], row=row, **sampling) for row in range(4)]
    desk.run(*map(decoding, rows))  # makes the views of this shape
    npu.statistics.reset()
    desk.run(*map(decoding, rows))
    return npu.statistics.calls.total() + npu.statistics.copies["move"] - 1


@pytest.mark.parametrize(
    ("sampling", "launches"),
    [
        ({"temperature": 0}, 2),
        ({"temperature": 0.7, "seed": 1}, 11),
        ({"temperature": 0, "repetition_penalty": 1.5}, 11),
        ({"temperature": 0, "logprobs": 5}, 12),
    ],
    ids=str,
)
def test_choosing_takes_few_launches(npu: SimulatedNpu, sampling: dict[str, Any], launches: int) -> None:
    assert launches_of_a_step(npu, **sampling) == launches


def test_the_buffers_stay_where_they_are(npu: SimulatedNpu) -> None:
    desk = bigram_desk(random_table(64).to("npu"))
    sequence = desk.sequence([1, 2, 3], temperature=0, frequency_penalty=0.1)
    addresses = set()
    original = desk.model.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        addresses.add(desk.runner._buffer.uploaded(0, 1).data_ptr())
        result: torch.Tensor = original(hidden)
        return result

    desk.model.logits = logits
    desk.continue_by(20, sequence)
    assert len(addresses) == 1
