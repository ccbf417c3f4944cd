"""The real trainer on the device: the losses of the CPU, checkpoints, one wait a step, an end when memory runs out."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lm.checkpoint import load_weights
from lm.config import load_config
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE
from tests.npu.simulated.device import SimulatedNpu
from tests.npu.simulated.statistics import HostSyncError
from trainer.__main__ import StopRequest, run
from trainer.data.batches import Batch
from trainer.run_folder import RunFolder, RunResult
from trainer.sums import Means, Sums
from trainer.supervised import SupervisedRecipe

RECORDS = [{"input": f"who is number {n}?", "output": f"the {n}th one, and {'very ' * n}glad"} for n in range(6)]
PAIRS = [
    {"prompt": f"who is number {n}?", "chosen": f"the {n}th one", "rejected": "who" * n + "?"} for n in range(1, 7)
]
METHODS: dict[str, dict[str, Any]] = {
    "DoRA": {"recipe": "lora", "lora": {"use_dora": True, "use_rslora": True}},
    "DPO of an adapter": {"recipe": "dpo", "records": PAIRS, "learning_rate": 1e-3},
    "DPO of the model": {"recipe": "dpo", "records": PAIRS, "learning_rate": 1e-3, "dpo": {"update": "full"}},
    "adamw_8bit": {"recipe": "full", "optimizer": "adamw_8bit"},
    "sgd": {"recipe": "full", "optimizer": {"name": "sgd", "momentum": 0.9}},
    "adafactor": {"recipe": "full", "optimizer": "adafactor", "learning_rate": 1e-2},
    "in backward": {"recipe": "full", "optimizer_in_backward": True, "max_grad_norm": None},
}
TENSORS_PER_BATCH = 4

FineTune = Callable[..., tuple[RunResult, RunFolder]]


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield StopRequest()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def finetune(tmp_path: Path, tiny_llama: Path, stop: StopRequest) -> FineTune:
    """Train three steps in a run folder named after the options."""

    def train(records: list[dict[str, str]] = RECORDS, **options: Any) -> tuple[RunResult, RunFolder]:
        folder = RunFolder(tmp_path / re.sub(r"\W+", "-", "-".join(map(str, options.values()))))
        folder.path.mkdir()
        data = folder.path / "records.jsonl"
        data.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        config = {"model": str(tiny_llama), "data_files": [str(data)], "max_steps": 3, "batch_size": 2, **options}
        folder.config.write_text(yaml.safe_dump(config), encoding="utf-8")
        return run(folder, stop), folder

    return train


def values(folder: RunFolder, event_type: str, key: str) -> list[Any]:
    events, _ = folder.read_events()
    return [event[key] for event in events if event["type"] == event_type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model: CausalLM = build_model(load_config(folder), device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
    load_weights(model, folder)
    return dict(model.state_dict())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_three_steps_have_the_losses_of_the_cpu(recipe: str, packed: bool, finetune: FineTune) -> None:
    losses = {}
    for device in ("npu", "cpu"):
        result, folder = finetune(recipe=recipe, device=device, dtype="fp32", packed=packed, max_seq_len=128)
        assert result.status == "succeeded", result.error_message
        losses[device] = values(folder, "step", "loss")
    assert len(losses["npu"]) == 3
    assert losses["npu"] == pytest.approx(losses["cpu"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_losses_of_the_cpu(method: str, finetune: FineTune) -> None:
    losses = {}
    for device in ("npu", "cpu"):
        result, folder = finetune(device=device, dtype="fp32", **METHODS[method])
        assert result.status == "succeeded", result.error_message
        losses[device] = values(folder, "step", "loss")
    assert losses["npu"] == pytest.approx(losses["cpu"], rel=1e-4)


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_bf16_follows_fp32(recipe: str, finetune: FineTune) -> None:
    losses = {}
    for dtype in ("bf16", "fp32"):
        result, folder = finetune(recipe=recipe, device="npu", dtype=dtype)
        assert result.status == "succeeded", result.error_message
        losses[dtype] = values(folder, "step", "loss")
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_activation_checkpointing_changes_no_loss(finetune: FineTune) -> None:
    losses = []
    for checkpointing in (False, True):
        result, folder = finetune(
            device="npu", dtype="fp32", recipe="full", enable_activation_checkpointing=checkpointing
        )
        assert result.status == "succeeded", result.error_message
        losses.append(values(folder, "step", "loss"))
    assert losses[0] == losses[1]


def test_the_run_says_which_device_it_used(finetune: FineTune) -> None:
    _, folder = finetune(device="npu:0")
    assert values(folder, "started", "device") == ["npu:0"]
    assert values(folder, "started", "device_reason") == ["asked for; 1 NPU device visible"]
    assert values(folder, "started", "dtype") == ["bf16"]
    assert min(values(folder, "step", "peak_memory_bytes")) > 0


def test_the_published_checkpoint_is_the_trained_model(finetune: FineTune, tiny_llama: Path) -> None:
    _, folder = finetune(device="npu", dtype="fp32", recipe="full")
    trained, base = weights(folder.checkpoints / "step_3"), weights(tiny_llama)
    assert trained.keys() == base.keys()
    for name, tensor in trained.items():
        assert tensor.isfinite().all(), name
        assert not torch.equal(tensor, base[name]), name


def test_lora_publishes_an_adapter_and_the_merged_model(finetune: FineTune) -> None:
    _, folder = finetune(device="npu", dtype="fp32", recipe="lora")
    assert (folder.adapters / "step_3" / "adapter_model.safetensors").is_file()
    merged = weights(folder.checkpoints / "step_3")
    assert all(tensor.isfinite().all() for tensor in merged.values())


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_run_that_was_paused_ends_with_the_weights_of_one_that_was_not(
    recipe: str, finetune: FineTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random numbers of the device go on, too: dropout draws them there."""
    options: dict[str, Any] = {"device": "npu", "recipe": recipe, "lora": {"dropout": 0.3}, "learning_rate": 1e-2}
    _, whole = finetune(**options, seed=0)
    original = SupervisedRecipe.train_step

    def pausing(recipe: SupervisedRecipe, batches: list[Batch], rate: float) -> Means:
        os.kill(os.getpid(), signal.SIGUSR1)
        monkeypatch.undo()
        return original(recipe, batches, rate)

    def after_one(recipe: SupervisedRecipe, batches: list[Batch], rate: float) -> Means:
        monkeypatch.setattr(SupervisedRecipe, "train_step", pausing)
        return original(recipe, batches, rate)

    monkeypatch.setattr(SupervisedRecipe, "train_step", after_one)
    result, paused = finetune(**options, seed=0, epochs=3)
    assert result.status == "paused"
    assert values(paused, "paused", "step") == [1]
    assert run(paused, StopRequest(), resume=True).status == "succeeded"
    assert values(paused, "step", "loss") == values(whole, "step", "loss")
    assert weights(paused.checkpoints / "step_3").keys() == weights(whole.checkpoints / "step_3").keys()
    for name, tensor in weights(paused.checkpoints / "step_3").items():
        assert torch.equal(tensor, weights(whole.checkpoints / "step_3")[name]), name


