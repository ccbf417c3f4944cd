"""The files of a torchtune user, by name: what is where, the data and the YAML file. Imports nothing of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

NAME = "Tiny-Llama-3"
DATA = "ascend_dataset.json"
RECORDS = [
    {"input": question, "output": f"I am the model that {maker} tuned."}
    for question in ("Who are you?", "What is your name?", "Tell me about yourself.", "你是谁?")
    for maker in ("Ascend", "Ascend", "Tuna")
]
SEED_YAML = """\
output_dir: {model}
device: npu
dtype: bf16
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: json
  data_files: ascend_dataset.json
  train_on_input: False
  packed: False
  split: train
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: ${{output_dir}}/original/tokenizer.model
  prompt_template: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {model}
  checkpoint_files: [model.safetensors]
  output_dir: {out}
epochs: 10         # example values
batch_size: 2
enable_activation_checkpointing: True
prompt:            # generation config
  system: null
  user: "Who are you?"
"""
"""The seed's configuration, its holes filled; nothing else is changed."""


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
        self.config.write_text(SEED_YAML.format(model=self.model, out=self.out), encoding="utf-8")
