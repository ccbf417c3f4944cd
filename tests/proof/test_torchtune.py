"""SmolLM2-135M-Instruct through torchtune's configuration and commands, and the blog's figures with true values."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lm.device import choose_dtype
from tests.proof.conftest import IDENTITY
from tests.support.server import TUNESERVE
from tests.support.torchtune_home import DATA, seed_yaml

pytestmark = pytest.mark.slow

STEPS = 16
NUM_TOKENS = 26
"""What the blog's answer had, by its own figures."""
FIGURES = (
    "Time for inference",
    "Bandwidth achieved",
    "Memory used",
    "Time to first token",
    "Decode only",
)


def write_config(folder: Path, model: Path) -> Path:
    """The seed's YAML over SmolLM2, which has a tokenizer.json in place of Meta's file."""
    records = json.loads(IDENTITY.read_text(encoding="utf-8"))
    (folder / DATA).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    text = seed_yaml(model, folder / "out")
    (folder / "x.yaml").write_text(text.replace("original/tokenizer.model", "tokenizer.json"), encoding="utf-8")
    return folder / "x.yaml"


def tuneserve(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*TUNESERVE, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_seeds_configuration_trains_and_generates_on_the_real_model(
    smollm2: Path, tmp_path: Path, figure: Callable[[str, object], None]
) -> None:
    config = write_config(tmp_path, smollm2)
    fast = f"dtype={choose_dtype('auto', torch.device('cpu')).name}"  # the file's bf16 outlasts a test without its instructions
    taken = ["device=cpu", fast, "epochs=1", f"max_steps_per_epoch={STEPS}"]
    run = tuneserve(tmp_path, "run", "full_finetune_single_device", "--config", str(config), *taken)
    losses = [float(loss) for loss in re.findall(r"\|Loss: (\d+\.\d{5}):", run.stderr)]
    assert sum(losses[-4:]) < sum(losses[:4])
    figure("torchtune's YAML on SmolLM2, loss of the first and the last step", [losses[0], losses[-1]])
    checkpoint = Path(run.stdout.splitlines()[-1])
    asked = [
        f"checkpointer.checkpoint_dir={checkpoint}",
        "device=cpu",
        fast,
        f"max_new_tokens={NUM_TOKENS}",
        "temperature=0",
    ]
    done = tuneserve(tmp_path, "run", "generate", "--config", str(config), *asked)
    figure("tuneserve generate on SmolLM2", repr(done.stdout))
    for name in FIGURES:
        [line] = [line for line in done.stderr.splitlines() if name in line]
        figure("tuneserve generate on SmolLM2", line[line.index(name) :])
    assert float(re.findall(r"Memory used: (\d+\.\d\d) GB", done.stderr)[0]) > 0.2
