"""transformers' Trainer, with peft for LoRA, on tokenized records.

python transformers_peer.py JOB.json    prints {"trained_tokens_per_second": ..., "peak_memory_bytes": ...}
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


class Collator:
    """Pads to the longest of the batch, as the library's own for seq2seq does, and counts the trained tokens."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(record["ids"]) for record in records)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for record in records:
            ids, pad = record["ids"], width - len(record["ids"])
            labels = [i if trained else -100 for i, trained in zip(ids, record["mask"], strict=True)]
            rows["input_ids"].append(ids + [0] * pad)
            rows["attention_mask"].append([1] * len(ids) + [0] * pad)
            rows["labels"].append(labels + [-100] * pad)
        self.trained.append(sum(label != -100 for labels in rows["labels"] for label in labels[1:]))
        return {name: torch.tensor(values) for name, values in rows.items()}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    records = [json.loads(line) for line in Path(job["records"]).read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["recipe"] == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    steps, collator = StepTimes(), Collator()
    arguments = TrainingArguments(
        output_dir=job["output_dir"],
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=1,
        learning_rate=1e-5,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=0,
    )
    Trainer(model=model, args=arguments, train_dataset=records, data_collator=collator, callbacks=[steps]).train()
    seconds = steps.times[-1] - steps.times[0]
    tokens = sum(collator.trained[1 : len(steps.times)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"trained_tokens_per_second": tokens / seconds, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
