"""torchtune's data set builders and the keys of a run, on several families, by the command as people type it."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.server import TUNESERVE
from tests.support.tiny import make_tiny_model

ALPACA = [{"instruction": f"Add {n}.", "input": "", "output": str(n)} for n in range(12)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": "Yes"}]} for n in range(12)
]
OPENAI = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "No"}]} for n in range(12)
]
TEXTS = [{"text": f"The quick brown fox {n}"} for n in range(12)]
CASES: dict[str, tuple[str, str, list[Any], dict[str, Any]]] = {
    "alpaca": ("mistral", "lora", ALPACA, {}),
    "chat, sharegpt": (
        "qwen2",
        "full",
        SHAREGPT,
        {"conversation_style": "sharegpt", "conversation_column": "conversations"},
    ),
    "chat, openai": ("qwen3", "full", OPENAI, {"conversation_style": "openai", "conversation_column": "messages"}),
    "text_completion": ("llama", "full", TEXTS, {"column": "text"}),
}


PACKING = (
    "batch_size=1",
    "tokenizer._component_=torchtune.models.llama3.llama3_tokenizer",
    "tokenizer.path=tokenizer.model",
    "tokenizer.max_seq_len=128",
)


def configuration(folder: Path, case: str) -> dict[str, Any]:
    family, _, records, options = CASES[case]
    model = make_tiny_model(folder / "model", family)
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    builder = f"torchtune.datasets.{case.split(',')[0]}_dataset"
    data = {"_component_": builder, "source": "json", "data_files": str(folder / "data.json"), "split": "train[:8]"}
    return {
        "output_dir": str(folder / "out"),
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model),
            "checkpoint_files": ["model.safetensors"],
            "output_dir": "${output_dir}",
        },
        "dataset": {**data, **options},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.002},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 2,
        },
        "device": "cpu",
        "dtype": "fp32",
        "seed": 7,
        "epochs": 2,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps_per_epoch": None,
        "clip_grad_norm": 1.0,
    }


def run(folder: Path, case: str, *words: str) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    config = folder / "x.yaml"
    config.write_text(yaml.safe_dump(configuration(folder, case)), encoding="utf-8")
    recipe = f"{CASES[case][1]}_finetune_single_device"
    done = subprocess.run(
        [*TUNESERVE, "run", recipe, "--config", str(config), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with (Path(done.stdout.splitlines()[-1]).parents[1] / "metrics.csv").open(encoding="utf-8") as table:
        return list(csv.DictReader(table))


@pytest.mark.parametrize("case", CASES)
def test_each_builder_trains_with_the_steps_and_the_rate_that_its_keys_say(tmp_path: Path, case: str) -> None:
    rows = run(tmp_path, case)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]  # 8 records by 2 by 2, twice
    assert [float(row["learning_rate"]) for row in rows][:2] == pytest.approx([0.001, 0.002])
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_keys_change_what_they_name(tmp_path: Path) -> None:
    case = "chat, openai"
    plain = run(tmp_path / "a", case)
    assert losses(run(tmp_path / "b", case)) == losses(plain)
    assert losses(run(tmp_path / "c", case, "seed=8")) != losses(plain)
    assert len(run(tmp_path / "d", case, "gradient_accumulation_steps=1")) == 8
    assert len(run(tmp_path / "e", case, "gradient_accumulation_steps=1", "max_steps_per_epoch=3")) == 6
    everything = run(tmp_path / "f", case, "dataset.train_on_input=True")
    assert int(everything[-1]["trained_tokens"]) > int(plain[-1]["trained_tokens"])
    packed = run(tmp_path / "h", case, "dataset.packed=True", *PACKING)
    assert int(packed[0]["trained_tokens"]) == int(plain[1]["trained_tokens"])


def losses(rows: list[dict[str, str]]) -> list[float]:
    return [float(row["loss"]) for row in rows]
