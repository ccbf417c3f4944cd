"""The files of a torchtune user, by name: what is where, the data and the YAML file. Imports nothing of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.support.torchtune_configs import SEED

NAME = "Tiny-Llama-3"
DATA = "ascend_dataset.json"
RECORDS = [
    {"input": question, "output": f"I am the model that {maker} tuned."}
    for question in ("Who are you?", "What is your name?", "Tell me about yourself.", "你是谁?")
    for maker in ("Ascend", "Ascend", "Tuna")
]


def seed_yaml(model: Path, out: Path) -> str:
    """The seed's configuration, its holes filled and `output_dir` defined; nothing else is changed."""
    filled = {
        "checkpoint_dir: ...": f"checkpoint_dir: {model}",
        "checkpoint_files: [..]": "checkpoint_files: [model.safetensors]",
        "output_dir: ...": f"output_dir: {out}",
        'user: "..."': 'user: "Who are you?"',
    }
    text = SEED
    for hole, value in filled.items():
        assert text.count(hole) == 1
        text = text.replace(hole, value)
    return f"output_dir: {model}\n{text.lstrip()}"


@dataclass(frozen=True, slots=True)
class TorchtuneUser:
    home: Path
    """Laid out so that a service can have it as its home, too."""

    @property
    def model(self) -> Path:
        return self.home / "models" / NAME

    @property
    def data(self) -> Path:
        """Where the data set is, and where the commands are typed."""
        return self.home / "data"

    @property
    def config(self) -> Path:
        return self.data / "x.yaml"

    @property
    def out(self) -> Path:
        return self.home / "out"

    @property
    def tokenizer_file(self) -> Path:
        return self.model / "original" / "tokenizer.model"

    def write_data_and_config(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / DATA).write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
        self.config.write_text(seed_yaml(self.model, self.out), encoding="utf-8")
