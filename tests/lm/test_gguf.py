from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.errors import UserError
from lm.gguf import convert_gguf, to_bf16
from tests.support.gguf_file import (
    SPECIAL,
    TEMPLATE,
    bpe_metadata,
    make_tiny_gguf,
    tiny_parts,
    tiny_tokenizer,
    write_gguf,
)


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_gives_the_original_logits_in_transformers(tmp_path: Path, tied: bool) -> None:
    original = make_tiny_gguf(tmp_path / "tiny.gguf", tied=tied)
    (folder := tmp_path / "hf").mkdir()
    calls: list[tuple[int, int]] = []
    convert_gguf(tmp_path / "tiny.gguf", folder, lambda done, total: calls.append((done, total)))
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(60).reshape(2, 30) * 5 % original.config.vocab_size
    with torch.inference_mode():
        assert torch.equal(converted(ids).logits, original(ids).logits)
    for name, weight in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight), name
    count = 2 + 2 * 9 + (not tied)
    assert calls == [(done, count) for done in range(1, count + 1)]
    with safe_open(folder / "model.safetensors", "np") as file:
        assert len(file.keys()) == count
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"


def test_the_folder_tokenizes_as_the_original(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "tiny.gguf")
    (folder := tmp_path / "hf").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder)
    original, loaded = tiny_tokenizer(), AutoTokenizer.from_pretrained(folder)
    for text in ("the hat 2024", "  你好!\n\tthen", "<|im_start|>user\nthe cat<|im_end|>\n", "a<|endoftext|>b 😀"):
        assert loaded(text)["input_ids"] == original.encode(text).ids
        assert loaded.decode(original.encode(text).ids) == text
    assert (loaded.bos_token, loaded.eos_token) == (SPECIAL[1], SPECIAL[2])
    assert loaded.decode([1, 50, 2], skip_special_tokens=True) == original.decode([50])
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_bf16_rounds_to_nearest_even_as_torch_does() -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    halfway = (np.arange(64, dtype=np.uint32) * 0x8000 + 0x3F80_0000).view(np.float32)
    values = np.concatenate([values, halfway, -halfway, np.array([0.0, -0.0, 1e-40, 3.3e38], np.float32)])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bf16(values), expected)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        to_bf16(np.array([1.0, np.nan], np.float32))


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    model, tokenizer = tiny_parts(tmp_path / "original")
    del model.model.layers[1].mlp.up_proj
    write_gguf(tmp_path / "missing.gguf", model, bpe_metadata(tokenizer, "smollm"))
    with pytest.raises(UserError, match=r"missing tensors \['model.layers.1.mlp.up_proj.weight'\]"):
        convert_gguf(tmp_path / "missing.gguf", tmp_path)
    model, tokenizer = tiny_parts(tmp_path / "original")
    model.config.intermediate_size = 128
    write_gguf(tmp_path / "shape.gguf", model, bpe_metadata(tokenizer, "smollm"))
    with pytest.raises(UserError, match=r"has model.layers.0.mlp.gate_proj.weight of shape \(64, 32\).*\(128, 32\)"):
        convert_gguf(tmp_path / "shape.gguf", tmp_path)


def test_a_file_that_we_cannot_convert_says_why(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "tiny.gguf", pre="deepseek")
    with pytest.raises(UserError, match="the tokenizer gpt2/deepseek; supported: gpt2/smollm"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    (tmp_path / "text.gguf").write_text("hello, this is no GGUF file at all")
    with pytest.raises(UserError, match="not a readable GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path)
    with pytest.raises(UserError, match="not a readable GGUF file"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path)
