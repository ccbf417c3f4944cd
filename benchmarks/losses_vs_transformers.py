"""First losses of our full fine-tune beside a plain transformers + AdamW loop on the same batches, in fp32.

    python benchmarks/losses_vs_transformers.py MODEL_DIR [--data examples/identity.json] [--steps 20]

Prints both curves and the largest relative difference; exit code 1 when that is above 1e-4.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trainer.config import RunConfig
from trainer.data.batches import Batch, epoch_steps
from trainer.progress import Progress
from trainer.run_folder import RunFolder
from trainer.schedule import learning_rate
from trainer.supervised import SupervisedRecipe

TOLERANCE = 1e-4


def our_losses(config: RunConfig, folder: Path) -> tuple[list[float], list[Batch]]:
    """Train as `python -m trainer` does; the losses, and the batches they belong to."""
    run = RunFolder(folder)
    with Progress(run) as progress:
        recipe = SupervisedRecipe(config, run, progress, lambda: None)
        recipe.setup()
        recipe.train()
    losses = [event["loss"] for event in run.read_events()[0] if event["type"] == "step"]
    examples, options = recipe.data.training, {"batch_size": config.batch_size, "accumulation": 1}
    epochs = (epoch_steps(examples, **options, seed=config.seed, epoch=epoch) for epoch in itertools.count(1))
    steps = itertools.islice(itertools.chain.from_iterable(epochs), len(losses))
    return losses, [batch for (batch,) in steps]


def transformers_losses(config: RunConfig, batches: list[Batch]) -> list[float]:
    """The loop as anybody would write it with transformers. Right padding needs no mask under causal attention."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    losses = []
    for step, batch in enumerate(batches, start=1):
        labels = torch.full_like(batch.input_ids, -100)
        labels.view(-1)[batch.target_rows + 1] = batch.targets
        loss = model(batch.input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, total_steps=len(batches), peak=config.peak_learning_rate, warmup_ratio=config.warmup_ratio
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(model: Path, data: Path, *, steps: int, batch_size: int) -> list[tuple[float, float, float]]:
    """Per step: our loss, theirs, and the relative difference."""
    config = RunConfig(
        model=str(model),
        data_files=(str(data),),
        recipe="full",
        dtype="fp32",
        device="cpu",
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        epochs=1000,
        max_steps=steps,
        save_every_n_steps=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        ours, batches = our_losses(config, Path(folder))
    theirs = transformers_losses(config, batches)
    return [(a, b, abs(a - b) / abs(b)) for a, b in zip(ours, theirs, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "examples" / "identity.json")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    rows = compare(arguments.model, arguments.data, steps=arguments.steps, batch_size=arguments.batch_size)
    print(f"{'step':>4} {'ours':>12} {'transformers':>12} {'difference':>12}")
    for step, (ours, theirs, difference) in enumerate(rows, start=1):
        print(f"{step:>4} {ours:>12.6f} {theirs:>12.6f} {difference:>12.2e}")
    largest = max(difference for _, _, difference in rows)
    print(f"largest relative difference of {len(rows)} losses: {largest:.2e} (allowed: {TOLERANCE:.0e})")
    return 0 if largest <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
