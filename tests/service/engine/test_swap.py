from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.engine.loader import in_background
from service.engine.messages import ModelLoaded, ModelLoadFailed, ModelUnloaded, SwapMode
from service.engine.weights import choose_mode
from tests.support.engines import Driver
from tests.support.tiny import make_tiny_llama

Start = Callable[..., Driver]

PROMPT = [9, 8, 7, 6]
MODES: list[SwapMode] = ["overlap", "drain"]


@pytest.fixture
def answers(start: Start, tiny: Path, other_tiny: Path) -> dict[str, list[int]]:
    """What each checkpoint says to PROMPT."""
    driver = start()
    driver.load(other_tiny, "new")
    result = {name: driver.generate(PROMPT, name, max_tokens=30) for name in ("m", "new")}
    assert result["m"] != result["new"]
    return result


def damaged_copy(source: Path, target: Path) -> Path:
    """Headers that fit, and a head that is not the tied embedding: found out only when the weights are read."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def poisoned_copy(source: Path, target: Path, value: float) -> Path:
    """Everything fits, and one number is none: found out only when the weights are read."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("swap", MODES)
def test_no_request_is_lost_to_a_swap_and_each_keeps_its_weights(
    start: Start, other_tiny: Path, answers: dict[str, list[int]], swap: SwapMode
) -> None:
    driver = start(swap=swap, max_num_seqs=3)
    for index in range(5):  # two of them wait in the queue
        driver.add(f"old-{index}", PROMPT, max_tokens=30)
    driver.step(2)
    driver.start_load(other_tiny, "new", replaces="m")
    for index in range(5):
        driver.add(f"new-{index}", PROMPT, "new", max_tokens=30)
        driver.step()
    driver.run_until(lambda: all(driver.is_finished(f"{name}-{i}") for name in ("old", "new") for i in range(5)))
    assert not driver.failed
    for index in range(5):
        assert driver.tokens(f"old-{index}") == answers["m"]
        assert driver.tokens(f"new-{index}") == answers["new"]
    loaded = driver.load_outcome("new")
    assert isinstance(loaded, ModelLoaded)
    assert loaded.mode == swap


@pytest.mark.parametrize("swap", MODES)
def test_new_weights_read_nothing_that_old_ones_computed(
    start: Start, tiny: Path, other_tiny: Path, swap: SwapMode
) -> None:
    prompt = list(range(3, 103))
    expected = []
    for folder in (tiny, other_tiny):
        fresh = start()
        fresh.load(folder, "alone")
        expected.append(fresh.generate(prompt, "alone"))
    driver = start(swap=swap)
    names, folders = ["m", "second", "third"], [tiny, other_tiny, tiny]
    for index, name in enumerate(names):
        if index:
            driver.add(f"across-{index}", prompt, names[index - 1])
            driver.step()
            driver.load(folders[index], name, replaces=names[index - 1])
        driver.add(f"{name}-1", prompt, name)
        driver.finish()
        driver.add(f"{name}-2", prompt, name)
        driver.finish()
        assert driver.tokens(f"{name}-1") == driver.tokens(f"{name}-2") == expected[index % 2]
        assert [driver.outputs[f"{name}-{turn}"][0].num_cached_tokens for turn in (1, 2)] == [0, 96]
    assert [driver.tokens(f"across-{index}") for index in (1, 2)] == expected


def test_overlapping_sets_decode_in_the_same_steps(
    start: Start, other_tiny: Path, answers: dict[str, list[int]]
) -> None:
    driver = start()
    driver.load(other_tiny, "new")
    driver.add("old", PROMPT, max_tokens=30)
    driver.add("new", PROMPT, "new", max_tokens=40)
    driver.finish()
    assert (driver.tokens("old"), driver.tokens("new")[:30]) == (answers["m"], answers["new"])
    both = [stats for stats in driver.stats if stats.decode_tokens == 2]
    one = [stats for stats in driver.stats if stats.decode_tokens == 1]
    assert min(stats.decode_bytes for stats in both) > 1.8 * min(stats.decode_bytes for stats in one)


