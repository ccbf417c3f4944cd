"""What users bring, through the whole service as a process: asked, fine-tuned, asked again, loaded by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import transformers

from lm.tokenizer import load_tokenizer
from tests.support.client import PATIENCE_S, ok, train
from tests.support.families import LLAMA3
from tests.support.layouts import write_layout
from tests.support.runs import RECORDS
from tests.support.server import running_server
from tests.support.tiny import make_tiny_model
from tests.support.tiny_tokenizers import make_sentencepiece, make_tiktoken_file

OPTIONS: dict[str, Any] = {
    "dataset": {"records": RECORDS},
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 0.01,
    "dtype": "fp32",
    "device": "cpu",
}
LAST = "step_6"
PROMPT = "Who are you?"
NUM_TOKENS = 12
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def llama_2(folder: Path) -> None:
    make_tiny_model(folder, "llama", vocab_size=1024, tie_word_embeddings=False)
    only_a_tokenizer_model(folder)
    make_sentencepiece(folder / "tokenizer.model")


def llama_3_of_meta(folder: Path) -> None:
    base = make_tiny_model(folder.parent.parent / "base", "llama", vocab_size=1024, tie_word_embeddings=False)
    write_layout(base, folder, "original/consolidated.00.pth")
    only_a_tokenizer_model(folder)
    make_tiktoken_file(folder / "original" / "tokenizer.model")


def llama_3_1_of_torchtune(folder: Path) -> None:
    base = make_tiny_model(folder.parent.parent / "base", "llama", rope_parameters=LLAMA3)
    write_layout(base, folder, "hf_model.pt")


def mistral(folder: Path) -> None:
    make_tiny_model(folder, "mistral", sliding_window=8)


def qwen_2(folder: Path) -> None:
    make_tiny_model(folder, "qwen2", tie_word_embeddings=True)


def qwen_3(folder: Path) -> None:
    make_tiny_model(folder, "qwen3")


def only_a_tokenizer_model(folder: Path) -> None:
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def answer(client: httpx.Client, model: str) -> str:
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "model": model}
    text: str = ok(client, "POST", "/generate", body)["choices"][0]["text"]
    return text


def their_answer(model: Any, folder: Path) -> str:
    """What transformers says to the same token ids, greedily."""
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("make", [llama_2, llama_3_of_meta, llama_3_1_of_torchtune, mistral, qwen_2, qwen_3])
def test_what_users_bring_is_served_trained_served_again_and_loads_in_transformers(
    tmp_path: Path, make: Callable[[Path], None], figure: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "models" / "theirs"
    make(folder)
    arguments = ("model=theirs", "device=cpu", "dtype=fp32", "num_threads=1", "max_loaded_models=1")
    with (
        running_server(tmp_path, *arguments) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        before = answer(client, "latest")
        chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
        assert ok(client, "POST", "/v1/chat/completions", chat)["usage"]["completion_tokens"] > 0
        for recipe in ("full", "lora"):
            job = train(client, model="theirs", recipe=recipe, **OPTIONS)
            after = answer(client, "latest")
            assert ok(client, "POST", "/v1/chat/completions", chat)["model"] == job["fine_tuned_model"]
            checkpoint = tmp_path / "runs" / job["id"] / "checkpoints" / LAST
            theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            assert their_answer(theirs, checkpoint) == after
            figure(f"{make.__name__}, {recipe}, over HTTP", f"{before!r} -> {after!r}, as transformers says")
        if (folder / "model.safetensors").is_file():
            adapter = tmp_path / "runs" / job["id"] / "adapters" / LAST
            base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            assert their_answer(peft.PeftModel.from_pretrained(base, adapter), folder) == after
        assert ok(client, "POST", "/checkpoints/rollback")["id"] != job["fine_tuned_model"]
        ok(client, "POST", "/checkpoints/rollback")
        assert answer(client, "latest") == before
