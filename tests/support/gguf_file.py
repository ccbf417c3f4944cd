"""A tiny llama as llama.cpp's converter would write it: renamed, q and k permuted, quantized."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny import make_tiny_llama

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROPE_THETA = 50_000.0
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


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


def make_tiny_gguf(path: Path, *, tied: bool = True, pre: str = "smollm") -> LlamaForCausalLM:
    """Write a random llama to `path` and return it, with the weights that the file's quantized ones stand for."""
    model, tokenizer = tiny_parts(path.parent / "original", tied=tied)
    write_gguf(path, model, tokenizer, pre=pre)
    return model


def tiny_parts(folder: Path, *, tied: bool = True) -> tuple[LlamaForCausalLM, Tokenizer]:
    tokenizer = tiny_tokenizer()
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    make_tiny_llama(
        folder, tie_word_embeddings=tied, vocab_size=tokenizer.get_vocab_size(), rope_parameters=rope, rms_norm_eps=1e-5
    )
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder)
    return model, tokenizer


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, *, pre: str = "smollm") -> None:
    """Write `model` quantized, and round its weights in place to what bf16 keeps of the quantized values."""
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, model.config, tokenizer, pre)
    for name, parameter in model.named_parameters():
        kind = gguf.GGMLQuantizationType.Q4_1 if parameter.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(parameter.detach().numpy(), kind)
        rounded = torch.from_numpy(gguf.dequantize(data, kind)).to(torch.bfloat16).float()
        parameter.data.copy_(rounded.reshape(parameter.shape))
        writer.add_tensor(_gguf_name(name), _permuted(name, data, model.config), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(name: str, data: NDArray[np.generic], config: LlamaConfig) -> NDArray[np.generic]:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py; whole rows move, so it works on quantized ones."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return data
    return data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def _gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outer["lm_head.weight"] = "output.weight"
    if name in outer:
        return outer[name]
    _, _, index, layer = name.removesuffix(".weight").split(".", 3)
    return f"blk.{index}.{NAMES[layer]}.weight"


def _write_metadata(writer: gguf.GGUFWriter, config: LlamaConfig, tokenizer: Tokenizer, pre: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _merges(tokenizer: Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
