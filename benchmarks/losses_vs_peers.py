"""First losses of our fine-tuning beside what people run: the same model, first weights, batches and rates, in fp32.

    python benchmarks/losses_vs_peers.py MODEL_DIR [--recipes full lora dpo] [--data FILE] [--steps 50] [--batch-size 4]

`full` is held against a plain transformers loop, `lora` against the same with peft, `dpo` (an adapter) and `dpo-full`
against trl's DPOTrainer. Prints both curves and the largest relative difference; exit code 1 when that is above 1e-3.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lm.adapter import save_adapter
from trainer.config import RunConfig
from trainer.data.batches import Batch, epoch_steps
from trainer.progress import Progress
from trainer.recipes import RECIPES
from trainer.run_folder import RunFolder
from trainer.schedule import learning_rate

TOLERANCE = 1e-3
PEERS = {"full": "transformers", "lora": "peft", "dpo": "trl", "dpo-full": "trl"}
EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = {"full": "identity.json", "lora": "identity.json", "dpo": "preferences.json", "dpo-full": "preferences.json"}


def our_losses(config: RunConfig, folder: Path) -> tuple[list[float], list[Batch]]:
    """Train as `python -m trainer` does; the losses, and the batches they belong to. An adapter's first weights are
    left in `start/`."""
    run = RunFolder(folder)
    with Progress(run) as progress:
        recipe = RECIPES[config.recipe](config, run, progress, lambda: None)
        recipe.setup()
        if config.trains_adapter:
            save_adapter(recipe.model, folder / "start", base_model=config.model)
        recipe.train()
    losses = [event["loss"] for event in run.read_events()[0] if event["type"] == "step"]
    rows, options = recipe.data.training, {"batch_size": config.batch_size, "accumulation": 1}
    epochs = (epoch_steps(rows, **options, seed=config.seed, epoch=epoch) for epoch in itertools.count(1))
    steps = itertools.islice(itertools.chain.from_iterable(epochs), len(losses))
    return losses, [batch for (batch,) in steps]


def their_model(config: RunConfig, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    if config.trains_adapter:
        model = PeftModel.from_pretrained(model, str(folder / "start"), is_trainable=True)
    return model.train()


def labels_of(batch: Batch) -> torch.Tensor:
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.target_rows + 1] = batch.targets
    return labels


def rate(config: RunConfig, step: int, num_steps: int) -> float:
    return learning_rate(step, total_steps=num_steps, peak=config.peak_learning_rate, warmup_ratio=config.warmup_ratio)


def loop_losses(config: RunConfig, folder: Path, batches: list[Batch]) -> list[float]:
    """The loop as anybody would write it with transformers. Right padding needs no mask under causal attention."""
    model = their_model(config, folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay)
    losses = []
    for step, batch in enumerate(batches, start=1):
        loss = model(input_ids=batch.input_ids, labels=labels_of(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = rate(config, step, len(batches))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trl_losses(config: RunConfig, folder: Path, batches: list[Batch]) -> list[float]:
    """trl's own trainer, loss and reference, on our batches."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    losses: list[float] = []

    class Recording(DPOTrainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return [preference_batch(batch) for batch in batches]

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            losses.append((found[0] if isinstance(found, tuple) else found).item())
            return found

    model = their_model(config, folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.peak_learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(config, step + 1, len(batches)) / config.peak_learning_rate
    )
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=len(batches),
        beta=config.dpo.beta,
        label_smoothing=config.dpo.label_smoothing,
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=config.batch_size,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    Recording(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * config.batch_size),
        processing_class=AutoTokenizer.from_pretrained(config.model),
        optimizers=(optimizer, schedule),
    ).train()
    return losses


def preference_batch(batch: Batch) -> dict[str, torch.Tensor]:
    labels = labels_of(batch)
    real = torch.zeros_like(labels)
    for row, last in enumerate((labels != -100).int().cumsum(1).argmax(1).tolist()):
        real[row, : last + 1] = 1
    return {"input_ids": batch.input_ids, "attention_mask": real, "completion_mask": (labels != -100).long()}


def compare(
    model: Path, recipe: str, data: Path, *, steps: int, batch_size: int, **options: Any
) -> list[tuple[float, float, float]]:
    """Per step: our loss, theirs, and the relative difference."""
    name, _, update = recipe.partition("-")
    chosen: dict[str, Any] = {
        "model": str(model),
        "data_files": [str(data)],
        "recipe": name,
        "dtype": "fp32",
        "device": "cpu",
        "batch_size": batch_size,
        "epochs": 1000,
        "max_steps": steps,
        "save_every_n_steps": steps,
        **({"dpo": {"update": update or "lora"}} if name == "dpo" else {}),
        **options,
    }
    config = RunConfig.model_validate(chosen)
    with tempfile.TemporaryDirectory() as folder:
        ours, batches = our_losses(config, Path(folder))
        theirs = (trl_losses if name == "dpo" else loop_losses)(config, Path(folder), batches)
    return [(a, b, abs(a - b) / abs(b)) for a, b in zip(ours, theirs, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipes", nargs="+", choices=PEERS, default=["full", "lora", "dpo"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    worst = 0.0
    for recipe in arguments.recipes:
        data = arguments.data or EXAMPLES / DATA[recipe]
        rows = compare(arguments.model, recipe, data, steps=arguments.steps, batch_size=arguments.batch_size)
        print(f"{'step':>4} {'ours':>12} {PEERS[recipe]:>12} {'difference':>12}")
        for step, (ours, theirs, difference) in enumerate(rows, start=1):
            print(f"{step:>4} {ours:>12.6f} {theirs:>12.6f} {difference:>12.2e}")
        largest = max(difference for _, _, difference in rows)
        print(f"{recipe}: largest relative difference of {len(rows)} losses to {PEERS[recipe]}: {largest:.2e}")
        worst = max(worst, largest)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
