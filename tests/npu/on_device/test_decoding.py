"""The real engine on the device: the CPU's tokens, one upload and one download a step, and no other wait."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.adapter import save_adapter
from lm.checkpoint import load_weights, save_model
from lm.config import load_config
from lm.lora import LoraSpec, add_lora, lora_parameters
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE
from service.engine.messages import EngineReady, ModelLoaded
from tests.npu.simulated.device import SimulatedNpu
from tests.support.engines import Driver, tiny_engine_config

REQUESTS = {
    "short": [5, 9, 42],
    "several prefill chunks": [1 + n * 7 % 270 for n in range(40)],
    "over the end of a block": [3 + n * 11 % 260 for n in range(124)],
}
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 7}
NUM_TOKENS = 10


def start(folder: Path, device: str, **config: object) -> Driver:
    driver = Driver(tiny_engine_config(folder, device=device, **config))
    assert isinstance(driver.load(folder), ModelLoaded)
    return driver


def add_all(driver: Driver) -> None:
    """Greedy requests that join one after the other, then one that draws."""
    for name, prompt in REQUESTS.items():
        driver.add(name, prompt, max_tokens=NUM_TOKENS)
    driver.add("drawn", REQUESTS["short"], max_tokens=NUM_TOKENS, **SAMPLING)


def all_tokens(driver: Driver) -> dict[str, list[int]]:
    assert not driver.failed
    return {name: driver.tokens(name) for name in driver.outputs}


def finish_watched(driver: Driver, npu: SimulatedNpu) -> None:
    """Run to the end. A step may upload its input once and download its sampled ids once; nothing else waits."""
    while driver.engine.has_work:
        npu.statistics.reset()
        with npu.statistics.forbid_host_sync("an engine step", uploads=1, downloads=1):
            driver.step()
        assert npu.statistics.copies["upload"] == 1
        assert npu.statistics.copies["download"] == (driver.stats[-1].num_sampled > 0)


def test_ten_tokens_are_the_cpus_and_a_step_waits_once(tiny_llama: Path, npu: SimulatedNpu) -> None:
    expected = start(tiny_llama, "cpu")
    add_all(expected)
    expected.finish()
    driver = start(tiny_llama, "npu", dtype="fp32")
    add_all(driver)
    finish_watched(driver, npu)
    assert all_tokens(driver) == all_tokens(expected)
    assert {len(tokens) for tokens in all_tokens(driver).values()} == {NUM_TOKENS}


def test_bf16_is_the_choice_and_decodes_without_a_wait(tiny_llama: Path, npu: SimulatedNpu) -> None:
    driver = start(tiny_llama, "auto", dtype="auto")
    assert (driver.engine.ready.device, driver.engine.ready.dtype) == ("npu:0", "bf16")
    add_all(driver)
    finish_watched(driver, npu)
    assert {len(tokens) for tokens in all_tokens(driver).values()} == {NUM_TOKENS}


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda logits: logits.sum().item(),
    "bool": lambda logits: bool(logits.isnan().any()),
    "nonzero": lambda logits: logits.nonzero(),
    "masked_select": lambda logits: logits.masked_select(logits > 0),
    "mask": lambda logits: logits[logits > 0],
    "download": lambda logits: logits.cpu(),
    "upload": lambda logits: torch.tensor([1.0], device=logits.device),
    "synchronize": lambda logits: torch.get_device_module("npu").synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_inside_a_step_is_caught(
    name: str, tiny_llama: Path, npu: SimulatedNpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CausalLM.logits

    def logits(model: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
        result = original(model, hidden)
        WAITS[name](result)
        return result

    driver = start(tiny_llama, "npu", dtype="fp32")
    monkeypatch.setattr(CausalLM, "logits", logits)
    driver.add("r", REQUESTS["short"])
    with npu.statistics.forbid_host_sync("an engine step", uploads=1, downloads=1):
        driver.step()
    assert "HostSyncError" in driver.failed["r"].message


# ---- weights


@pytest.fixture(scope="module")
def tuned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` as a full fine-tune leaves it: other weights."""
    model = load_on_cpu(tiny_llama)
    final = tmp_path_factory.mktemp("tuned") / "step_1"
    state = {name: tensor.flip(0) for name, tensor in model.state_dict().items()}
    save_model(state, tiny_llama, final, dtype=torch.float32)
    return final


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_on_cpu(tiny_llama)
    spec = LoraSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "down_proj"))
    add_lora(model, spec)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    final = tmp_path_factory.mktemp("adapters") / "step_1"
    save_adapter(model, final, base_model="tiny")
    return final


