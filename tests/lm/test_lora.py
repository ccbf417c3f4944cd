"""LoRA and DoRA layers beside peft's: the same numbers forward and backward."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from lm.adapter import save_adapter
from lm.checkpoint import load_weights
from lm.config import load_config
from lm.errors import UserError
from lm.lora import LoraLinear, LoraSpec, add_lora, lora_parameters, without_adapter
from lm.model import build_model
from lm.ops import choose_ops
from tests.support.adapters import (
    ATTENTION,
    CPU,
    DORA,
    IDS,
    POSITIONS,
    SPEC,
    SPECS,
    adapted,
    load,
    logits,
    their_base,
)
from tests.support.tiny import make_tiny_llama

# peft reads a property that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "base", attention_bias=True, tie_word_embeddings=False)


@pytest.mark.parametrize("spec", [SPEC, DORA], ids=["LoRA", "DoRA"])
def test_without_its_adapter_a_model_answers_as_its_base(base: Path, spec: LoraSpec) -> None:
    model, plain = adapted(base, spec), load(base)
    changed = logits(model)
    with without_adapter(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), changed)
    assert not torch.equal(changed, logits(plain))


def test_dora_changes_nothing_at_first_and_its_lengths_are_those_of_the_weights(base: Path) -> None:
    model = load(base)
    before = logits(model)
    add_lora(model, DORA)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(lora_parameters(model))
    for name in trained:
        if "magnitude" in name:
            weight = model.get_parameter(name.replace("lora_magnitude_vector", "weight"))
            assert torch.equal(model.get_parameter(name), weight.norm(dim=1))


def test_an_update_is_zero_at_first_and_drawn_as_peft_draws_it(base: Path) -> None:
    model = load(base)
    before = logits(model)
    torch.manual_seed(11)
    add_lora(model, SPEC)
    assert (logits(model) == before).all()
    torch.manual_seed(11)
    again = load(base)
    add_lora(again, SPEC)
    for name, parameter in lora_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert (parameter == lora_parameters(again)[name]).all()
        bound = 0.0 if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform_(a=sqrt(5))
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() >= 0.9 * bound


def test_only_the_targets_are_trained_and_the_base_keeps_its_names(base: Path) -> None:
    model = load(base)
    names = set(model.state_dict())
    add_lora(model, ATTENTION)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(lora_parameters(model)) == set(model.state_dict()) - names
    modules = {name.rpartition(".lora_")[0] for name in trainable}
    assert modules == {
        f"model.layers.{layer}.self_attn.{target}" for layer in range(2) for target in ("q_proj", "v_proj")
    }
    assert sum(parameter.numel() for parameter in lora_parameters(model).values()) == 2 * 3 * (32 + 32 + 32 + 16)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["all layers", "rank-stabilized", "DoRA"])
def test_gradients_equal_those_of_peft(tmp_path: Path, base: Path, name: str, dropout: float) -> None:
    model = adapted(base, replace(SPECS[name], dropout=dropout)).train()
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
    theirs = peft.PeftModel.from_pretrained(their_base(base), str(tmp_path / "adapter"), is_trainable=True).train()
    torch.manual_seed(7)
    model.logits(model(IDS, POSITIONS)).square().mean().backward()
    torch.manual_seed(7)
    theirs(IDS).logits.square().mean().backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters() if parameter.requires_grad}
    for key, parameter in lora_parameters(model).items():
        module, _, kind = key.partition(".lora_")
        kind = kind.removesuffix(".weight")
        grad = expected[f"base_model.model.{module}.lora_{kind}.default.weight"]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", [SPEC, DORA], ids=["LoRA", "DoRA"])
def test_a_bf16_base_trains_fp32_updates_under_autocast(base: Path, spec: LoraSpec) -> None:
    ops, _ = choose_ops(CPU, torch.bfloat16)
    model = build_model(load_config(base), device=CPU, dtype=torch.bfloat16, ops=ops)
    load_weights(model, base)
    add_lora(model, spec)
    model.checkpoint_activations = True
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(IDS, POSITIONS)
        loss = model.logits(hidden).float().square().mean()
    loss.backward()
    for name, parameter in lora_parameters(model).items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad.abs().sum() > 0) == ("lora_A" not in name)  # A's gradient is zero while B is
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}


def test_dropout_acts_on_the_update_while_training_only(base: Path) -> None:
    layer = LoraLinear(torch.nn.Linear(1000, 1), LoraSpec(rank=1, alpha=1.0, dropout=0.25, target_modules=("q_proj",)))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(1.0 if "lora" in name else 0.0)
    ones = torch.ones(1, 1000)
    assert layer.eval()(ones).item() == 1000
    torch.manual_seed(0)
    dropped = layer.train()(ones).item()
    assert dropped != 1000
    assert abs(dropped - 1000) < 100


def test_a_target_that_is_no_layer_of_a_block_is_refused(base: Path) -> None:
    spec = LoraSpec(rank=2, alpha=2.0, dropout=0.0, target_modules=("q_proj", "lm_head"))
    with pytest.raises(UserError, match=r"target_modules: unknown \['lm_head'\]; choose among \['q_proj'") as caught:
        add_lora(load(base), spec)
    assert caught.value.param == "lora.target_modules"
