"""Tiny random models in Hugging Face format: real checkpoints, tokenizer and template included, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lm import model as ours
from lm.config import load_config
from lm.ops import Ops, choose_ops

BOS, EOS, VOCAB_SIZE = 1, 2, 272
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("h", "e"), ("t", "he"), ("i", "n"), ("e", "r"), ("a", "n"), ("o", "n"), ("r", "e"), ("o", "u"), ("Ġ", "the")]
MERGES += [("i", "s"), ("Ġ", "is"), ("l", "l"), ("he", "ll")]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULTS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # large enough for logits to differ by more than rounding
}


CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {"qwen3": {"head_dim": 16}}
"""Where the class's own default is no tiny model's."""


def make_tiny_model(folder: Path, family: str, *, seed: int = 0, **config_overrides: Any) -> Path:
    """Write a random model with a byte-level tokenizer and a ChatML template into `folder`, and return it.

    `family` is a `model_type`; overrides are arguments of its config class in transformers. The same arguments give
    the same bytes.
    """
    config_class, model_class = CLASSES[family]
    config = config_class(**(DEFAULTS | FAMILY_DEFAULTS.get(family, {}) | config_overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        _randomize_vectors(model)
    ids = {"bos_token_id": BOS, "eos_token_id": config.eos_token_id, "pad_token_id": EOS}
    model.generation_config = GenerationConfig.from_dict(ids)
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


def make_tiny_llama(folder: Path, *, seed: int = 0, **config_overrides: Any) -> Path:
    return make_tiny_model(folder, "llama", seed=seed, **config_overrides)


def load_tiny_model(folder: Path, *, dtype: torch.dtype = torch.float32, ops: Ops | None = None) -> ours.CausalLM:
    """Our model with the weights of such a folder, on the CPU."""
    device = torch.device("cpu")
    model = ours.build_model(load_config(folder), device=device, dtype=dtype, ops=ops or choose_ops(device, dtype)[0])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 272 tokens: 3 special ones, 256 bytes, 13 merges."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    model = BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=MERGES)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": DEFAULTS["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _randomize_vectors(model: torch.nn.Module) -> None:
    """Norm weights start at 1 and biases at 0; a mistake there must show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
