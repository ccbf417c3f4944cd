"""Two ways to the same numbers: what saves memory or time must not change what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lm.checkpoint import load_weights
from lm.config import load_config
from lm.model import build_model
from lm.ops import REFERENCE
from tests.support.runs import begin, events, losses, make_run, train_here
from trainer.data.batches import collate
from trainer.data.examples import Example
from trainer.data.packing import join
from trainer.loss import cross_entropy
from trainer.progress import Progress
from trainer.recipe import Recipe

RECIPES = ["full", "lora"]
IDS = torch.tensor([[5, 80, 77, 9, 200, 33, 12, 5, 7, 100]])

Figure = Callable[[str, object], None]


def largest(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_how_a_step_is_divided_into_batches_does_not_change_it(
    tmp_path: Path, tiny_llama: Path, recipe: str, figure: Figure
) -> None:
    """Trained tokens differ from record to record, so a mean of means would show."""
    curves, norms, results = [], [], []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        options: dict[str, Any] = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "epochs": 2}
        run = make_run(tmp_path / f"{batch_size}", tiny_llama, recipe=recipe, learning_rate=1e-3, **options)
        recipe_run = train_here(run)
        curves.append(losses(run))
        norms.append([step["grad_norm"] for step in events(run, "step")])
        results.append(torch.cat([parameter.detach().flatten() for parameter in recipe_run.trained]))
    for other in (1, 2):
        assert curves[other] == pytest.approx(curves[0], rel=1e-5)
        assert norms[other] == pytest.approx(norms[0], rel=1e-4)
        assert torch.allclose(results[other], results[0], rtol=1e-4, atol=1e-5)
    differences = torch.tensor(curves)[1:] / torch.tensor(curves)[0] - 1
    figure(f"8 x 1 = 4 x 2 = 2 x 4, {recipe}: largest relative difference of losses", f"{differences.abs().max():.1e}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_activation_checkpointing_changes_nothing(
    tmp_path: Path, tiny_llama: Path, recipe: str, figure: Figure
) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"enable_activation_checkpointing": True},
        {"enable_activation_checkpointing": True, "activation_checkpointing_interval": 2},
    ]
    dropout = {"dropout": 0.2} if recipe == "lora" else {}
    curves = []
    for number, more in enumerate(options):
        run = make_run(tmp_path / str(number), tiny_llama, recipe=recipe, epochs=1, lora=dropout, **more)
        train_here(run)
        curves.append(losses(run))
    assert curves[0] == curves[1] == curves[2]
    figure(f"checkpointing on = off, {recipe}", f"{len(curves[0])} losses equal to the bit")


def token_losses(recipe: Recipe, rows: list[Example]) -> Tensor:
    """(N,) of each trained token, in the order of the rows."""
    batch = collate(rows)
    with torch.no_grad():
        hidden = recipe.model(batch.input_ids, batch.positions, documents=batch.documents)
        logits = recipe.model.logits(hidden.flatten(0, 1)[batch.target_rows])
    return F.cross_entropy(logits, batch.targets, reduction="none")


def test_a_packed_token_has_the_loss_that_it_has_alone(tmp_path: Path, tiny_llama: Path, figure: Figure) -> None:
    with Progress(run := make_run(tmp_path / "run", tiny_llama, recipe="full")) as progress:
        recipe = begin(run, progress)
    examples = [example for example in recipe.data.training[0:6] if isinstance(example, Example)]
    alone = torch.cat([token_losses(recipe, [example]) for example in examples])
    packed = token_losses(recipe, [join(examples[:4]), join(examples[4:])])
    row = join(examples)
    blurred = token_losses(recipe, [Example(row.ids, row.trained)])
    assert largest(packed, alone) < 1e-5
    assert largest(blurred, alone) > 0.1, "without boundaries there would be a difference"
    figure(f"packed = unpacked: largest difference of {len(alone)} losses of tokens", f"{largest(packed, alone):.1e}")


def test_a_loss_in_chunks_is_the_plain_one(tmp_path: Path, tiny_llama: Path, figure: Figure) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 64, generator=generator).requires_grad_() for size in (300, 1000))
    targets = torch.randint(1000, (300,), generator=generator)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    chunked, _ = cross_entropy(hidden, weight, targets, max_logits_bytes=7 * 4 * 1000)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, [hidden, weight]) for loss in (plain, chunked)]
    difference = max(largest(first, second) for first, second in zip(*gradients, strict=True))
    assert difference < 1e-5
    figure("chunked loss = plain: relative difference", f"{abs(chunked.item() / plain.item() - 1):.1e}")
    figure("chunked loss = plain: largest difference of gradients", f"{difference:.1e}")


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_a_merged_model_computes_what_the_adapted_one_does(
    tmp_path: Path, tiny_llama: Path, more: dict[str, Any], figure: Figure
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, epochs=2, learning_rate=1e-2, lora={"rank": 4, **more})
    adapted = train_here(run).model.eval()
    merged, base = (
        build_model(load_config(tiny_llama), device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
        for _ in range(2)
    )
    load_weights(merged, run.checkpoints / "step_8")
    load_weights(base, tiny_llama)
    with torch.no_grad():
        logits = [model.logits(model(IDS, torch.arange(IDS.shape[1])[None])) for model in (adapted, merged, base)]
    assert largest(logits[0], logits[1]) < 1e-4
    assert largest(logits[0], logits[2]) > 0.1
    name = next(iter(more), "plain")
    figure(f"LoRA merged = unmerged ({name}): largest difference of logits", f"{largest(logits[0], logits[1]):.1e}")
