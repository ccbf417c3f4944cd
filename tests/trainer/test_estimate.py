"""Estimates beside what the model, the optimizer and the loop really take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.config import ModelConfig, load_config
from lm.lora import LoraSpec, add_lora
from lm.model import CausalLM, build_model
from lm.ops import choose_ops
from tests.support.tiny import make_tiny_model
from trainer.config import TrainingOptions
from trainer.estimate import (
    BYTES,
    Precision,
    _activation_bytes,
    estimate_disk,
    estimate_memory,
    flops_per_token,
    trained_parameters,
)
from trainer.plan import plan_run

CPU = torch.device("cpu")
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama", **sizes)
    return load_config(folder)


def options(**changes: Any) -> TrainingOptions:
    return TrainingOptions.model_validate(changes)


def built(config: ModelConfig, chosen: TrainingOptions, precision: Precision) -> CausalLM:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    stored = dtype if chosen.trains_adapter else torch.float32
    model = build_model(config, device=CPU, dtype=stored, ops=choose_ops(CPU, dtype)[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    if chosen.trains_adapter:
        names = ("rank", "alpha", "dropout", "target_modules", "use_rslora", "use_dora")
        add_lora(model, LoraSpec(**{name: getattr(chosen.lora, name) for name in names}))
    model.checkpoint_activations = chosen.enable_activation_checkpointing
    return model.train()


def kept_for_backward(model: CausalLM, precision: Precision, *, rows: int, length: int) -> int:
    """Bytes of all tensors, weights aside, that one forward pass keeps."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)  # so that no address comes twice
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(5, model.config.vocab_size, (rows, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(ids, torch.arange(length).expand(rows, length))
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "full"},
        {"recipe": "lora"},
        {"recipe": "lora", "lora": {"target_modules": ["q_proj", "v_proj"], "rank": 4}},
        {"recipe": "lora", "lora": {"dropout": 0.1, "rank": 32}},
        {"recipe": "lora", "lora": {"use_dora": True}},
        {"recipe": "full", "enable_activation_checkpointing": True},
    ],
    ids=["full", "lora", "q and v", "dropout", "dora", "checkpointing"],
)
def test_activations_are_estimated_within_a_fifth_of_what_is_kept(
    config: ModelConfig, changes: dict[str, Any], precision: Precision
) -> None:
    chosen = options(**changes, batch_size=4)
    kept = kept_for_backward(built(config, chosen, precision), precision, rows=4, length=96)
    told = _activation_bytes(config, chosen, precision, tokens=4 * 96, length=96, device="cpu")
    if chosen.enable_activation_checkpointing:  # at the end of the forward pass no layer is being recomputed
        whole = options(**changes | {"enable_activation_checkpointing": False})
        told -= _activation_bytes(config, whole, precision, tokens=4 * 96, length=96, device="cpu") // 3
    final_norm = 4 * 96 * 128 * 12
    assert kept == pytest.approx(told + final_norm, rel=0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "full"},
        {"recipe": "lora", "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]}},
        {"recipe": "dpo", "lora": {"use_dora": True}},
    ],
)
def test_trained_parameters_are_those_of_the_model(config: ModelConfig, changes: dict[str, Any]) -> None:
    chosen = options(**changes)
    model = built(config, chosen, "fp32")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained_parameters(config, chosen) == sum(parameter.numel() for parameter in trained)


def test_a_llama_of_8b_needs_what_its_parts_add_up_to() -> None:
    config = ModelConfig.from_dict(LLAMA_8B)
    full = estimate_memory(config, options(recipe="full"), precision="bf16", length=2048, device="npu")
    assert full.weights == full.gradients == 4 * config.num_parameters
    assert full.optimizer == 8 * config.num_parameters
    lora = estimate_memory(config, options(), precision="bf16", length=1024, device="npu")
    assert lora.weights / 1e9 == pytest.approx(16.2, abs=0.1)
    assert lora.total < 60e9 < full.total


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_activation_checkpointing": True},
        {"batch_size": 1},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adafactor"},
        {"optimizer": "sgd"},
        {"optimizer_in_backward": True, "max_grad_norm": None},
    ],
)
def test_what_shall_save_memory_does(config: ModelConfig, changes: dict[str, Any]) -> None:
    config = replace(config, num_hidden_layers=12)
    usual = estimate_memory(config, options(recipe="full"), precision="fp32", length=256)
    saved = estimate_memory(config, options(recipe="full", **changes), precision="fp32", length=256)
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert sum(getattr(saved, part) for part in parts) < sum(getattr(usual, part) for part in parts)
    assert saved.total <= usual.total


def test_accumulation_holds_gradients_beside_activations(config: ModelConfig) -> None:
    one = estimate_memory(config, options(recipe="full"), precision="fp32", length=64)
    many = estimate_memory(config, options(recipe="full", gradient_accumulation_steps=2), precision="fp32", length=64)
    assert one.gradients == many.gradients
    assert one.total < many.total


def test_a_pair_takes_two_rows(config: ModelConfig) -> None:
    sft = estimate_memory(config, options(batch_size=4), precision="fp32", length=64)
    dpo = estimate_memory(config, options(recipe="dpo", batch_size=2), precision="fp32", length=64)
    assert sft == dpo


def test_the_disk_holds_kept_checkpoints_the_merged_model_and_two_states(config: ModelConfig) -> None:
    full = estimate_disk(config, options(recipe="full"), precision="bf16", num_checkpoints=5)
    assert full.checkpoint == BYTES["bf16"] * config.num_parameters
    assert full.total == 5 * full.checkpoint + 2 * full.state
    few = estimate_disk(config, options(recipe="full", keep_last_n_checkpoints=2), precision="bf16", num_checkpoints=5)
    assert few.total == 4 * few.checkpoint + 2 * few.state
    lora = estimate_disk(config, options(), precision="fp32", num_checkpoints=3)
    assert lora.merged == 4 * config.num_parameters
    assert lora.checkpoint == 4 * trained_parameters(config, options())


def test_checkpointing_and_full_training_take_more_operations(config: ModelConfig) -> None:
    lora, full, recomputed = (
        flops_per_token(config, options(**changes), length=64)
        for changes in ({}, {"recipe": "full"}, {"recipe": "full", "enable_activation_checkpointing": True})
    )
    assert lora < full < recomputed


@pytest.mark.parametrize(
    ("changes", "rows", "steps", "checkpoints"),
    [
        ({"epochs": 2}, 100, 50, 2),
        ({}, 8, 48, 3),
        ({}, 1000, 750, 3),
        ({"epochs": 1, "max_steps": 10, "save_every_n_steps": 3}, 100, 10, 4),
        ({"epochs": 3, "batch_size": 8, "gradient_accumulation_steps": 4}, 33, 6, 3),
    ],
)
def test_a_plan_counts_steps_and_checkpoints(changes: dict[str, Any], rows: int, steps: int, checkpoints: int) -> None:
    plan = plan_run(options(**changes), rows)
    assert plan.total_steps == steps
    assert plan.num_checkpoints == checkpoints == sum(map(plan.saves, range(1, steps + 1)))


def test_nothing_of_torch_is_imported() -> None:
    source = Path("trainer/estimate.py").read_text(encoding="utf-8") + Path("trainer/plan.py").read_text("utf-8")
    assert "import torch" not in source
