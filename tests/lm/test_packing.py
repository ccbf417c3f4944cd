"""Packed rows and masks: several documents in a row equal each alone, and gradients equal those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from lm.config import FAMILIES
from lm.model import CausalLM
from lm.ops import REFERENCE
from tests.support.families import difference, make, names_of, positions_of, random_ids, worst
from tests.support.tiny import load_tiny_model

Figure = Callable[[str, object], None]
every_family = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class Packed:
    """One row that holds several sequences and padding."""

    ids: Tensor
    positions: Tensor
    documents: Tensor | None
    labels: Tensor


def pack(sequences: list[Tensor], padding: int) -> Packed:
    """Labels are the tokens to come within a document."""
    parts = [*sequences, torch.full((padding,), 2)]
    numbers = [torch.full_like(part, number) for number, part in enumerate(parts)]
    labels = [torch.cat((part[1:], torch.tensor([-100]))) for part in sequences] + [torch.full((padding,), -100)]
    positions = [torch.arange(len(part)) for part in parts]
    return Packed(*(torch.cat(columns)[None] for columns in (parts, positions, numbers, labels)))


def losses_of(model: CausalLM, packed: Packed) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and the summed loss of one row."""
    logits = model.logits(model(packed.ids, packed.positions, documents=packed.documents))[0]
    return logits, F.cross_entropy(logits, packed.labels[0], reduction="sum")


def gradients_of(model: CausalLM, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_equal_separate_sequences(
    family: str, checkpointing: bool, tmp_path: Path, figure: Figure
) -> None:
    how = f"{family}, packed documents{', recomputed' if checkpointing else ''}"
    sequences = [random_ids(length, seed=length) for length in (50, 1, 33, 70)]
    logits_apart, gradients_apart = {}, {}
    for name in names_of(family):
        for ops in (None, REFERENCE):
            model = load_tiny_model(make(tmp_path / name, family, name), ops=ops)
            model.checkpoint_activations = checkpointing
            logits, loss = losses_of(model, pack(sequences, padding=9))
            alone = [losses_of(model, replace(pack([ids], 0), documents=None)) for ids in sequences]
            expected = torch.cat([part for part, _ in alone])
            case = f"{name}, {ops and 'reference'}"
            logits_apart[case] = difference(logits[: len(expected)], expected)
            theirs = gradients_of(model, torch.stack([loss for _, loss in alone]).sum())
            ours = gradients_of(model, loss)
            gradients_apart[case] = relative(ours, theirs)
    figure(f"{how}: largest difference of logits from separate sequences", worst(logits_apart))
    figure(f"{how}: largest relative difference of gradients", worst(gradients_apart))


def relative(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, tensor by tensor, of difference to size. A thousandth of the largest tensor's size is no gradient.

    (Where a token sees itself only, queries and keys have none but rounding.)
    """
    least = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    return max(float((ours[key] - expected[key]).norm()) / max(float(expected[key].norm()), least) for key in ours)


@every_family
def test_gradients_equal_those_of_transformers(family: str, tmp_path: Path, figure: Figure) -> None:
    """The embedding of the padding id gets none on either side."""
    ids, apart = random_ids(2, 60), {}
    for name in names_of(family):
        folder = make(tmp_path / name, family, name)
        model = load_tiny_model(folder)
        logits = model.logits(model(ids, positions_of(ids)))
        ours = gradients_of(model, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs(ids, labels=ids).loss.backward()
        expected = {key: parameter.grad for key, parameter in theirs.named_parameters() if parameter.grad is not None}
        assert set(ours) == set(expected)
        apart[name] = relative(ours, expected)
    figure(f"{family}: largest relative difference of gradients from transformers", worst(apart))


def masks_made(model: CausalLM, ids: Tensor, documents: Tensor | None) -> list[int | None]:
    """The windows for which one forward makes a mask."""
    made: list[int | None] = []

    def causal_mask(input_ids: Tensor, documents: Tensor | None, window: int | None) -> Tensor:
        made.append(window)
        return REFERENCE.causal_mask(input_ids, documents, window)

    model.ops = replace(model.ops, causal_mask=causal_mask)
    model(ids, positions_of(ids), documents=documents)
    return made


def test_a_mask_is_made_once_a_window_and_only_where_one_is_needed(tmp_path: Path) -> None:
    one = load_tiny_model(make(tmp_path / "one", "mistral", "window"))
    two = load_tiny_model(make(tmp_path / "two", "qwen3", "window, upper layer"))
    short, long = random_ids(1, 24), random_ids(1, 25)
    assert [masks_made(one, ids, None) for ids in (short, long)] == [[], [24]]
    assert [masks_made(two, ids, None) for ids in (short, long)] == [[], [24]]
    assert [masks_made(two, ids, torch.zeros_like(ids)) for ids in (short, long)] == [[None], [None, 24]]
