"""A pull from a hub: the real client against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.hub import wanted
from tests.support.hub_server import REPO, STEP, Hub
from tests.support.layouts import write_layout
from tests.support.tiny import load_tiny_model, make_tiny_llama

TOKEN, WRONG = "hf_secretsecret", "hf_wrongwrong"
WEIGHTS = "model.safetensors"
NAME = REPO.split("/")[1]
CODE = "import sys; from service.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = make_tiny_llama(tmp_path / "published")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('never run')")
    (folder / "tiny.gguf").write_bytes(b"not needed")
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    (folder / "LICENSE.txt").write_text("free")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with Hub(published) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


@pytest.fixture
def large_hub(hub: Hub) -> Hub:
    """Its weights are 31 MB."""
    make_tiny_llama(hub.folder, hidden_size=512, intermediate_size=2048)
    return hub


def spawn(url: str, home: Path, *arguments: str, token: str | None = None, **env: str) -> subprocess.Popen[str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours |= {"HF_HOME": str(home / "cache"), "HF_ENDPOINT": url} | env
    ours |= {} if token is None else {"HF_TOKEN": token}
    command = [sys.executable, "-c", CODE, "pull", *arguments, "--home", str(home)]
    return subprocess.Popen(command, env=ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(url: str, home: Path, *arguments: str, token: str | None = None, **env: str) -> tuple[int, str, str]:
    process = spawn(url, home, *arguments, token=token, **env)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def refusal(url: str, home: Path, source: str = REPO, token: str | None = None, **env: str) -> str:
    """The one line that the user reads, where nothing must be there afterwards."""
    code, output, errors = run(url, home, source, token=token, **env)
    assert (code, output) == (2, "")
    assert not [path for path in (home / "models").iterdir() if not path.name.startswith(".")]
    (line,) = [line for line in errors.splitlines() if not line.startswith("downloading ")]
    assert line.startswith(f"tuneserve: error: model: {source}: ")
    return line


def partial_size(home: Path) -> int:
    return sum(path.stat().st_size for path in (home / "models").rglob(f"{WEIGHTS}.part"))


def test_a_pulled_model_is_what_was_published_and_loads_here_and_in_transformers(hub: Hub, tmp_path: Path) -> None:
    code, output, errors = run(hub.url, tmp_path, REPO)
    folder = tmp_path / "models" / NAME
    assert (code, output) == (0, f"{folder}\n"), errors
    left_out = {"modeling_tiny.py", "tiny.gguf", "pytorch_model.bin"}
    assert {path.name for path in folder.iterdir()} == {path.name for path in hub.folder.iterdir()} - left_out
    assert all(path.read_bytes() == (hub.folder / path.name).read_bytes() for path in folder.iterdir())
    assert not hub.names & left_out
    load_tiny_model(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert {path.name for path in folder.parent.iterdir()} == {NAME, f".{NAME}.lock"}


def test_a_second_pull_says_that_the_model_is_there_and_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    run(hub.url, tmp_path, REPO)
    asked = len(hub.requests)
    code, output, errors = run(hub.url, tmp_path, REPO)
    assert (code, output) == (0, f"{tmp_path / 'models' / NAME}\n")
    assert "is there already" in errors
    assert len(hub.requests) == asked


def test_a_revision_and_a_name_are_heeded(hub: Hub, tmp_path: Path) -> None:
    code, output, errors = run(hub.url, tmp_path, f"{REPO}@v1", "--name", "mine")
    assert (code, output) == (0, f"{tmp_path / 'models' / 'mine'}\n"), errors
    assert "no such revision" in refusal(hub.url, tmp_path / "other", f"{REPO}@v9")


@pytest.mark.parametrize("layout", ["pytorch_model.bin", "original/consolidated.00.pth"])
def test_without_safetensors_torchs_own_files_come(layout: str, hub: Hub, tmp_path: Path, published: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    shutil.rmtree(published)
    write_layout(base, published, layout)
    assert not (published / WEIGHTS).exists()
    code, _, errors = run(hub.url, tmp_path, REPO)
    assert code == 0, errors
    folder = tmp_path / "models" / NAME
    assert {path.relative_to(folder) for path in folder.rglob("*")} == {
        path.relative_to(published) for path in published.rglob("*")
    }


def test_the_token_is_sent_and_never_printed(hub: Hub, tmp_path: Path) -> None:
    hub.token = TOKEN
    line = refusal(hub.url, tmp_path, token=WRONG)
    assert "HF_TOKEN is not set or not valid" in line
    assert WRONG not in line
    assert "or it is private: check the spelling, and HF_TOKEN" in refusal(hub.url, tmp_path)
    code, output, errors = run(hub.url, tmp_path, REPO, token=TOKEN)
    assert code == 0, errors
    assert TOKEN not in output + errors
    assert hub.tokens == {None, f"Bearer {WRONG}", f"Bearer {TOKEN}"}


def test_a_gated_model_is_refused_with_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    assert "it is gated: accept its terms on its page on the hub, and set HF_TOKEN" in refusal(hub.url, tmp_path)


def test_an_unknown_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    assert "the hub has no such model" in refusal(hub.url, tmp_path, "org/none")


def test_a_hub_that_is_not_there_or_forbidden_is_refused_with_what_to_check(tmp_path: Path) -> None:
    assert "Check the network, HF_ENDPOINT and the proxy" in refusal("http://127.0.0.1:9", tmp_path)
    assert "HF_HUB_OFFLINE forbids" in refusal("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_it_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.sizes = {WEIGHTS: 10**16}
    code, _, errors = run(hub.url, tmp_path, REPO)
    assert code == 2
    assert "bytes are to be downloaded, and" in errors
    assert "free some" in errors
    assert hub.names == set()


def test_a_killed_pull_is_resumed_in_the_middle_of_a_file(large_hub: Hub, tmp_path: Path) -> None:
    size = (large_hub.folder / WEIGHTS).stat().st_size
    assert size > 30_000_000
    large_hub.stop_at = 25 * STEP
    first = spawn(large_hub.url, tmp_path, REPO)
    assert large_hub.stopped.wait(60)
    while not (kept := partial_size(tmp_path)):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert not (tmp_path / "models" / NAME).exists()
    kept, large_hub.stop_at, large_hub.sent = partial_size(tmp_path), None, 0
    large_hub.requests.clear()
    code, _, errors = run(large_hub.url, tmp_path, REPO)
    assert code == 0, errors
    assert large_hub.requests[0] == (WEIGHTS, f"bytes={kept}-")
    assert WEIGHTS in large_hub.names
    assert "config.json" not in large_hub.names, "it was there"
    assert large_hub.sent < size - kept + 100_000
    folder = tmp_path / "models" / NAME
    assert (folder / WEIGHTS).read_bytes() == (large_hub.folder / WEIGHTS).read_bytes()
    assert {path.name for path in folder.parent.iterdir()} == {NAME, f".{NAME}.lock"}


def test_a_cut_connection_is_taken_up_again(large_hub: Hub, tmp_path: Path) -> None:
    large_hub.cut_at = 25 * STEP
    code, _, errors = run(large_hub.url, tmp_path, REPO)
    assert code == 0, errors
    ranges = [asked for name, asked in large_hub.requests if name == WEIGHTS]
    assert ranges[0] is None
    assert len(ranges) == 2
    assert (tmp_path / "models" / NAME / WEIGHTS).read_bytes() == (large_hub.folder / WEIGHTS).read_bytes()


def test_weights_that_arrive_damaged_are_refused_and_not_kept(large_hub: Hub, tmp_path: Path) -> None:
    large_hub.damaged = True
    code, _, errors = run(large_hub.url, tmp_path, REPO)
    assert code == 2
    assert f"{WEIGHTS} arrived damaged" in errors
    assert partial_size(tmp_path) == 0
    large_hub.damaged = False
    assert run(large_hub.url, tmp_path, REPO)[0] == 0


def test_of_a_repository_only_data_files_with_plain_names_are_wanted() -> None:
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    companions = ["config.json", "tokenizer.model", "LICENSE", "original/tokenizer.model"]
    never = ["code.py", "../model.safetensors", "original/../../config.json", "/etc/x.json", ".gitattributes", "x.gguf"]
    never += ["onnx/model.safetensors", "consolidated.safetensors", "original/consolidated.00.pth", "training_args.bin"]
    assert wanted([*weights, *companions, *never]) == [*weights, *companions]
