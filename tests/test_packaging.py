"""The wheel, installed outside the checkout in an environment of its own, is the whole product."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

from service import __version__
from tests.support.server import running_server
from tests.support.tiny import make_tiny_llama

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def tuneserve(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an empty environment that holds our wheel, and sees this one's packages for its dependencies."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    # A folder that a .pth file adds has its own .pth files ignored, such as the one of an editable install of ours.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "tuneserve"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_tiny_llama(home / "models" / "tiny")
    return home


def output(tuneserve: Path, home: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TUNESERVE_HOME"] = str(home)
    process = subprocess.run(
        [tuneserve, *arguments], cwd=home, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return process.stdout + process.stderr


def test_the_wheel_holds_the_packages_with_their_configs_and_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"tuneserve-{__version__}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {
        *("lm", "trainer", "service", "configs", "examples"),
        f"tuneserve-{__version__}.dist-info",
    }
    shipped = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("examples/*.json")]
    assert len(shipped) >= 54
    assert {str(path.relative_to(ROOT)) for path in shipped} <= set(names)
    assert "License-Expression: Apache-2.0" in metadata


def test_the_installed_command_knows_its_version_and_finds_its_configs_and_data(tuneserve: Path, home: Path) -> None:
    assert output(tuneserve, home, "--version") == f"tuneserve {__version__}\n"
    taken = ["model=tiny", f"output_dir={home}"]
    message = output(tuneserve, home, "run", "lora_finetune_single_device", "--config", "lora_smollm2", *taken)
    assert message == f"tuneserve: error: output_dir: {home} is not an empty folder; name a new one\n"


def test_the_installed_command_copies_configs_of_families_and_generates(tuneserve: Path, home: Path) -> None:
    assert output(tuneserve, home, "cp", "qwen3/0.6B_lora_npu", "mine.yaml") == "Copied file to mine.yaml\n"
    assert (home / "mine.yaml").read_bytes() == (ROOT / "configs/qwen3/0.6B_lora_npu.yaml").read_bytes()
    taken = ["~model", "~tokenizer", "checkpointer.checkpoint_dir=tiny", "checkpointer.checkpoint_files=null"]
    taken += ["~checkpointer.model_type", "device=cpu", "max_new_tokens=4"]
    shown = output(tuneserve, home, "run", "generate", "--config", "generation", *taken)
    assert "Time for inference: " in shown, shown


def test_the_installed_service_answers(tuneserve: Path, home: Path) -> None:
    options = ["--config", "serve", "model=tiny", "device=cpu", "dtype=fp32"]
    with running_server(home, *options, command=[str(tuneserve)], cwd=home) as server:
        answer = httpx.post(f"{server.url}/generate", json={"prompt": "hello", "max_tokens": 3}, timeout=60)
        assert answer.status_code == 200, answer.text
        environment = tuneserve.parents[1]
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        [engine] = [Path(f"/proc/{pid}") for pid in children]
        assert str(environment).encode() in (engine / "cmdline").read_bytes()
        assert server.stop() == 0
