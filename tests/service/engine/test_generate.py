"""One answer in the terminal: transformers' tokens, and figures that are what they say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.errors import UserError
from service.engine.generate import Generated, generate
from service.engine.messages import RequestTiming
from service.generate_command import run_generate
from tests.support.layouts import write_layout
from tests.support.tiny import make_tiny_llama
from trainer.torchtune.generation import GenerationConfig

QUESTION = "who is there, and when?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


def config(model: Path, **options: Any) -> GenerationConfig:
    greedy = {"device": "cpu", "dtype": "fp32", "temperature": 0.0, "max_new_tokens": 12, "user": QUESTION}
    return GenerationConfig(model_dir=str(model), **{**greedy, **options})


def expected_text(folder: Path, messages: list[dict[str, str]]) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("system", [None, "You are terse."])
def test_the_answer_is_transformers_and_comes_piece_by_piece(model: Path, system: str | None) -> None:
    pieces: list[str] = []
    generated = generate(config(model, system=system), pieces.append)
    messages = [{"role": "user", "content": QUESTION}]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    assert generated.text == expected_text(model, messages)
    assert "".join(pieces) == generated.text + "\n"
    assert len(pieces) > 2
    assert len(generated.token_ids) <= 12


@pytest.mark.parametrize("layout", ["pytorch_model.bin", "hf_model.pt", "original/consolidated.00.pth"])
def test_the_answer_is_the_same_from_every_layout_of_the_weights(model: Path, layout: str, tmp_path: Path) -> None:
    folder = write_layout(model, tmp_path / "model", layout)
    expected = generate(config(model), lambda text: None)
    assert generate(config(folder), lambda text: None).token_ids == expected.token_ids


def test_a_seed_repeats_a_drawn_answer_and_another_one_draws_another(model: Path) -> None:
    drawn = [
        generate(config(model, temperature=1.0, top_k=300, seed=seed), lambda text: None).token_ids
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_figures_are_those_of_the_request(model: Path) -> None:
    generated = generate(config(model), lambda text: None)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    cached = generated.num_prompt_tokens + 12
    kv_token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, fp32
    assert weights + cached * kv_token_bytes * 0.9 < generated.model_bytes < 1.2 * (weights + (cached + 64) * 256)
    assert generated.timing.decode_tokens == len(generated.token_ids) - 1
    assert generated.peak_memory_bytes > 50e6
    assert generated.device == "cpu"


def test_the_log_has_torchtunes_lines_by_torchtunes_formulas_and_then_ours() -> None:
    timing = RequestTiming(queue_s=0.5, prefill_s=0.5, decode_s=4.0, decode_tokens=9, decode_bytes=72_000_000_000)
    fields: dict[str, Any] = {"token_ids": tuple(range(10)), "text": "", "timing": timing, "device": "cpu"}
    generated = Generated(num_prompt_tokens=35, model_bytes=16_000_000_000, peak_memory_bytes=17_250_000_000, **fields)
    assert generated.log_lines() == [
        "Time for inference: 5.00 sec total, 2.00 tokens/sec",
        "Bandwidth achieved: 32.00 GB/s",
        "Memory used: 17.25 GB",
        "Time to first token: 1.000 sec for 35 tokens of prompt",
        "Decode only: 2.25 tokens/sec, 18.00 GB/s read",
    ]


def test_an_answer_of_one_token_has_no_decode_figures(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    generate(config(model, max_new_tokens=1), lambda text: None)
    assert caplog.messages[-1] == "Decode only: no token after the first"
    assert "Model is initialized with precision torch.float32." in caplog.messages


def test_a_prompt_that_does_not_fit_is_refused_with_the_mend(model: Path) -> None:
    with pytest.raises(
        UserError, match=r"^max_new_tokens: \d+ tokens of prompt and 300 .* context of 256: lower"
    ) as info:
        generate(config(model, max_new_tokens=300), lambda text: None)
    assert info.value.param == "max_new_tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "npu"}, "tuneserve: error: device: 'npu' cannot be used: "),
        ({"model_dir": "/nowhere"}, "tuneserve: error: there is no model folder /nowhere"),
        ({"max_new_tokens": 300}, "tuneserve: error: max_new_tokens: "),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    model: Path, options: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_generate(config(model).model_copy(update=options)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(message)
    assert "Traceback" not in err


def test_the_command_prints_the_text_alone_on_stdout(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_generate(config(model)) == 0
    out, err = capfd.readouterr()
    assert out == generate(config(model), lambda text: None).text + "\n"
    assert "Time for inference: " in err