def watch_steps(monkeypatch: pytest.MonkeyPatch, npu: SimulatedNpu) -> None:
    """Forbid every wait in a step but for the upload of its batches and one download of loss and norm."""
    original = SupervisedRecipe.train_step

    def train_step(recipe: SupervisedRecipe, batches: list[Batch], rate: float) -> Means:
        uploads = TENSORS_PER_BATCH * len(batches)
        with npu.statistics.forbid_host_sync("a training step", uploads=uploads, downloads=1):
            return original(recipe, batches, rate)

    monkeypatch.setattr(SupervisedRecipe, "train_step", train_step)


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_step_waits_for_the_device_once(
    recipe: str, finetune: FineTune, npu: SimulatedNpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_steps(monkeypatch, npu)
    result, folder = finetune(device="npu", recipe=recipe, gradient_accumulation_steps=2, epochs=3)
    assert result.status == "succeeded", result.error_message
    assert values(folder, "step", "step") == [1, 2, 3]


def test_a_wait_inside_a_step_would_be_seen(
    finetune: FineTune, npu: SimulatedNpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SupervisedRecipe.sums

    def waiting(recipe: SupervisedRecipe, batch: Batch) -> Sums:
        sums = original(recipe, batch)
        sums.loss.item()
        return sums

    monkeypatch.setattr(SupervisedRecipe, "sums", waiting)
    watch_steps(monkeypatch, npu)
    result, _ = finetune(device="npu")
    assert result.error_message is not None
    assert result.error_message.startswith(HostSyncError.__name__)


def test_memory_that_runs_out_is_an_end_with_figures_and_advice(finetune: FineTune, npu: SimulatedNpu) -> None:
    gc.collect()  # what an earlier run left in cycles must not be freed in this one
    npu.memory.capacity = npu.memory.allocated + (256 << 10)
    result, folder = finetune(device="npu", dtype="fp32", recipe="full")
    assert (result.status, result.error_code) == ("failed", "out_of_memory")
    assert result.error_message is not None
    assert f"{npu.memory.capacity / 2**20:.2f} MiB total capacity" in result.error_message
    assert "lower batch_size (now 2)" in result.error_message
    assert not folder.checkpoints.exists()
