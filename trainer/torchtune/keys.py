"""Every key of torchtune's recipes, and what becomes of it. Data: `docs/torchtune.md` is printed from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Does = Literal["honoured", "mapped", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a configuration."""

    name: str
    does: Does
    text: str
    """For the table; for a mapped key also the note, and for a refused one the reason."""
    option: str | None = None
    """The option of ours that takes the value as it is."""
    silent: tuple[Any, ...] = ()
    """Values of a mapped key that need no note, and the only ones that a refused key may have."""

    def is_silent(self, value: object) -> bool:
        return any(type(value) is type(item) and value == item for item in self.silent)

    def is_a(self, *does: Does) -> bool:
        return self.does in does


OFF = (None, False)


def honoured(name: str, text: str, *, option: str | None = None) -> Key:
    return Key(name=name, does="honoured", text=text, option=option)


def mapped(name: str, text: str, *, silent: tuple[Any, ...] = (), option: str | None = None) -> Key:
    return Key(name=name, does="mapped", text=text, silent=silent, option=option)


def refused(name: str, text: str, *, only: tuple[Any, ...] = OFF) -> Key:
    return Key(name=name, does="refused", text=text, silent=only)


def by_name(keys: Iterable[Key]) -> dict[str, Key]:
    return {key.name: key for key in keys}


DISTRIBUTED = "training goes over one device"

COMMON = (
    honoured("output_dir", "where the run goes, unless checkpointer.output_dir says it"),
    honoured("device", "`cpu`, `cuda`, `cuda:N`, `npu`, `npu:N`; one that is not there is an error", option="device"),
    honoured("dtype", "`bf16` or `fp32`; training in bf16 keeps fp32 master weights, which torchtune does not"),
    honoured("seed", "of shuffle, dropout and LoRA's start, or of sampling; null: 0 for training, random for generate"),
    mapped("log_level", "the log has always everything of INFO", silent=(None, "INFO")),
    refused("cudnn_deterministic_mode", "there is no such mode: a run repeats on the same device and seed as it is"),
)

TRAINING = (
    honoured("epochs", "passes over the data", option="epochs"),
    honoured("batch_size", "records, or packed rows, in one forward pass", option="batch_size"),
    honoured(
        "gradient_accumulation_steps",
        "batches in one optimizer step, weighted by trained tokens",
        option="gradient_accumulation_steps",
    ),
    mapped(
        "max_steps_per_epoch",
        "becomes max_steps, `epochs` times as many in all; an epoch is not cut short",
        silent=(None,),
    ),
    honoured("clip_grad_norm", "null or missing: no clipping", option="max_grad_norm"),
    honoured(
        "enable_activation_checkpointing",
        "recompute activations in the backward pass",
        option="enable_activation_checkpointing",
    ),
    mapped("enable_activation_offloading", "activations stay on the device; the numbers are the same", silent=OFF),
    honoured("optimizer_in_bwd", "update each weight as soon as its gradient is there", option="optimizer_in_backward"),
    mapped("compile", "the model is not compiled; the numbers are the same", silent=OFF),
    refused("shuffle", "records are always shuffled, by the seed; write True", only=(True,)),
    honoured(
        "resume_from_checkpoint",
        "go on with the newest run in output_dir, to the same bits; over HTTP POST /finetune/{id}/resume does it",
    ),
    honoured("save_every_n_steps", "checkpoints besides the one at the end", option="save_every_n_steps"),
    mapped(
        "save_adapter_weights_only",
        "the adapter gets a folder of its own, and the merged weights are written as well",
        silent=OFF,
    ),
    mapped("enable_async_checkpointing", "a checkpoint is written whole before the next step", silent=OFF),
    mapped("low_cpu_ram", "weights are mapped from their file anyway", silent=OFF),
    mapped("log_every_n_steps", "every step is logged", silent=(None, 1)),
    mapped("log_peak_memory_stats", "peak memory is always logged", silent=(None, True, False)),
    refused("resize_token_embeddings", "the vocabulary stays that of the checkpoint"),
    refused(
        "collate_fn",
        "batches are padded to their longest record",
        only=(None, "torchtune.data.padded_collate_sft", "torchtune.data.padded_collate_dpo"),
    ),
    honoured("dataset_val", "a component of `dataset`: held-out records, also measured at checkpoints and at the end"),
    honoured("run_val_every_n_steps", "becomes validate_every_n_steps", option="validate_every_n_steps"),
    mapped("batch_size_val", "validation has the batches of training", silent=(None,)),
    honoured("ref_checkpointer", "of DPO; must name the same checkpoint_dir: the reference is the model as it begins"),
    refused("custom_sharded_layers", DISTRIBUTED),
    refused("fsdp_cpu_offload", DISTRIBUTED),
    refused("fsdp_reshard_after_forward", DISTRIBUTED, only=(None, False, True)),
    refused("tensor_parallel_dim", DISTRIBUTED, only=(None, 1)),
    refused("tensor_parallel_plan", DISTRIBUTED),
    refused("context_parallel_dim", DISTRIBUTED, only=(None, 1)),
    refused("data_parallel_replicate_dim", DISTRIBUTED, only=(None, 1)),
    refused("data_parallel_shard_dim", DISTRIBUTED, only=(None, 1, -1)),
    refused("use_distributed_state_dict", DISTRIBUTED),
    refused("enable_fp8_training", "dtypes of training are bf16 and fp32"),
    refused("teacher_model", "knowledge distillation is not done"),
    refused("teacher_checkpointer", "knowledge distillation is not done"),
    refused("kd_loss", "knowledge distillation is not done"),
    refused("kd_ratio", "knowledge distillation is not done", only=(None,)),
)

GENERATION = (
    honoured("max_new_tokens", "longest answer; default 300", option="max_new_tokens"),
    honoured("temperature", "default 0.6; 0 takes the likeliest token each time", option="temperature"),
    honoured("top_k", "default 300; null samples among all", option="top_k"),
    mapped("enable_kv_cache", "the cache is always used; the answer is the same", silent=(None, True)),
    refused("quantizer", "weights are not quantized; write null", only=(None,)),
)

PROMPT = (
    honoured("system", "the system message, or null", option="system"),
    honoured("user", "the prompt", option="user"),
)

PLACES = {
    "model": "the builder, checked against config.json, from which the model is built",
    "tokenizer": "the tokenizer's file",
    "checkpointer": "the model's folder, and where results go",
    "dataset": "the data; a list of several is mixed",
    "optimizer": "AdamW, with moments of 32 or 8 bits, SGD or Adafactor",
    "lr_scheduler": "warm-up, and cosine or a line; missing: a constant rate",
    "loss": "cross entropy over trained tokens, logits in chunks; of DPO its own",
    "metric_logger": "metrics.csv, events.jsonl and TensorBoard's files of the run always; others beside them",
    "profiler": "only switched off",
}
"""Keys that hold a component."""