def test_after_an_overlap_the_old_weights_serve_until_they_are_unloaded(
    start: Start, other_tiny: Path, answers: dict[str, list[int]]
) -> None:
    driver = start(swap="overlap")
    driver.load(other_tiny, "new", replaces="m")
    driver.add("late", PROMPT, max_tokens=30)
    driver.step()
    driver.unload("m")
    driver.add("too late", PROMPT)
    driver.finish()
    assert driver.tokens("late") == answers["m"]
    assert driver.failed["too late"].kind == "unavailable"
    assert ModelUnloaded(model_id="m") in driver.events


def test_while_a_set_drains_requests_for_it_wait_and_are_told_to_look_again(start: Start, other_tiny: Path) -> None:
    driver = start(swap="drain")
    driver.add("running", PROMPT, max_tokens=30)
    driver.step()
    driver.start_load(other_tiny, "new", replaces="m")
    driver.add("meanwhile", PROMPT)
    driver.step()
    assert "meanwhile" not in driver.failed
    assert driver.stats[-1].num_waiting == 1
    driver.run_until(lambda: driver.is_finished("meanwhile"))
    assert driver.failed["meanwhile"].kind == "unavailable"
    assert len(driver.tokens("running")) == 30


def other_architecture(folder: Path, tiny: Path) -> Path:
    return make_tiny_llama(folder, hidden_size=48)


