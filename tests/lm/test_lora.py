"""LoRA beside peft: the same numbers, and adapters that either side can load."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lm.checkpoint import load_weights
from lm.config import load_config
from lm.errors import NotFoundError, UserError
from lm.lora import LINEAR_LAYERS, LoraLinear, LoraSpec, add_lora, lora_parameters, merge_adapter, save_adapter
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE, choose_ops
from tests.support.tiny import make_tiny_llama

# peft reads a property that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 80, 17, 200, 33, 2, 9]])
POSITIONS = torch.arange(IDS.shape[1])[None]
SPEC = LoraSpec(rank=4, alpha=12.0, dropout=0.0, target_modules=LINEAR_LAYERS)
ATTENTION = LoraSpec(rank=3, alpha=3.0, dropout=0.0, target_modules=("v_proj", "q_proj"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "base", attention_bias=True, tie_word_embeddings=False)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = build_model(load_config(folder), device=CPU, dtype=dtype, ops=REFERENCE)
    load_weights(model, folder)
    return model


def adapted(folder: Path, spec: LoraSpec) -> CausalLM:
    """A model with updates that change something."""
    torch.manual_seed(3)
    model = load(folder)
    add_lora(model, spec)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.normal_(std=0.2)
    return model.eval()


def logits(model: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS, POSITIONS))


def their_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_equal(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("spec", [SPEC, ATTENTION])
def test_peft_loads_our_adapter_with_the_same_logits_and_our_merge_equals_both(
    tmp_path: Path, base: Path, spec: LoraSpec
) -> None:
    model = adapted(base, spec)
    save_adapter(model, spec, tmp_path / "adapter", base_model=str(base))
    theirs = peft.PeftModel.from_pretrained(their_base(base), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    plain = load(base)
    assert (logits(model) - logits(plain)).abs().max() > 0.1
    assert_equal(logits(model), expected)
    merge_adapter(plain, tmp_path / "adapter")
    assert_equal(logits(plain), expected)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6)


def test_peft_finds_the_base_model_by_the_adapter_alone(tmp_path: Path, base: Path) -> None:
    model = adapted(base, SPEC)
    save_adapter(model, SPEC, tmp_path / "adapter", base_model=str(base))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32)
    with torch.no_grad():
        assert_equal(logits(model), theirs(IDS).logits)


@pytest.mark.parametrize("target_modules", [["q_proj", "down_proj"], "all-linear", r".*\.1\.mlp\..*_proj"])
def test_an_adapter_made_by_peft_merges_to_the_same_logits(tmp_path: Path, base: Path, target_modules: Any) -> None:
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(their_base(base), config)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model = load(base)
    merge_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert_equal(logits(model), theirs(IDS).logits)


def test_the_merge_is_computed_in_fp32_whatever_the_weights_are(tmp_path: Path, base: Path) -> None:
    save_adapter(adapted(base, SPEC), SPEC, tmp_path / "adapter", base_model="base")
    exact, rounded = load(base), load(base, torch.bfloat16)
    start = rounded.state_dict()["model.layers.0.mlp.up_proj.weight"].float()
    before = exact.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    for model in (exact, rounded):
        merge_adapter(model, tmp_path / "adapter")
    update = exact.state_dict()["model.layers.0.mlp.up_proj.weight"] - before
    merged = rounded.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16
    distance = (merged.float() - (start + update)).abs()
    assert (distance <= (start + update).abs() * 2**-8 + 1e-6).all()  # half a unit in the last of 8 bits


# ---- training


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


def test_gradients_equal_those_of_peft(tmp_path: Path, base: Path) -> None:
    model = adapted(base, SPEC).train()
    save_adapter(model, SPEC, tmp_path / "adapter", base_model=str(base))
    theirs = peft.PeftModel.from_pretrained(their_base(base), str(tmp_path / "adapter"), is_trainable=True).train()
    model.logits(model(IDS, POSITIONS)).square().mean().backward()
    theirs(IDS).logits.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for name, parameter in lora_parameters(model).items():
        grad = expected[f"base_model.model.{name.replace('.weight', '.default.weight')}"]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def test_a_bf16_base_trains_fp32_updates_under_autocast(base: Path) -> None:
    ops, _ = choose_ops(CPU, torch.bfloat16)
    model = build_model(load_config(base), device=CPU, dtype=torch.bfloat16, ops=ops)
    load_weights(model, base)
    add_lora(model, SPEC)
    model.checkpoint_activations = True
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(IDS, POSITIONS)
        loss = model.logits(hidden).float().square().mean()
    loss.backward()
    for name, parameter in lora_parameters(model).items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad.abs().sum() > 0) == ("lora_B" in name)  # A's gradient is zero while B is
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


# ---- adapters that cannot be merged


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    save_adapter(adapted(base, ATTENTION), ATTENTION, tmp_path / "adapter", base_model="name-of-base")
    return tmp_path / "adapter"


def refusal(model: CausalLM, folder: Path) -> str:
    """The reason why `folder` is refused; the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        merge_adapter(model, folder)
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())
    return str(caught.value)


def test_the_config_says_what_peft_needs(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "name-of-base",
        "r": 3,
        "lora_alpha": 3.0,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern = {'q_proj': 2} is not supported"),
        ({"use_rslora": True}, "use_rslora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"peft_type": None}, "peft_type = None is not supported"),
        ({"an_option_of_the_future": 1}, "an_option_of_the_future = 1 is not supported"),
        ({"r": 0}, "r must be a positive int (got 0)"),
        ({"r": 2.5}, "r must be a positive int (got 2.5)"),
        ({"r": 4}, "q_proj.lora_A.weight is (3, 32), and should be (4, 32)"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a positive float (got nan)"),
    ],
)
def test_options_that_change_the_formula_are_refused_by_name(
    adapter: Path, base: Path, change: dict[str, Any], reason: str
) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | change), encoding="utf-8")
    assert reason in refusal(load(base), adapter)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({NAME: None}, f"{NAME} is missing, and should be (3, 32)"),
        ({NAME: torch.ones(3, 33)}, f"{NAME} is (3, 33), and should be (3, 32)"),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}, "lm_head.lora_A.weight is (3, 32), and should"),
        ({NAME.replace("layers.0", "layers.7"): torch.ones(3, 32)}, "should be absent: only linear layers"),
        ({NAME.replace("_A.weight", "_magnitude_vector"): torch.ones(32)}, "should be absent: only linear layers"),
    ],
)
def test_tensors_that_do_not_fit_are_named(adapter: Path, base: Path, change: dict[str, Any], reason: str) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    assert reason in refusal(load(base), adapter)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    model = load(base)
    with pytest.raises(NotFoundError, match="no adapter folder"):
        merge_adapter(model, tmp_path / "nowhere")
    assert "cannot read" in refusal(model, base)
    weights = adapter / "adapter_model.safetensors"
    shutil.copyfile(base / "model.safetensors", weights)
    assert "should be absent" in refusal(model, adapter)
    save_file({}, weights)
    assert "holds no updates" in refusal(model, adapter)
    weights.write_bytes(b"x")
    assert "is not a readable safetensors file" in refusal(model, adapter)
    (adapter / "adapter_config.json").write_text("[]", encoding="utf-8")
    assert "must hold a JSON object" in refusal(model, adapter)
