from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lm.checkpoint import load_weights
from lm.config import load_config
from lm.lora import add_lora
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE
from lm.tokenizer import load_tokenizer
from tests.support.runs import make_run
from tests.support.tiny import make_tiny_model
from tests.support.tiny_tokenizers import make_tiktoken_file
from trainer.config import load_run_config
from trainer.model_setup import lora_spec
from trainer.outcome import NoDiskSpace
from trainer.publish import Publisher


def publisher_and_model(folder: Path, model_folder: Path, recipe: str) -> tuple[Publisher, CausalLM]:
    run = make_run(folder, model_folder, recipe=recipe)
    config = load_run_config(run.config)
    cpu, fp32 = torch.device("cpu"), torch.float32
    model = build_model(load_config(model_folder), device=cpu, dtype=fp32, ops=REFERENCE)
    if recipe == "lora":
        add_lora(model, lora_spec(config))
    return Publisher(config, run, fp32), model


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_run_that_would_fill_the_disk_is_refused_with_figures(tmp_path: Path, tiny_llama: Path, recipe: str) -> None:
    publisher, model = publisher_and_model(tmp_path / "run", tiny_llama, recipe)
    publisher.check_disk_space(model, num_saves=3)
    with pytest.raises(NoDiskSpace, match=r"publish 1000000000 checkpoints, \d+\.\d\d GB in all, .* GB free in"):
        publisher.check_disk_space(model, num_saves=1_000_000_000)


def test_adapters_take_less_than_models(tmp_path: Path, tiny_llama: Path) -> None:
    sizes = {}
    for recipe in ("full", "lora"):
        publisher, model = publisher_and_model(tmp_path / recipe, tiny_llama, recipe)
        with pytest.raises(NoDiskSpace) as caught:
            publisher.check_disk_space(model, num_saves=1_000_000_000)
        sizes[recipe] = float(str(caught.value).split(" GB in all")[0].rpartition(" ")[2])
    assert sizes["full"] == pytest.approx(1e9 * load_config(tiny_llama).num_parameters * 4 / 1e9, rel=1e-3)
    assert sizes["lora"] < sizes["full"]


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_model_trained_with_another_tokenizer_is_published_with_it(tmp_path: Path, recipe: str) -> None:
    tokenizer_file = tmp_path / "tokenizer.model"
    make_tiktoken_file(tokenizer_file)
    base = make_tiny_model(tmp_path / "base", "llama", vocab_size=1024)
    run = make_run(tmp_path / "run", base, recipe=recipe, tokenizer_file=str(tokenizer_file))
    config = load_run_config(run.config)
    model = build_model(load_config(base), device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
    load_weights(model, base)
    if recipe == "lora":
        add_lora(model, lora_spec(config))
    *_, (_, folder) = Publisher(config, run, torch.float32).publish(model, 1, final=True)
    text = "Who are you? 你是谁?"
    ids = load_tokenizer(run.path / folder).encode(text)
    assert ids == load_tokenizer(base, tokenizer_file).encode(text)
    assert ids != load_tokenizer(base).encode(text)
