"""The command line as a person uses it: real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from service import __version__
from tests.support.runs import RECORDS
from tests.support.server import running_server
from tests.support.tiny import make_tiny_llama
from trainer.run_folder import RunFolder

LORA = "lora_finetune_single_device"
FULL = "full_finetune_single_device"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one tiny model, and beside it a folder to work in, with a config and data."""
    home = tmp_path_factory.mktemp("home")
    make_tiny_llama(home / "models" / "tiny", max_position_embeddings=1024)
    work = home / "work"
    work.mkdir()
    (work / "data.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    config = {"model": "tiny", "data_files": ["data.json"], "device": "cpu", "dtype": "fp32", "epochs": 1}
    (work / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return home


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", *arguments]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "TUNESERVE_HOME": str(home), "OMP_NUM_THREADS": "1"}


def tuneserve(home: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command_line(*arguments),
        cwd=home / "work",
        env=environment(home),
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_version_is_that_of_the_package(home: Path) -> None:
    result = tuneserve(home, "--version")
    assert result.stdout.decode() == f"tuneserve {__version__}\n"
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "prot=1"], ["prot: unknown field", "port"]),
        (["serve", "port=many"], ["port", "'many'"]),
        (["serve", "port=[1"], ["port", "'[1' cannot be read"]),
        (["serve", "--port=1"], ["'--port=1'", "key=value"]),
        (["serve", "model=absent"], ["model: there is no model 'absent'", "holds tiny", "tuneserve pull absent"]),
        (
            ["serve", "--config", "absent"],
            [
                "config: there is no file absent",
                "full_smollm2, generation, lora_dpo_smollm2, lora_smollm2, serve",
                "tuneserve ls",
            ],
        ),
        (["pull", "gpt-4"], ["'gpt-4'", "smollm2-135m-instruct"]),
        (["pull", "gpt-4", "force=1"], ["'force=1'"]),
        (["pull", "none.gguf"], ["there is no file none.gguf"]),
        (["pull", ".", "--name", "../x"], ["name: '../x'", "--name"]),
        (["run", "train", "--config", "run.yaml"], ["'train'", LORA, FULL]),
        (["run", LORA, "--config", "full_smollm2"], ["recipe", "'full'", "'lora'"]),
        (["run", LORA, "--config", "run.yaml", "epochs=0"], ["epochs", "greater than or equal to 1", "0"]),
        (["run", LORA, "--config", "run.yaml", "lora.ranks=1"], ["lora.ranks", "rank"]),
        (
            ["run", LORA, "--config", "run.yaml", "data_files=[absent.json]"],
            ["data_files: there is no file absent.json"],
        ),
        (["run", LORA, "--config", "run.yaml", "output_dir=."], ["output_dir", "not an empty folder"]),
        (["run", LORA, "--config", "run.yaml", "output_dir=1"], ["output_dir", "a folder is expected (got 1)"]),
        (["run", LORA, "--config", "run.yaml", "~seed"], ["~seed: there is no 'seed' to remove"]),
        (["run", LORA, "--config", "run.yaml", "--seed", "1"], ["'--seed'", "key=value"]),
        (["run", LORA], ["config: a file or a stock config is needed"]),
        (["run", "ppo_full_finetune_single_device", "--config", "run.yaml"], ["on one device", FULL]),
        (["run", "--nproc_per_node", "2", FULL, "--config", "run.yaml"], ["--nproc_per_node", "torchrun"]),
        (["run", "--nnodes=1", FULL, "--config", "run.yaml"], ["--nnodes=1", "torchrun"]),
        (["generate", "--config", "run.yaml"], ["torchtune's shape", "tuneserve cp generation"]),
        (["generate", "--config", "generation"], ["checkpointer.checkpoint_dir: there is no folder", "holds tiny"]),
        (["run", FULL, "--config", "generation"], ["dataset: this field is required"]),
        (["validate", "run.yaml", "epochs=0"], ["epochs", "greater than or equal to 1"]),
        (["validate", "generation", "quantizer=torchao.Int4"], ["quantizer: weights are not quantized"]),
        (["validate", "generation", "model=os.system"], ["model._component_: 'os.system' is not in the list"]),
        (["cp", "absent"], ["no stock config"]),
        (["cp", "generation", "run.yaml"], ["run.yaml exists already", "--force"]),
        (["cp", "generation", "none/y.yaml"], ["no folder none", "--make-parents"]),
        (["cp", FULL, "x.py"], ["is a recipe"]),
    ],
)
def test_a_mistake_is_said_in_one_line_and_nothing_is_started(
    home: Path, arguments: list[str], words: list[str]
) -> None:
    result = tuneserve(home, *arguments)
    message = result.stderr.decode()
    assert (result.returncode, result.stdout) == (2, b"")
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert not (home / "runs").exists()
    assert not (home / "state").exists()


