"""A torchtune user's own files and commands, unmodified but for the device: the tiny twin of what the blog shows."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lm.tokenizer import load_tokenizer
from tests.support.server import TUNESERVE, running_server
from tests.support.torchtune_home import NAME, RECORDS, TorchtuneUser
from tests.support.torchtune_user import make_torchtune_user

RECIPE = "full_finetune_single_device"
EPOCHS, STEPS_PER_EPOCH = 10, len(RECORDS) // 2
SETUP_LINES = (
    r"Tokenizer is initialized from file\.",
    r"Model is initialized with precision torch\.bfloat16\.",
    r"Memory stats after model init:",
    r"\n\tCPU peak memory allocation: \d+\.\d\d GiB",
    r"\n\tCPU peak memory reserved: \d+\.\d\d GiB",
    r"\n\tCPU peak memory active: \d+\.\d\d GiB",
    r"Optimizer is initialized\.",
    r"Loss is initialized\.",
)
STEP = re.compile(r"(\d+)\|(\d+)\|Loss: (\d+\.\d{5}):\s+\d+%\|")
SAVED = re.compile(r"Model checkpoint of size \d+\.\d\d GB saved to (\S+)")
GENERATION_LINES = (
    r"Model is initialized with precision torch\.bfloat16\.",
    r"Time for inference: \d+\.\d\d sec total, (\d+\.\d\d) tokens/sec",
    r"Bandwidth achieved: \d+\.\d\d GB/s",
    r"Memory used: (\d+\.\d\d) GB",
    r"Time to first token: \d+\.\d{3} sec for (\d+) tokens of prompt",
    r"Decode only: (\d+\.\d\d) tokens/sec, \d+\.\d\d GB/s read",
)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> TorchtuneUser:
    return make_torchtune_user(tmp_path_factory.mktemp("user"))


def tuneserve(user: TorchtuneUser, *words: str) -> subprocess.CompletedProcess[str]:
    """The command as the user types it, in the folder with the YAML file and the data."""
    environment = {**os.environ, "TUNESERVE_HOME": str(user.home), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [*TUNESERVE, *words], cwd=user.data, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def run(user: TorchtuneUser) -> subprocess.CompletedProcess[str]:
    done = tuneserve(user, "run", RECIPE, "--config", "x.yaml", "device=cpu")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def checkpoint(run: subprocess.CompletedProcess[str]) -> Path:
    return Path(run.stdout.splitlines()[-1])


def find_in_order(patterns: tuple[str, ...], text: str) -> list[re.Match[str]]:
    found: list[re.Match[str]] = []
    for pattern in patterns:
        match = re.compile(pattern).search(text, found[-1].end() if found else 0)
        assert match is not None, f"{pattern} is not there, or not in its place:\n{text}"
        found.append(match)
    return found


def test_training_prints_the_lines_that_the_user_knows(
    run: subprocess.CompletedProcess[str], figure: Callable[[str, object], None]
) -> None:
    for line in find_in_order(SETUP_LINES, run.stderr):
        figure("tuneserve run, tiny Llama", line[0].strip())
    saved = SAVED.search(run.stderr)
    assert saved is not None
    figure("tuneserve run, tiny Llama", saved[0])


def test_training_counts_epochs_and_steps_as_torchtune_does_and_its_loss_falls(
    run: subprocess.CompletedProcess[str], figure: Callable[[str, object], None]
) -> None:
    lines = [found[0] for found in STEP.finditer(run.stderr)]
    figure("tuneserve run, tiny Llama, the first and the last step", f"{lines[0]} ... {lines[-1]}")
    losses = {int(step): (int(epoch), float(loss)) for epoch, step, loss in STEP.findall(run.stderr)}
    assert list(losses) == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert [epoch for epoch, _ in losses.values()] == [1 + n // STEPS_PER_EPOCH for n in range(len(losses))]
    values = [loss for _, loss in losses.values()]
    assert sum(values[-STEPS_PER_EPOCH:]) < 0.98 * sum(values[:STEPS_PER_EPOCH])


def test_the_checkpoint_lies_where_the_config_says_and_loads_in_transformers(
    user: TorchtuneUser, checkpoint: Path
) -> None:
    assert checkpoint.is_relative_to(user.out)
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()


def test_the_checkpoint_has_the_tokenizer_that_it_was_trained_with(checkpoint: Path, user: TorchtuneUser) -> None:
    text = "Who are you? 你是谁?\n\t🙂<|eot_id|>"
    expected = load_tokenizer(user.model).encode(text)
    assert load_tokenizer(checkpoint).encode(text) == expected
    assert Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids == expected


def generation_words(user: TorchtuneUser, checkpoint: Path) -> list[str]:
    """What the user writes into the copied file, here as overrides."""
    return [
        f"output_dir={user.out}",
        f"checkpointer.checkpoint_dir={checkpoint}",
        "checkpointer.checkpoint_files=[model.safetensors]",
        f"tokenizer.path={user.tokenizer_file}",
        "~model",
        "prompt.user=Who are you?",
        "max_new_tokens=24",
    ]


def test_generate_answers_with_the_lines_that_the_user_knows_and_true_values(
    user: TorchtuneUser, checkpoint: Path, figure: Callable[[str, object], None]
) -> None:
    (user.data / "y.yaml").unlink(missing_ok=True)
    copied = tuneserve(user, "cp", "generation", "./y.yaml")
    assert copied.returncode == 0, copied.stderr
    words = [*generation_words(user, checkpoint), "device=cpu"]
    done = tuneserve(user, "run", "generate", "--config", "y.yaml", *words)
    assert done.returncode == 0, done.stderr
    _, speed, _, memory, first, decode = lines = find_in_order(GENERATION_LINES, done.stderr)
    for line in lines:
        figure("tuneserve run generate, tiny Llama", line[0])
    assert float(speed[1]) > 0
    assert float(decode[1]) > 0
    assert float(memory[1]) > 0.05  # a process with torch in it takes more; torchtune printed 0.00
    assert int(first[1]) > 10
    assert done.stdout.strip()
    again = tuneserve(user, "generate", "--config", "y.yaml", *words)
    assert again.stdout == done.stdout


def test_the_users_one_file_serves_for_generate_too(user: TorchtuneUser) -> None:
    done = tuneserve(user, "generate", "--config", "x.yaml", "device=cpu", "max_new_tokens=8")
    assert done.returncode == 0, done.stderr
    find_in_order(GENERATION_LINES, done.stderr)


@pytest.mark.parametrize("words", [("run", RECIPE), ("run", "generate")])
def test_an_npu_without_a_card_is_an_error_with_the_reason_and_nothing_runs_on_the_processor(
    user: TorchtuneUser, words: tuple[str, ...], tmp_path: Path, figure: Callable[[str, object], None]
) -> None:
    out = f"checkpointer.output_dir={tmp_path / 'npu'}"
    done = tuneserve(user, *words, "--config", "x.yaml", *([out] if RECIPE in words else []))
    assert done.returncode in (1, 2)
    reason = re.search(r"device: 'npu' cannot be used: .*(torch_npu|NPU).*", done.stderr)
    assert reason is not None, done.stderr
    figure(f"tuneserve {' '.join(words)}, unmodified, without a card: exit code {done.returncode}", reason[0])
    assert "Model is initialized" not in done.stderr
    assert "|Loss:" not in done.stderr
    assert done.stdout == ""


def wait_for_end(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.2)
        job = client.get(f"/finetune/{job['id']}").json()
    return job


def test_the_service_takes_the_same_file_trains_and_answers_from_it(
    user: TorchtuneUser, figure: Callable[[str, object], None]
) -> None:
    text = user.config.read_text(encoding="utf-8")
    with (
        running_server(user.home, f"model={NAME}", "device=cpu", "dtype=fp32") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        refused = client.post("/finetune", json={"config": text})
        if refused.status_code == 202:  # taken, and then the run itself says why not
            job = wait_for_end(client, refused.json())
            assert job["status"] == "failed"
            assert "device: 'npu' cannot be used" in job["error"]["message"]
        else:
            assert refused.status_code == 400
            assert "device: 'npu' cannot be used" in refused.text
        answer = client.post("/finetune", json={"config": text.replace("device: npu", "device: cpu")})
        assert answer.status_code == 202, answer.text
        assert answer.json()["notes"]
        for note in answer.json()["notes"]:
            figure("POST /finetune with the seed's YAML as config, a note", note)
        job = wait_for_end(client, answer.json())
        assert job["status"] == "succeeded", job["error"]
        request = {"prompt": "Who are you?", "max_tokens": 8, "model": job["fine_tuned_model"]}
        generated = client.post("/generate", json=request)
        assert generated.status_code == 200, generated.text
        figure("POST /finetune with the seed's YAML as config", f"{job['status']}, {job['fine_tuned_model']} answers")
