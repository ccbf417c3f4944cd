"""The seed's configuration, unmodified (`device: npu`), trained and generated from on the device, and nowhere else."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.errors import UserError
from service.engine.generate import generate
from tests.npu.simulated.device import SimulatedNpu
from tests.support.torchtune_home import DATA, RECORDS, TorchtuneUser
from trainer.__main__ import StopRequest, run
from trainer.config import RunConfig
from trainer.run_folder import RunFolder
from trainer.strict import parse_options, read_config
from trainer.torchtune import Translation, compare, translate

ROOT = Path(__file__).parents[3]
RECIPE = "full_finetune_single_device"


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> TorchtuneUser:
    """Made elsewhere: transformers would take the simulated torch_npu for the real one."""
    home = tmp_path_factory.mktemp("user")
    subprocess.run([sys.executable, "-m", "tests.support.torchtune_user", str(home)], cwd=ROOT, check=True)
    return TorchtuneUser(home)


@pytest.fixture(scope="module")
def translation(user: TorchtuneUser) -> Translation:
    data = read_config(user.config)
    assert data["device"] == "npu"
    return compare(translate(data, recipe=RECIPE), user.model)


@pytest.fixture(scope="module")
def stop() -> Iterator[StopRequest]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopRequest()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(user: TorchtuneUser, translation: Translation, stop: StopRequest) -> RunFolder:
    """What `tuneserve run` does with the file, in this process, which has the device."""
    folder = RunFolder(user.out)
    folder.path.mkdir()
    config = parse_options(RunConfig, {**translation.options, "data_files": [str(user.data / DATA)]})
    folder.config.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    result = run(folder, stop)
    assert result.status == "succeeded", result.error_message
    return folder


def values(folder: RunFolder, event_type: str, key: str) -> list[Any]:
    events, _ = folder.read_events()
    return [event[key] for event in events if event["type"] == event_type]


def last_checkpoint(folder: RunFolder) -> Path:
    return folder.path / str(values(folder, "checkpoint", "path")[-1])


def test_it_trains_on_the_npu_in_bf16_and_the_loss_falls(trained: RunFolder) -> None:
    assert values(trained, "started", "device") == ["npu:0"]
    assert values(trained, "started", "dtype") == ["bf16"]
    losses, per_epoch = values(trained, "step", "loss"), len(RECORDS) // 2
    assert len(losses) == 10 * per_epoch
    assert sum(losses[-per_epoch:]) < 0.98 * sum(losses[:per_epoch])


def test_the_answer_comes_from_the_npu_with_the_blogs_lines_and_its_true_memory(
    trained: RunFolder, translation: Translation, npu: SimulatedNpu, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert translation.generation is not None
    asked = {"model_dir": str(last_checkpoint(trained)), "max_new_tokens": 8}
    before = npu.memory.allocated
    generated = generate(translation.generation.model_copy(update=asked), lambda text: None)
    assert generated.device == "npu:0"
    assert 1 <= len(generated.token_ids) <= 8
    assert npu.statistics.copies["download"] >= len(generated.token_ids)
    assert generated.peak_memory_bytes >= before + generated.model_bytes * 0.9
    assert "Model is initialized with precision torch.bfloat16." in caplog.messages
    lines = caplog.messages[-5:-2]
    assert re.fullmatch(r"Time for inference: \d+\.\d\d sec total, \d+\.\d\d tokens/sec", lines[0])
    assert re.fullmatch(r"Bandwidth achieved: \d+\.\d\d GB/s", lines[1])
    assert re.fullmatch(r"Memory used: \d+\.\d\d GB", lines[2])


def test_a_second_card_that_is_not_there_is_an_error_and_no_run_on_the_processor(translation: Translation) -> None:
    assert translation.generation is not None
    with pytest.raises(UserError, match="'npu:7' cannot be used: 1 NPU device visible"):
        generate(translation.generation.model_copy(update={"device": "npu:7"}), lambda text: None)
