"""Adapter folders beside peft: either side loads what the other wrote, and what does not fit is refused by name."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.adapter import add_adapter, merge_adapter, save_adapter
from lm.errors import NotFoundError, UserError
from lm.lora import LoraSpec, spec_of
from lm.model import CausalLM
from tests.support.adapters import ATTENTION, IDS, SPEC, SPECS, adapted, assert_equal, load, logits, their_base
from tests.support.tiny import make_tiny_llama

# peft reads a property that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "base", attention_bias=True, tie_word_embeddings=False)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_peft_loads_our_adapter_with_the_same_logits_and_our_merge_equals_both(
    tmp_path: Path, base: Path, spec: LoraSpec
) -> None:
    model = adapted(base, spec)
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
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
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32)
    with torch.no_grad():
        assert_equal(logits(model), theirs(IDS).logits)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("target_modules", [["q_proj", "down_proj"], "all-linear", r".*\.1\.mlp\..*_proj"])
def test_an_adapter_made_by_peft_is_merged_and_trained_on_with_the_same_logits(
    tmp_path: Path, base: Path, target_modules: Any, options: dict[str, Any]
) -> None:
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    theirs = peft.get_peft_model(their_base(base), config)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = theirs(IDS).logits
    merged, further = load(base), load(base)
    merge_adapter(merged, tmp_path / "adapter")
    assert_equal(logits(merged), expected)
    add_adapter(further, tmp_path / "adapter", dropout=0.5)
    assert_equal(logits(further.eval()), expected)
    assert spec_of(further).dropout == 0.5
    save_adapter(further, tmp_path / "again", base_model=str(base))
    tensors, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_the_merge_is_computed_in_fp32_whatever_the_weights_are(tmp_path: Path, base: Path) -> None:
    save_adapter(adapted(base, SPEC), tmp_path / "adapter", base_model="base")
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


# ---- adapters that cannot be merged


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    save_adapter(adapted(base, ATTENTION), tmp_path / "adapter", base_model="name-of-base")
    return tmp_path / "adapter"


def refusal(model: CausalLM, folder: Path) -> str:
    """The reason why `folder` is refused; the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        merge_adapter(model, folder)
    with pytest.raises(UserError, match=re.escape(str(caught.value))):
        add_adapter(model, folder, dropout=0.0)
    assert before.keys() == model.state_dict().keys()
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
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern = {'q_proj': 2} is not supported"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false (got 'yes')"),
        ({"use_dora": True}, "lora_magnitude_vector is missing, and should be (32,)"),
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
