"""Answers of a model in training against the same model asked token by token without a cache."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.errors import UserError
from lm.lora import LoraSpec, add_lora, lora_parameters
from lm.model import CausalLM
from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from tests.support.runs import make_run
from tests.support.tiny import load_tiny_model, make_tiny_model
from trainer.config import load_run_config
from trainer.samples import Samples, load_samples

PROMPTS = ("Who are you?", "x", "Tell me of the sea, and of what lives there. " * 4)
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {}, "mistral": {"sliding_window": 9}}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), request.param, **MODELS[request.param])


def template_of(folder: Path) -> ChatTemplate:
    return load_template(folder, load_tokenizer(folder))


def samples(folder: Path, *, max_tokens: int = 24, context: int = 256) -> Samples:
    return Samples(template_of(folder), PROMPTS, max_tokens=max_tokens, context=context)


@torch.no_grad()
def greedy(model: CausalLM, template: ChatTemplate, prompt: str, max_tokens: int) -> list[int]:
    ids = template.encode([{"role": "user", "content": prompt}], add_generation_prompt=True)
    answer: list[int] = []
    for _ in range(max_tokens):
        whole = torch.tensor([ids + answer])
        token = int(model.logits(model(whole, torch.arange(whole.shape[1])[None])[:, -1]).argmax())
        if token in template.tokenizer.eos_token_ids:
            break
        answer.append(token)
    return answer


def one_by_one(model: CausalLM, template: ChatTemplate, prompt: str, max_tokens: int) -> str:
    return template.tokenizer.decode(greedy(model, template, prompt, max_tokens)).rstrip("\ufffd")


def test_answers_are_those_of_the_model_asked_without_a_cache(folder: Path) -> None:
    model, template = load_tiny_model(folder), template_of(folder)
    answers = samples(folder).answer(model)
    assert [sample.prompt for sample in answers] == list(PROMPTS)
    assert [sample.text for sample in answers] == [one_by_one(model, template, prompt, 24) for prompt in PROMPTS]


def test_answers_are_cut_where_the_context_or_the_limit_is(folder: Path) -> None:
    model, template = load_tiny_model(folder), template_of(folder)
    longest = max(len(template.encode([{"role": "user", "content": p}], add_generation_prompt=True)) for p in PROMPTS)
    cut = samples(folder, max_tokens=8, context=longest + 2).answer(model)
    expected = [one_by_one(model, template, prompt, limit) for prompt, limit in zip(PROMPTS, (8, 8, 2), strict=True)]
    assert [sample.text for sample in cut] == expected


def test_an_answer_ends_before_the_token_that_ends_it(tmp_path: Path) -> None:
    """The token with which the last answer goes on after some others is declared one that ends answers."""
    folder = make_tiny_model(tmp_path / "tiny", "llama")
    model, template = load_tiny_model(folder), template_of(folder)
    ids = [greedy(model, template, prompt, 24) for prompt in PROMPTS]
    end = next(token for token in ids[2][3:] if token not in ids[2][:3])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}), encoding="utf-8")
    kept = [answer[: answer.index(end)] if end in answer else answer for answer in ids]
    expected = [template.tokenizer.decode(answer).rstrip("\ufffd") for answer in kept]
    assert [sample.text for sample in samples(folder).answer(model)] == expected
    assert 3 <= len(kept[2]) < len(ids[2])


def test_the_training_is_not_disturbed(folder: Path) -> None:
    model = load_tiny_model(folder)
    add_lora(model, LoraSpec(rank=2, alpha=4.0, dropout=0.5, target_modules=("q_proj", "down_proj")))
    torch.manual_seed(0)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter)
    model.train()
    states = torch.get_rng_state(), random.getstate()
    first = samples(folder).answer(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert first == samples(folder).answer(model)  # dropout is off
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    samples(folder, max_tokens=1).answer(model)
    assert not model.training


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # fp32 norms of keys in bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_either_type_answer_under_autocast(folder: Path, dtype: torch.dtype) -> None:
    model = load_tiny_model(folder, dtype=dtype)
    add_lora(model, LoraSpec(rank=2, alpha=4.0, dropout=0.0, target_modules=("q_proj", "k_proj")))
    with torch.autocast("cpu", torch.bfloat16):
        answers = samples(folder).answer(model)
    assert all(isinstance(sample.text, str) for sample in answers)
    assert any(sample.text for sample in answers)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_by_its_number(folder: Path) -> None:
    with pytest.raises(UserError, match=r"sample_prompts\[2\]: its \d+ tokens fill the model's context of 64"):
        samples(folder, context=64)


def test_a_run_without_prompts_has_no_samples(tmp_path: Path, tiny_llama: Path) -> None:
    plain = load_run_config(make_run(tmp_path / "plain", tiny_llama).config)
    assert load_samples(plain, tiny_llama, 256) is None
    asked = load_run_config(make_run(tmp_path / "asked", tiny_llama, sample_prompts=["Hi"], sample_max_tokens=3).config)
    loaded = load_samples(asked, tiny_llama, 256)
    assert loaded is not None
    [sample] = loaded.answer(load_tiny_model(tiny_llama))
    assert sample.prompt == "Hi"
    assert sample.text == one_by_one(load_tiny_model(tiny_llama), template_of(tiny_llama), "Hi", 3)
