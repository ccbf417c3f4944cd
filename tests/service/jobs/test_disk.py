from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from lm.config import load_config
from service.jobs.disk import SPARE_BYTES, NoDiskSpaceError, check_disk_space
from tests.support.jobs import SHORT, running_bench
from tests.support.tiny import make_tiny_llama
from trainer.config import TrainingOptions
from trainer.option_groups import LoraConfig


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def test_a_run_that_does_not_fit_is_refused_with_the_figures(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, SPARE_BYTES + (8 << 30))
    full = TrainingOptions(recipe="full")
    check_disk_space(tmp_path, full, base=model, data_bytes=0)
    with pytest.raises(NoDiskSpaceError, match=r"at least 10\.\d\d GB, and there are 8\.72 GB free"):
        check_disk_space(tmp_path, full, base=model, data_bytes=10**10)


def test_a_full_run_needs_its_state_too_and_an_adapter_little(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each number 2 bytes that are published, and twice the 12 of the state."""
    num_parameters = load_config(model).num_parameters
    with_free(monkeypatch, SPARE_BYTES + 25 * num_parameters)
    check_disk_space(tmp_path, TrainingOptions(recipe="lora", lora=LoraConfig(rank=1)), base=model, data_bytes=0)
    with pytest.raises(NoDiskSpaceError):
        check_disk_space(tmp_path, TrainingOptions(recipe="full"), base=model, data_bytes=0)


def test_what_an_earlier_trainer_wrote_counts(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, SPARE_BYTES)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "model.safetensors").write_bytes(bytes(10_000_000))
    check_disk_space(tmp_path, TrainingOptions(recipe="full"), base=model, data_bytes=0)


def test_such_a_job_fails_before_a_trainer_starts_and_can_be_resumed(
    tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            with_free(monkeypatch, 1000)
            job = await bench.finished(bench.supervisor.submit(**bench.columns(SHORT)))
            assert job.error is not None
            assert (job.error.code, job.pid) == ("no_disk_space", None)
            assert [name for name, _ in bench.arbiter.asked] == ["make_room", "give_back"]
            monkeypatch.undo()
            bench.supervisor.resume(job.id)
            assert (await bench.training(job)).attempt == 2

    asyncio.run(work())
