"""Exported GGUF files in llama.cpp: does it cut text into the same tokens, and decode to the same ones?

Tiny random models of every family, kind of tokenizer and kind of rotary scaling are written in fp32 and loaded by
llama.cpp, which the interpreter LLAMA_PYTHON brings (`pip install xllamacpp` in an environment of its own).

    python -m benchmarks.gguf_in_llama_cpp LLAMA_PYTHON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lm.gguf_export import export_gguf
from lm.tokenizer import load_tokenizer
from tests.support.families import LINEAR, LLAMA3, YARN
from tests.support.tiny import load_tiny_model, make_tiny_model
from tests.support.tiny_tokenizers import make_sentencepiece, make_tiktoken_file, write_json, write_tokenizer

PROMPT = "The quick brown fox 123 你好 def f(x):"
NUM_TOKENS = 12
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
STRETCHED = LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, smollm": ("llama", "smollm2", {}),
    "llama, llama-bpe, llama3": ("llama", "llama3", {"rope_parameters": STRETCHED}),
    "llama, tiktoken": ("llama", "tiktoken", {}),
    "llama, SentencePiece as JSON": ("llama", "zephyr", {}),
    "llama, linear": ("llama", "smollm2", {"rope_parameters": LINEAR}),
    "llama, biases": ("llama", "smollm2", {"attention_bias": True, "mlp_bias": True}),
    "mistral, SentencePiece": ("mistral", "sentencepiece", {"sliding_window": None}),
    "qwen2": ("qwen2", "smollm2", {}),
    "qwen2, yarn": ("qwen2", "smollm2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "smollm2", {"head_dim": 64}),
}
ASK = """
import json, sys, urllib.request
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = sys.argv[1], 512, 1, False
server = xllamacpp.Server(parameters)
def post(path, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=60))
asked = json.load(sys.stdin)
cut = post("/tokenize", {"content": asked["text"], "add_special": True, "parse_special": True})["tokens"]
options = {"temperature": 0, "n_predict": asked["count"], "return_tokens": True, "ignore_eos": True}
answer = post("/completion", {"prompt": asked["ids"], **options})["tokens"]
print("\\n" + json.dumps({"cut": cut, "answer": answer}), flush=True)
"""


def make_model(folder: Path, family: str, style: str, overrides: dict[str, Any]) -> None:
    make_tiny_model(folder, family, **{**SIZES, **overrides})
    (folder / "generation_config.json").unlink()
    if style not in ("sentencepiece", "tiktoken"):
        write_tokenizer(folder, style)
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    if style == "tiktoken":
        make_tiktoken_file(folder / "tokenizer.model")
        return
    make_sentencepiece(folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **names})


@torch.inference_mode()
def greedy(folder: Path, ids: list[int]) -> list[int]:
    model, tokens = load_tiny_model(folder), list(ids)
    for _ in range(NUM_TOKENS):
        hidden = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])
        tokens.append(int(model.logits(hidden[:, -1]).argmax()))
    return tokens[len(ids) :]


def main() -> int:
    python, failed = sys.argv[1], 0
    with tempfile.TemporaryDirectory() as root:
        for number, (name, (family, style, overrides)) in enumerate(CASES.items()):
            folder = Path(root) / str(number)
            make_model(folder, family, style, overrides)
            export_gguf(folder, folder.with_suffix(".gguf"), "f32")
            ids = load_tokenizer(folder).encode(PROMPT)
            asked = json.dumps({"text": PROMPT, "ids": ids, "count": NUM_TOKENS})
            command = [python, "-c", ASK, str(folder.with_suffix(".gguf"))]
            done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=120, check=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            same = found["cut"] == ids, found["answer"] == greedy(folder, ids)
            failed += not all(same)
            print(f"{name:32} same tokens: {same[0]}  same {NUM_TOKENS} greedy tokens: {same[1]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
