from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm.checkpoint import load_weights
from lm.config import load_config
from lm.lora import add_lora, lora_parameters
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE
from lm.tokenizer import load_tokenizer
from tests.support.runs import make_run
from tests.support.tiny import make_tiny_model
from tests.support.tiny_tokenizers import make_tiktoken_file
from trainer.card import CheckpointFacts, read_facts
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


def facts(step: int, *, final: bool = True) -> CheckpointFacts:
    dataset = {"fingerprint": "0a1b", "records": 16}
    figures: dict[str, Any] = {"trained_tokens": 320, "loss": 1.5, "validation_loss": 1.25}
    return CheckpointFacts(step=step, total_steps=4, epoch=1, final=final, dataset=dataset, **figures)


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
    *_, (_, folder) = Publisher(config, run, torch.float32).publish(model, facts(1))
    text = "Who are you? 你是谁?"
    ids = load_tokenizer(run.path / folder).encode(text)
    assert ids == load_tokenizer(base, tokenizer_file).encode(text)
    assert ids != load_tokenizer(base).encode(text)


@pytest.mark.parametrize(("recipe", "kinds"), [("full", ["full"]), ("lora", ["adapter", "merged"])])
def test_each_folder_says_what_it_came_from(tmp_path: Path, tiny_llama: Path, recipe: str, kinds: list[str]) -> None:
    publisher, model = publisher_and_model(tmp_path / "run-7", tiny_llama, recipe)
    published = list(publisher.publish(model, facts(4)))
    assert [kind for kind, _ in published] == kinds
    for kind, path in published:
        told = read_facts(tmp_path / "run-7" / path)
        assert told is not None
        assert (told["job"], told["kind"], told["step"]) == ("run-7", kind, 4)
        assert told["losses"] == {"loss": 1.5, "validation_loss": 1.25}
        assert told["dataset"] == {"names": ["data.json"], "fingerprint": "0a1b", "records": 16}
        assert (tmp_path / "run-7" / path / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_a_resumed_run_leaves_what_it_had_published_and_publishes_the_rest(tmp_path: Path, tiny_llama: Path) -> None:
    publisher, model = publisher_and_model(tmp_path / "run", tiny_llama, "lora")
    [(_, adapter)] = publisher.publish(model, facts(4, final=False))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / adapter).iterdir()}
    published = list(publisher.publish(model, facts(4)))
    assert published == [("adapter", adapter), ("merged", "checkpoints/step_4")]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / adapter).iterdir()} == before


def test_an_adapter_names_the_base_that_it_was_trained_on(tmp_path: Path, tiny_llama: Path) -> None:
    for base, expected in ((None, "org/tiny"), (tiny_llama, "org/tiny"), (tmp_path / "base", str(tmp_path / "base"))):
        run = make_run(tmp_path / f"run-{base and base.name}", tiny_llama, model_name="org/tiny")
        config = load_run_config(run.config)
        model = build_model(load_config(tiny_llama), device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
        add_lora(model, lora_spec(config))
        [(_, path)] = Publisher(config, run, torch.float32, base=base).publish(model, facts(1, final=False))
        said = json.loads((run.path / path / "adapter_config.json").read_text(encoding="utf-8"))
        assert said["base_model_name_or_path"] == expected


def test_checkpoints_that_are_not_kept_need_no_room(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, recipe="full", keep_last_n_checkpoints=1)
    model = build_model(load_config(tiny_llama), device=torch.device("cpu"), dtype=torch.float32, ops=REFERENCE)
    publisher = Publisher(load_run_config(run.config), run, torch.float32)
    publisher.check_disk_space(model, num_saves=1_000_000_000)
    with pytest.raises(NoDiskSpace):
        publisher.check_disk_space(model, num_saves=1, beside=1 << 60)


def test_a_run_in_bf16_merges_in_fp32_all_the_same(tmp_path: Path, tiny_llama: Path) -> None:
    """Under its autocast the product of the adapter's matrices would be rounded."""
    published = []
    for name, is_bf16 in (("fp32", False), ("bf16", True)):
        publisher, model = publisher_and_model(tmp_path / name, tiny_llama, "lora")
        torch.manual_seed(0)
        for parameter in lora_parameters(model).values():
            torch.nn.init.normal_(parameter)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            *_, (_, path) = publisher.publish(model, facts(4))
        published.append(load_file(tmp_path / name / path / "model.safetensors"))
    assert all(torch.equal(tensor, published[1][name]) for name, tensor in published[0].items())
