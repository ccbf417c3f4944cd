"""Tiny models as llama.cpp's converter would write them: renamed, q and k of a llama permuted, quantized."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.support.tiny import make_tiny_llama

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROPE_THETA = 50_000.0
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"

Kind = gguf.GGMLQuantizationType
Raw = tuple[NDArray[np.generic], Kind]
Metadata = dict[str, Any]


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE as SmolLM2's: each digit by itself, three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and then the hat 2024 你好你好"] * 4, trainer)
    return tokenizer


def make_tiny_gguf(path: Path, *, tied: bool = True, pre: str = "smollm", **options: Any) -> LlamaForCausalLM:
    """Write a random llama to `path` and return it, with the weights that the file's quantized ones stand for.

    `options` are those of write_gguf.
    """
    model, tokenizer = tiny_parts(path.parent / "original", tied=tied)
    write_gguf(path, model, bpe_metadata(tokenizer, pre), **options)
    return model


def tiny_parts(folder: Path, *, tied: bool = True, **overrides: Any) -> tuple[LlamaForCausalLM, Tokenizer]:
    tokenizer = tiny_tokenizer()
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    own: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "rope_parameters": rope, "rms_norm_eps": 1e-5}
    make_tiny_llama(folder, tie_word_embeddings=tied, **own, **overrides)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder)
    return model, tokenizer


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Metadata,
    *,
    kind: Kind = Kind.Q4_1,
    raw: Mapping[str, Raw] | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Write `model` with its matrices as `kind`, and round its weights in place to what bf16 keeps of them.

    `raw` are tensors by their GGUF names, as bytes, instead of or beside the model's. `metadata` win over the model's
    and the tokenizer's.
    """
    architecture = model.config.model_type.replace("mistral", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    own = model_metadata(model.config, architecture) | tokenizer | (metadata or {})
    for key, value in own.items():
        _adder(writer, value)(key, value)
    tensors: dict[str, Raw] = {name: (table, Kind.F32) for name, table in rope_table(model.config).items()}
    for name, parameter in model.named_parameters():
        stored = kind if parameter.dim() == 2 else Kind.F32
        quantized = gguf.quantize(parameter.detach().numpy(), stored)
        round_to_bf16(parameter, quantized, stored)
        tensors[_gguf_name(name)] = (_permuted(name, quantized, model.config), stored)
    for name, (data, data_kind) in (tensors | dict(raw or {})).items():
        writer.add_tensor(name, data, raw_dtype=data_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def round_to_bf16(parameter: torch.nn.Parameter, data: NDArray[np.generic], kind: Kind) -> None:
    rounded = torch.from_numpy(gguf.dequantize(data, kind)).to(torch.bfloat16).float()
    parameter.data.copy_(rounded.reshape(parameter.shape))


def model_metadata(config: PreTrainedConfig, architecture: str) -> Metadata:
    rope = config.rope_parameters
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if _head_dim(config) != config.hidden_size // config.num_attention_heads:
        own |= {"attention.key_length": _head_dim(config), "attention.value_length": _head_dim(config)}
    if rope["rope_type"] in ("linear", "yarn"):
        own |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if "original_max_position_embeddings" in rope and rope["rope_type"] == "yarn":
        own["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{architecture}.{key}": value for key, value in own.items()}


def bpe_metadata(tokenizer: Tokenizer, pre: str) -> Metadata:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = {token.content: 3 if token.special else 4 for token in tokenizer.get_added_tokens_decoder().values()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [added.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_metadata(file: Path) -> Metadata:
    pieces = SentencePieceProcessor()
    pieces.load(str(file))
    ids = range(pieces.get_piece_size())
    tests = ((pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_unused, 5), (pieces.is_byte, 6))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": [float(pieces.get_score(index)) for index in ids],
        "tokenizer.ggml.token_type": [next((kind for test, kind in tests if test(index)), 1) for index in ids],
        "tokenizer.ggml.bos_token_id": pieces.bos_id(),
        "tokenizer.ggml.eos_token_id": pieces.eos_id(),
        "tokenizer.ggml.unknown_token_id": pieces.unk_id(),
    }


def rope_table(config: PreTrainedConfig) -> dict[str, NDArray[np.float32]]:
    """Llama 3.1's divisors as LlamaModel.generate_extra_tensors of the converter computes them."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return {}
    factors = []
    for index in range(0, _head_dim(config), 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / _head_dim(config))
        turns = rope["original_max_position_embeddings"] / wavelength
        smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if smooth > 1 else rope["factor"] if smooth < 0 else between)
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def _adder(writer: gguf.GGUFWriter, value: Any) -> Callable[[str, Any], None]:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    return adders[type(value)]


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _permuted(name: str, data: NDArray[np.generic], config: PreTrainedConfig) -> NDArray[np.generic]:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py; whole rows move, so it works on quantized ones."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or config.model_type.startswith("qwen"):
        return data
    return data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def _gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outer["lm_head.weight"] = "output.weight"
    if name in outer:
        return outer[name]
    _, _, index, rest = name.split(".", 3)
    layer, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{NAMES[layer]}.{kind}"
