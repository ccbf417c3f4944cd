"""torchtune's configurations as texts: the one that must run unchanged, and one with most of what a stock one says."""

from __future__ import annotations

from typing import Any

import pytest

from lm.errors import UserError
from trainer.torchtune import apply_overrides, parse_yaml, translate

FULL, LORA = "full_finetune_single_device", "lora_finetune_single_device"

SEED = """
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
  path: ${output_dir}/original/tokenizer.model
  prompt_template: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ...
  checkpoint_files: [..]
  output_dir: ...
epochs: 10         # example values
batch_size: 2
enable_activation_checkpointing: True
prompt:            # generation config
  system: null
  user: "..."
"""
"""The configuration that must run unchanged, character for character; the dots are its own holes."""

STOCK = """
output_dir: /tmp/out
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /m/tokenizer.model, max_seq_len: null}
dataset: {_component_: torchtune.datasets.alpaca_dataset, source: json, data_files: a.json, packed: False}
seed: null
shuffle: True
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 4
  lora_alpha: 8
  lora_dropout: 0.1
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /m
  checkpoint_files: {filename_format: "model-{}-of-{}.safetensors", max_filename: "00002"}
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
save_adapter_weights_only: False
batch_size: 2
epochs: 3
optimizer: {_component_: torch.optim.AdamW, fused: True, weight_decay: 0.1, lr: 3e-4}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
max_steps_per_epoch: 7
gradient_accumulation_steps: 8
clip_grad_norm: 1.0
compile: True
device: cuda
enable_activation_checkpointing: True
enable_activation_offloading: True
dtype: bf16
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: "${output_dir}/logs"}
log_every_n_steps: 1
log_peak_memory_stats: True
log_level: INFO
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: False, output_dir: x, cpu: True, num_cycles: 1}
"""


def stock(*words: str) -> dict[str, Any]:
    return apply_overrides(parse_yaml(STOCK), words)


def refusal(data: dict[str, Any], recipe: str = LORA) -> UserError:
    with pytest.raises(UserError) as caught:
        translate(data, recipe=recipe)
    return caught.value
