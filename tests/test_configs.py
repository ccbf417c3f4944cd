"""The stock configs: every recipe, family and device has one, and each fits the real model that it names."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from lm.config import SUPPORTED_FAMILIES, ModelConfig
from lm.lora import add_lora
from lm.model import build_model
from lm.ops import REFERENCE
from service.shipped import find_config
from tests.support.model_shapes import SHAPES, Shape
from trainer.config import RunConfig, load_run_config
from trainer.model_setup import lora_spec
from trainer.strict import parse_options, read_config
from trainer.torchtune import translate

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {"full": "full_finetune_single_device", "lora": "lora_finetune_single_device"}
DEVICES = ("cpu", "cuda", "npu")
NAMES = [f"{model}_{recipe}_{device}" for model, recipe, device in product(SHAPES, RECIPES, DEVICES)]
MEMORY = re.compile(r"^# Memory: about (\d+) GB, estimated\. (.+)$", re.MULTILINE)
FITS = re.compile(r"Fits (\d+) GB(?: of memory)?\.")
LARGEST_DEVICE_GB = {"cpu": 192, "cuda": 141, "npu": 64}
TOO_LARGE = "No single NPU has that (64 GB at most): take the lora config beside this one."
MARGIN = 0.95
OVERHEAD = 1.5e9
"""The libraries, the device's context, chunks of logits."""


def parts(name: str) -> tuple[Shape, str, str]:
    """The model, the recipe and the device that the name of a config means."""
    model, recipe, device = name.rsplit("_", 2)
    return SHAPES[model], recipe, device


def read(name: str) -> RunConfig:
    return load_run_config(CONFIGS / f"{name}.yaml")


def estimated_memory(config: RunConfig, shape: ModelConfig) -> float:
    """Bytes of a run, from what trainer/recipe.py says of precisions; activations as fused attention needs them."""
    itemsize = 4 if config.device == "cpu" else 2  # on a processor `auto` may be fp32
    weights = shape.num_parameters
    if config.recipe == "full":  # fp32 weights, gradients and two moments; casts where nothing is recomputed
        keeps_casts = itemsize == 2 and not config.enable_activation_checkpointing
        held = weights * (18 if keeps_casts else 16)
    else:
        held = weights * itemsize + num_lora_parameters(config, shape) * 16
    tokens = config.batch_size * min(config.max_seq_len, shape.max_position_embeddings)
    query = shape.num_attention_heads * shape.head_dim
    layer = 6 * shape.hidden_size + 4 * query + 4 * shape.intermediate_size
    layers = shape.num_hidden_layers
    kept = shape.hidden_size * layers + layer if config.enable_activation_checkpointing else layer * layers
    return held + tokens * kept * itemsize + OVERHEAD


def num_lora_parameters(config: RunConfig, shape: ModelConfig) -> int:
    width, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    ends = {"q_proj": width + query, "k_proj": width + key, "v_proj": width + key, "o_proj": query + width}
    ends |= {"gate_proj": width + inner, "up_proj": width + inner, "down_proj": inner + width}
    return shape.num_hidden_layers * config.lora.rank * sum(ends[name] for name in config.lora.target_modules)


def test_there_is_a_config_for_each_recipe_family_and_device_and_no_other() -> None:
    found = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*/*.yaml")}
    assert found == set(NAMES)
    assert len(found) == 48
    assert {shape.config["model_type"] for shape in SHAPES.values()} == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("model", SHAPES)
def test_the_shapes_have_the_number_of_parameters_that_the_models_are_known_for(model: str) -> None:
    shape = SHAPES[model]
    config = ModelConfig.from_dict(shape.config)
    assert config.num_parameters == shape.num_parameters
    built = build_model(config, device=torch.device("meta"), dtype=torch.bfloat16, ops=REFERENCE)
    assert sum(parameter.numel() for parameter in built.parameters()) == shape.num_parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_found_by_its_name_and_says_what_its_path_says(name: str) -> None:
    shape, recipe, device = parts(name)
    assert find_config(name) == CONFIGS / f"{name}.yaml"
    config = read(name)
    assert (config.recipe, config.device, Path(config.model).name) == (recipe, device, shape.name)
    assert config.dtype == ("auto" if device == "cpu" else "bf16")
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"tuneserve run {RECIPES[recipe]} --config {name}" in text
    assert f"tuneserve pull {shape.repository}" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_a_config_fits_its_model(name: str) -> None:
    shape, recipe, _ = parts(name)
    config, model_config = read(name), ModelConfig.from_dict(shape.config)
    assert config.max_seq_len <= model_config.max_position_embeddings
    if recipe == "lora":
        model = build_model(model_config, device=torch.device("meta"), dtype=torch.bfloat16, ops=REFERENCE)
        add_lora(model, lora_spec(config))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert trained == num_lora_parameters(config, model_config)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_how_much_memory_it_takes_and_where_that_fits(name: str) -> None:
    shape, recipe, device = parts(name)
    needed = estimated_memory(read(name), ModelConfig.from_dict(shape.config)) / 1e9
    said = MEMORY.search((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert said is not None
    assert float(said[1]) == pytest.approx(needed, abs=0.51)
    fits = FITS.match(said[2])
    if fits is None:
        assert (said[2], recipe, device) == (TOO_LARGE, "full", "npu")
        assert needed > LARGEST_DEVICE_GB["npu"]
    else:
        assert needed <= MARGIN * int(fits[1])
        assert int(fits[1]) <= LARGEST_DEVICE_GB[device]


def test_torchtunes_own_configuration_is_shipped_as_the_seed_has_it_and_read_whole() -> None:
    translation = translate(read_config(CONFIGS / "full_finetune_torchtune.yaml"), recipe=RECIPES["full"])
    config = parse_options(RunConfig, translation.options)
    assert (config.recipe, config.device, config.dtype, config.epochs, config.batch_size) == (
        "full",
        "npu",
        "bf16",
        10,
        2,
    )
    assert config.enable_activation_checkpointing
    assert config.tokenizer_file == f"{config.model}/original/tokenizer.model"
    assert translation.generation is not None


def test_the_config_of_generate_has_torchtunes_values_and_names_a_model_of_its_builders_shape() -> None:
    translation = translate(read_config(CONFIGS / "generation.yaml"), recipe="generate")
    asked = translation.generation
    assert asked is not None
    assert (asked.max_new_tokens, asked.temperature, asked.top_k, asked.seed) == (300, 0.6, 300, 1234)
    assert translation.builder == "torchtune.models.llama3_1.llama3_1_8b"
    assert Path(asked.model_dir).name == SHAPES["llama3_1/8B"].name
