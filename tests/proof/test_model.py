"""SmolLM2-135M-Instruct: our forward pass and our decode loop beside transformers, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.checkpoint import load_weights
from lm.config import load_config
from lm.model import build_model
from lm.ops import choose_ops
from tests.proof.conftest import MODEL

pytestmark = pytest.mark.slow

PROMPTS = (
    "The theory of evolution says that",
    "def fibonacci(n):\n    ",
    "从前有一座山,山里有一座庙,",
    "Once upon a time in a small village by the sea, there lived an old fisherman who",
)


def transformers_twin(folder: Path) -> tuple[Any, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_fp32_logits_equal_those_of_transformers(smollm2: Path, figure: Callable[[str, object], None]) -> None:
    device = torch.device("cpu")
    ops, _ = choose_ops(device, torch.float32)
    ours = build_model(load_config(smollm2), device=device, dtype=torch.float32, ops=ops)
    load_weights(ours, smollm2)
    ours.eval()
    theirs, tokenizer = transformers_twin(smollm2)
    worst = 0.0
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt * 4)["input_ids"]])
            positions = torch.arange(ids.shape[1])[None]
            difference = ours.logits(ours(ids, positions)) - theirs(ids).logits
            worst = max(worst, difference.abs().max().item())
    figure("largest fp32 logit difference to transformers on SmolLM2", f"{worst:.2e}")
    assert worst <= 1e-4


def test_200_greedy_tokens_over_http_equal_those_of_transformers(smollm2: Path, client: httpx.Client) -> None:
    theirs, tokenizer = transformers_twin(smollm2)
    client.post(f"/checkpoints/{MODEL}/activate").raise_for_status()
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        expected = theirs.generate(
            torch.tensor([ids]),
            max_new_tokens=200,
            min_new_tokens=200,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :]
        body = {
            "model": "smollm2-135m-instruct",
            "prompt": ids,
            "max_tokens": 200,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 200
        assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