def test_run_trains_and_shows_what_it_logs(home: Path, tmp_path: Path) -> None:
    options = ["lora.rank=2", "batch_size=8", f"output_dir={tmp_path / 'out'}", "lora.target_modules=[q_proj]"]
    result = tuneserve(home, "run", LORA, "--config", "run.yaml", *options)
    run = RunFolder(tmp_path / "out")
    assert result.returncode == 0, result.stderr.decode()
    head, _, shown = result.stderr.partition(b"\n")
    assert head.decode() == f"run folder: {run.path}"
    assert shown == run.log.read_bytes()
    assert b"1|2|Loss: " in shown
    assert b"100%|" in shown
    outcome = run.read_result()
    assert outcome is not None
    assert outcome.status == "succeeded"
    folders = [Path(line) for line in result.stdout.decode().splitlines()]
    assert folders == [run.adapters / "step_2", run.checkpoints / "step_2"]
    adapter = json.loads((run.adapters / "step_2" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["target_modules"]) == (2, ["q_proj"])


def test_run_takes_a_stock_config_and_its_data_from_the_package(home: Path) -> None:
    options = ["model=tiny", "max_steps=1", "device=cpu", "dtype=fp32", "batch_size=2"]
    result = tuneserve(home, "run", FULL, "--config", "full_smollm2", *options)
    assert result.returncode == 0, result.stderr.decode()
    [checkpoint] = result.stdout.decode().split()
    run = Path(checkpoint).parents[1]
    assert run.parent == home / "runs"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert [Path(file).name for file in config["data_files"]] == ["identity.json"]
    assert config["model_name"] == "tiny"


def start_long_run(home: Path, run: RunFolder) -> subprocess.Popen[bytes]:
    """A run in a session of its own, as a terminal gives it, already in its steps."""
    arguments = command_line("run", FULL, "--config", "run.yaml", "epochs=1000", f"output_dir={run.path}")
    process = subprocess.Popen(
        arguments,
        cwd=home / "work",
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not any(event["type"] == "step" for event in run.read_events()[0]):
        assert process.poll() is None, run.log_tail()
        assert time.monotonic() < deadline, run.log_tail()
        time.sleep(0.05)
    return process


def test_ctrl_c_cancels_a_run_cleanly(home: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out")
    with start_long_run(home, run) as process:
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole foreground group
        assert process.wait(20) == 0
    outcome = run.read_result()
    assert outcome is not None
    assert outcome.status == "cancelled"
    assert not run.is_locked()


def test_a_run_whose_trainer_is_killed_says_so_in_its_exit_code(home: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out")
    with start_long_run(home, run) as process:
        pid = next(event["pid"] for event in run.read_events()[0] if event["type"] == "started")
        os.kill(pid, signal.SIGKILL)
        assert process.wait(20) == 128 + signal.SIGKILL
    assert run.read_result() is None


def test_a_run_with_bad_data_fails_with_the_record(home: Path, tmp_path: Path) -> None:
    (home / "work" / "bad.json").write_text('[{"input": "a", "output": "b"}, {"input": "c"}]', encoding="utf-8")
    options = ["data_files=[bad.json]", f"output_dir={tmp_path / 'out'}"]
    result = tuneserve(home, "run", FULL, "--config", "run.yaml", *options)
    assert result.returncode == 1
    assert "record 2" in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_where_it_answers_and_ends_cleanly_on_a_signal(home: Path, number: signal.Signals) -> None:
    with running_server(home, "model=tiny", "device=cpu", "dtype=fp32") as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert children, "the engine is a child"
        server.process.send_signal(number)
        assert server.process.wait(30) == 0
    ready = [line for line in server.log if line.startswith("TuneServe is ready")]
    assert ready == [f"TuneServe is ready at {server.url} and serves tiny\n"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert "Traceback" not in "".join(server.log)


def test_serve_names_a_port_that_is_taken(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = tuneserve(home, "serve", "model=tiny", f"port={port}")
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr.decode()


def test_serve_ends_with_the_reason_where_its_engine_cannot_start(home: Path) -> None:
    result = tuneserve(home, "serve", "model=tiny", "port=0", "device=cuda:7")
    assert result.returncode == 1
    assert result.stdout == b""
    assert "cuda:7" in result.stderr.decode()