def load_on_cpu(folder: Path) -> CausalLM:
    model = build_model(load_config(folder), device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
    load_weights(model, folder)
    return model


@pytest.mark.parametrize("swap", ["overlap", "drain"])
def test_weights_change_under_a_running_request(swap: str, tiny_llama: Path, tuned: Path) -> None:
    expected_old = start(tiny_llama, "cpu").generate(REQUESTS["short"], max_tokens=NUM_TOKENS)
    expected_new = start(tuned, "cpu").generate(REQUESTS["short"], max_tokens=NUM_TOKENS)
    driver = start(tiny_llama, "npu", dtype="fp32", swap=swap)
    driver.add("old", REQUESTS["short"], max_tokens=NUM_TOKENS)
    driver.step(3)
    loaded = driver.load(tuned, "tuned", replaces="m")
    assert isinstance(loaded, ModelLoaded)
    assert loaded.mode == swap
    driver.add("new", REQUESTS["short"], "tuned", max_tokens=NUM_TOKENS)
    driver.finish()
    assert driver.tokens("old") == expected_old
    assert driver.tokens("new") == expected_new
    assert expected_old != expected_new


def test_an_adapter_is_merged_into_the_weights_on_the_device(tiny_llama: Path, adapter: Path) -> None:
    answers = {}
    for device in ("cpu", "npu"):
        driver = start(tiny_llama, device, dtype="fp32")
        plain = driver.generate(REQUESTS["short"], max_tokens=NUM_TOKENS)
        assert isinstance(driver.load(tiny_llama, "adapted", adapter_dir=str(adapter)), ModelLoaded)
        answers[device] = driver.generate(REQUESTS["short"], "adapted", max_tokens=NUM_TOKENS)
        assert answers[device] != plain
    assert answers["npu"] == answers["cpu"]


# ---- memory


def test_memory_that_runs_out_in_a_step_fails_its_requests_and_no_others(tiny_llama: Path, npu: SimulatedNpu) -> None:
    driver = start(tiny_llama, "npu", dtype="fp32")
    capacity, npu.memory.capacity = npu.memory.capacity, npu.memory.allocated
    driver.add("unlucky", REQUESTS["short"], max_tokens=NUM_TOKENS)
    driver.step()
    npu.memory.capacity = capacity
    assert "OutOfMemoryError" in driver.failed["unlucky"].message
    assert len(driver.generate(REQUESTS["short"], max_tokens=NUM_TOKENS)) == NUM_TOKENS


def test_the_engine_gives_its_memory_back(tiny_llama: Path, npu: SimulatedNpu) -> None:
    before = npu.memory.allocated
    driver = start(tiny_llama, "npu", dtype="fp32")
    driver.generate(REQUESTS["short"])
    assert npu.memory.allocated > before
    del driver
    assert npu.memory.allocated == before


def test_an_engine_that_shares_the_card_plans_within_its_part(npu: SimulatedNpu, tiny_llama: Path) -> None:
    def ready(memory_fraction: float | None) -> EngineReady:
        gc.collect()
        npu.module.empty_cache()
        npu.memory.capacity = npu.memory.allocated + (2 << 20)
        fields = {"kv_cache_bytes": None, "max_num_seqs": 512, "memory_fraction": memory_fraction}
        return Driver(tiny_engine_config(tiny_llama, device="npu", **fields)).engine.ready

    whole, half = ready(None), ready(0.5)
    assert half.memory_total == npu.memory.capacity
    assert 0 < half.memory_needed <= half.memory_total / 2
    assert half.memory_needed < whole.memory_needed <= whole.memory_total
    assert npu.memory.fraction == 0.5
