"""A GGUF file of a llama model, rewritten as a Hugging Face folder. Torch-free.

GGUF is llama.cpp's format: one file with quantized weights, hyperparameters and the tokenizer's data. Its converter
renames the tensors and reorders the rows of q and k for its own RoPE layout; both are undone here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lm.config import ModelConfig
from lm.errors import UserError
from lm.weight_files import Shape, expected_shapes

OnTensor = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3
"""llama.cpp's token type for special tokens."""


def convert_gguf(source: Path, target: Path, on_tensor: OnTensor = lambda done, total: None) -> None:
    """Write the model in the GGUF file `source` into the folder `target`, which exists and is empty.

    Writes config.json, generation_config.json, model.safetensors (bf16, a tied embedding once), tokenizer.json,
    tokenizer_config.json and chat_template.jinja. Raises UserError for a file that is not GGUF, for another
    architecture or tokenizer than ours, and where tensors and hyperparameters do not agree.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} is not a readable GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    shapes = dict(islice(expected_shapes(ModelConfig.from_dict(config)), len(tensors) + 1))
    _check_shapes(tensors, shapes)
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", _generation_config(config))
    build_tokenizer(fields).save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(fields, config))
    if template := fields.get("tokenizer.chat_template"):
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    with (target / "model.safetensors").open("wb") as file:
        _write_safetensors(file, tensors, shapes, config, on_tensor)


def undo_permutation(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of a q or k projection from llama.cpp's order back to HF's.

    llama.cpp rotates neighbouring pairs of rows, HF the two halves of a head; its converter interleaves the halves.
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest even, as raw bits. NaN and infinity are refused."""
    if not np.isfinite(values).all():
        raise UserError("the GGUF file holds weights that are not finite numbers: it is damaged")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file's metadata describe."""
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind not in PRE_TOKENIZERS:
        known = ", ".join(f"{model}/{pre}" for model, pre in PRE_TOKENIZERS)
        raise UserError(f"the GGUF file has the tokenizer {kind[0]}/{kind[1]}; supported: {known}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = fields["tokenizer.ggml.token_type"]
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit by itself, then GPT-2's words (llama.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM)."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


PRE_TOKENIZERS = {("gpt2", "smollm"): _smollm}


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"the GGUF file holds a {architecture} model; supported: llama")
    llama = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    heads = llama["attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama.get("vocab_size", len(fields["tokenizer.ggml.tokens"])),
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("attention.head_count_kv", heads),
        "head_dim": llama.get("attention.key_length", llama["embedding_length"] // heads),
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        # Stored as float32: 1e-05 comes back as 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(llama["attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(llama.get("rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _tokenizer_config(fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {
        # The generic class takes tokenizer.json as it stands; GPT2Tokenizer would drop the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    }


def _hf_name(name: str) -> str:
    match name.split("."):
        case ["blk", index, layer, "weight"] if layer in LAYER_TENSORS:
            return f"model.layers.{index}.{LAYER_TENSORS[layer]}.weight"
        case _ if name in OUTER_TENSORS:
            return OUTER_TENSORS[name]
    raise UserError(f"the GGUF file holds a tensor that a llama model does not have: {name}")


def _check_shapes(tensors: dict[str, gguf.ReaderTensor], expected: dict[str, Shape]) -> None:
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise UserError(f"the GGUF file is incomplete: missing tensors {missing[:3]}, unexpected ones {extra[:3]}")
    for name, tensor in tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the innermost dimension first
        if shape != expected[name]:
            raise UserError(f"the GGUF file has {name} of shape {shape}, its hyperparameters say {expected[name]}")


def _write_safetensors(
    file: BinaryIO,
    tensors: dict[str, gguf.ReaderTensor],
    shapes: dict[str, Shape],
    config: dict[str, Any],
    on_tensor: OnTensor,
) -> None:
    """The format is a length, a JSON header and the raw bytes, so one tensor at a time is in memory."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **dict(_layout(shapes))}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        tensor = tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if ".q_proj." in name:
            values = undo_permutation(values, config["num_attention_heads"])
        elif ".k_proj." in name:
            values = undo_permutation(values, config["num_key_value_heads"])
        file.write(to_bf16(values).astype("<u2").tobytes())
        on_tensor(done, len(shapes))


def _layout(shapes: dict[str, Shape]) -> Iterator[tuple[str, dict[str, Any]]]:
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        yield name, {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
