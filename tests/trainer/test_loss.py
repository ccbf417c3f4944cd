from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.loss import cross_entropy

NUM_ROWS, HIDDEN, VOCAB = 11, 16, 50


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(VOCAB, (NUM_ROWS,), generator=generator)


@pytest.mark.parametrize("rows", [1, 4, NUM_ROWS, 1000])
def test_chunks_give_the_plain_loss_and_its_gradients(inputs: tuple[Tensor, Tensor, Tensor], rows: int) -> None:
    hidden, weight, targets = inputs
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, [hidden, weight])
    loss, _ = cross_entropy(hidden, weight, targets, max_logits_bytes=rows * VOCAB * 4)
    assert torch.allclose(loss, plain, rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss * 0.3, [hidden, weight]), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_gradients_are_those_of_the_loss() -> None:
    """Against finite differences in fp64."""
    hidden, weight = (torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64))
    targets = torch.tensor([0, 4, 2])
    step = 1e-3
    loss, _ = cross_entropy(hidden.requires_grad_(), weight, targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    with torch.no_grad():
        for index in [(0, 0), (1, 3), (2, 2)]:
            shift = torch.zeros_like(hidden)
            shift[index] = step
            up, down = (F.cross_entropy((hidden + s) @ weight.T, targets, reduction="sum") for s in (shift, -shift))
            assert gradient[index].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-4, abs=1e-6)


def test_without_gradients_the_loss_is_the_same(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets = inputs
    with torch.no_grad():
        loss, _ = cross_entropy(hidden, weight, targets, max_logits_bytes=3 * VOCAB * 4)
    assert loss.item() == pytest.approx(cross_entropy(hidden, weight, targets)[0].item(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_the_rows_whose_target_is_the_likeliest_are_counted(inputs: tuple[Tensor, Tensor, Tensor], rows: int) -> None:
    hidden, weight, targets = inputs
    likeliest = (hidden @ weight.T).argmax(-1)
    mixed = torch.where(torch.arange(NUM_ROWS) % 3 == 0, likeliest, targets)
    expected = int((mixed == likeliest).sum())
    assert expected >= 4
    _, count = cross_entropy(hidden, weight, mixed, max_logits_bytes=rows * VOCAB * 4)
    assert (count.item(), count.requires_grad) == (expected, False)
    with torch.no_grad():
        assert cross_entropy(hidden, weight, mixed, max_logits_bytes=rows * VOCAB * 4)[1].item() == expected


def test_a_frozen_output_matrix_gets_no_gradient(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets = inputs
    cross_entropy(hidden, weight.detach(), targets)[0].backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_bf16_products_keep_the_loss_and_the_weight_gradient_in_fp32(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets = inputs
    loss, _ = cross_entropy(hidden.bfloat16(), weight, targets, max_logits_bytes=4 * VOCAB * 4)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss.dtype == gradient.dtype == torch.float32
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert loss.item() == pytest.approx(plain.item(), rel=0.02)
    (expected,) = torch.autograd.grad(plain, weight)
    assert F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0).item() > 0.999