def missing_tensor(folder: Path, tiny: Path) -> Path:
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def cut_short(folder: Path, tiny: Path) -> Path:
    shutil.copytree(tiny, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def no_folder(folder: Path, tiny: Path) -> Path:
    return folder


@pytest.mark.parametrize("swap", MODES)
@pytest.mark.parametrize(
    ("make_bad", "reason"),
    [
        (other_architecture, "has another architecture than the engine serves: hidden_size is 48, not 32"),
        (missing_tensor, "lacks the tensors model.norm.weight"),
        (cut_short, "is not a readable safetensors file"),
        (no_folder, "there is no model folder"),
        (lambda folder, tiny: damaged_copy(tiny, folder), "holds an lm_head.weight unlike its embedding"),
        (lambda folder, tiny: poisoned_copy(tiny, folder, nan), "layers.1.mlp.up_proj.weight holds NaN or infinity"),
        (lambda folder, tiny: poisoned_copy(tiny, folder, -inf), "layers.1.mlp.up_proj.weight holds NaN or infinity"),
    ],
    ids=["other architecture", "missing tensor", "cut short", "no folder", "damaged", "nan", "infinity"],
)
def test_a_swap_that_fails_leaves_the_old_weights_serving(
    start: Start,
    tiny: Path,
    tmp_path: Path,
    answers: dict[str, list[int]],
    swap: SwapMode,
    make_bad: Callable[[Path, Path], Path],
    reason: str,
) -> None:
    driver = start(swap=swap)
    driver.add("before", PROMPT, max_tokens=30)
    driver.step()
    driver.start_load(make_bad(tmp_path / "bad", tiny), "new", replaces="m")
    driver.add("hopeful", PROMPT, "new")
    driver.add("meanwhile", PROMPT, max_tokens=30)
    driver.run_until(lambda: all(driver.is_finished(name) for name in ("before", "hopeful", "meanwhile")))
    failure = driver.load_outcome("new")
    assert isinstance(failure, ModelLoadFailed)
    assert reason in failure.message
    assert driver.failed["hopeful"].kind == "unavailable"
    assert driver.tokens("before") == driver.tokens("meanwhile") == answers["m"]
    assert driver.generate(PROMPT, max_tokens=30) == answers["m"]


def test_an_adapter_is_merged_while_loading_and_a_bad_one_is_refused_before_anything_changes(
    start: Start, tiny: Path, tmp_path: Path, answers: dict[str, list[int]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.1.mlp.down_proj"
    down, up = torch.randn(4, 64, generator=generator), torch.randn(32, 4, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    merged = tmp_path / "merged"
    shutil.copytree(tiny, merged)
    weights = load_file(merged / "model.safetensors")
    weights[f"{name}.weight"] += (up @ down) * 0.5
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})

    for swap in MODES:
        driver = start(swap=swap)
        expected = driver.load(merged, "merged")
        loaded = driver.load(tiny, "tuned", replaces="m", adapter_dir=str(adapter))
        assert isinstance(expected, ModelLoaded)
        assert isinstance(loaded, ModelLoaded)
        assert loaded.weights_hash == expected.weights_hash
        tokens = driver.generate(PROMPT, "tuned", max_tokens=30)
        assert tokens == driver.generate(PROMPT, "merged", max_tokens=30) != answers["m"]
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 3}), encoding="utf-8")
        failure = driver.load(tiny, "bad", replaces="tuned", adapter_dir=str(adapter))
        (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        assert isinstance(failure, ModelLoadFailed)
        assert "does not fit the base model" in failure.message
        assert driver.generate(PROMPT, "tuned", max_tokens=30) == tokens


def test_weights_go_with_their_last_request(start: Start, other_tiny: Path) -> None:
    driver = start()
    driver.load(other_tiny, "new")
    model = weakref.ref(driver.engine._weights.find("new").model)  # type: ignore[union-attr]
    driver.add("last", PROMPT, "new")
    driver.step()
    driver.unload("new")
    gc.collect()
    assert model() is not None
    driver.finish()
    driver.step()
    assert len(driver.tokens("last")) == 12
    assert ModelUnloaded(model_id="new") in driver.events
    gc.collect()
    assert model() is None


def test_a_second_load_of_the_same_weights_is_answered_at_once(start: Start, tiny: Path, other_tiny: Path) -> None:
    driver = start()
    first = driver.load(other_tiny, "new")
    again = driver.load(other_tiny, "new")
    assert isinstance(first, ModelLoaded)
    assert isinstance(again, ModelLoaded)
    assert again.weights_hash == first.weights_hash
    other = driver.load(tiny, "new")
    assert isinstance(other, ModelLoadFailed)
    assert "new is loaded already" in other.message


def test_when_the_old_weights_cannot_be_read_again_either_that_is_said(
    start: Start, tiny: Path, tmp_path: Path, answers: dict[str, list[int]]
) -> None:
    driver = start(swap="drain")
    first = tmp_path / "first"
    shutil.copytree(tiny, first)
    driver.load(first, "first", replaces="m")
    shutil.rmtree(first)
    failure = driver.load(damaged_copy(tiny, tmp_path / "bad"), "new", replaces="first")
    assert isinstance(failure, ModelLoadFailed)
    assert "then first could not be read again and is no longer loaded" in failure.message
    driver.add("a", PROMPT, "first")
    driver.step()
    assert driver.failed["a"].kind == "unavailable"
    driver.load(tiny, "m")
    assert driver.generate(PROMPT, max_tokens=30) == answers["m"]


@pytest.mark.parametrize(
    ("swap", "free", "mode"),
    [("auto", 12, "overlap"), ("auto", 10, "drain"), ("overlap", 1, "overlap"), ("drain", 99, "drain")],
)
def test_auto_overlaps_where_memory_holds_two_sets(swap: SwapMode, free: int, mode: str) -> None:
    chosen, reason = choose_mode(swap, 10 * 10**9, free * 10**9)
    assert chosen == mode
    assert reason == ("asked for" if swap != "auto" else f"a second set takes 10.00 GB, {free}.00 GB are free")


def test_a_load_in_the_background_leaves_the_others_their_threads() -> None:
    before = torch.get_num_threads()
    finished = threading.Event()
    future = in_background(torch.get_num_threads, finished.set)
    assert finished.wait(10)
    assert future.result() == 1
    assert torch.get_num_threads() == before
