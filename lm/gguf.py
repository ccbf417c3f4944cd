"""A GGUF file of a llama, mistral or qwen model, rewritten as a Hugging Face folder. Torch-free.

GGUF is llama.cpp's format: one file with quantized weights, hyperparameters and the tokenizer's data. Its converter
renames the tensors and, for llama, reorders the rows of q and k for its own RoPE layout; both are undone here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from lm.config import ModelConfig
from lm.errors import UserError
from lm.gguf_config import Table, generation_config, read_architecture, read_config
from lm.gguf_tokenizer import write_tokenizer
from lm.weight_files import Shape, expected_shapes

OnTensor = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
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
ROPE_TABLE = "rope_freqs.weight"
CHUNK_VALUES = 1 << 24
"""How many weights are in memory at a time, about."""
DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)
"""What comes of reading metadata that are not what they must be."""


class Reader(gguf.GGUFReader):
    """The library's reader takes what lies past the end of a file for empty, and may then never come to an end."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> NDArray[Any]:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends too early; download it again")
        values: NDArray[Any] = super()._get(offset, dtype, count, override_order)
        return values

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        """Types that the library has no name for are refused here, where it would say a number only."""
        known = {int(kind) for kind in gguf.GGMLQuantizationType}
        for field in fields:
            name, kind = bytes(field.parts[1]).decode(), int(field.parts[4][0])
            if kind not in known:
                raise _unsupported(name, f"number {kind}")
        super()._build_tensors(start_offs, fields)


def convert_gguf(source: Path, target: Path, on_tensor: OnTensor = lambda done, total: None) -> None:
    """Write the model in the GGUF file `source` into the folder `target`, which exists and is empty.

    Writes config.json, generation_config.json, model.safetensors (bf16, a tied embedding once), tokenizer_config.json,
    tokenizer.json or tokenizer.model, and chat_template.jinja. Raises UserError for a file that is not GGUF, damaged
    or a part of a model, for another architecture, tokenizer or type of weights than ours, and where tensors and
    hyperparameters do not agree.
    """
    fields, stored = _read(source)
    with _damaged(source):
        architecture = read_architecture(fields)
        table = _rope_table(stored.pop(ROPE_TABLE, None))
        config = read_config(fields, stored.keys(), table)
    tensors = {_hf_name(name, config["model_type"]): tensor for name, tensor in stored.items()}
    shapes = dict(islice(expected_shapes(ModelConfig.from_dict(config)), len(tensors) + 1))
    _check_shapes(tensors, shapes)
    _check_types(stored)
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", generation_config(fields, config))
    with _damaged(source):
        write_tokenizer(target, fields, config)
    heads = _permuted_heads(config) if architecture.permuted else {}
    with (target / "model.safetensors").open("wb") as file:
        _write_header(file, shapes)
        for done, (name, shape) in enumerate(shapes.items(), start=1):
            _write_tensor(file, tensors[name], shape, heads.get(name.split(".")[-2], 0))
            on_tensor(done, len(shapes))


def undo_permutation(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of a q or k projection (or its bias) from llama.cpp's order back to HF's.

    llama.cpp rotates neighbouring pairs of rows, HF the two halves of a head; its converter interleaves the halves.
    """
    rows, *columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, *columns).swapaxes(1, 2).reshape(weight.shape)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest even, as raw bits. NaN and infinity are refused."""
    if not np.isfinite(values).all():
        raise UserError("the GGUF file holds weights that are not finite numbers: it is damaged")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@contextmanager
def _damaged(source: Path) -> Iterator[None]:
    """Say of metadata that lack what they must have, or have it of another type, that the file is damaged."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{source} is damaged: its metadata are not whole: {error!r}") from error


def _read(source: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """All metadata and all tensors by their names in the file."""
    try:
        reader = Reader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (*DAMAGE, OSError, MemoryError, RecursionError) as error:
        raise UserError(f"{source} is not a readable GGUF file: {error}") from error
    if reader.byte_order == "S":
        raise UserError(f"{source} is in the byte order of another kind of machine; take the usual, little-endian file")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _rope_table(tensor: gguf.ReaderTensor | None) -> Table | None:
    if tensor is None:
        return None
    _check_types({ROPE_TABLE: tensor})
    table: Table = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
    return table


def _hf_name(name: str, model_type: str) -> str:
    match name.split("."):
        case ["blk", index, layer, "weight" | "bias" as kind] if layer in LAYER_TENSORS:
            return f"model.layers.{index}.{LAYER_TENSORS[layer]}.{kind}"
        case _ if name in OUTER_TENSORS:
            return OUTER_TENSORS[name]
    raise UserError(f"the GGUF file holds a tensor that a {model_type} model does not have: {name}")


def _check_shapes(tensors: Mapping[str, gguf.ReaderTensor], expected: Mapping[str, Shape]) -> None:
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise UserError(f"the GGUF file is incomplete: missing tensors {missing[:3]}, unexpected ones {extra[:3]}")
    for name, tensor in tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the innermost dimension first
        if shape != expected[name]:
            raise UserError(f"the GGUF file has {name} of shape {shape}, its hyperparameters say {expected[name]}")


def _check_types(tensors: Mapping[str, gguf.ReaderTensor]) -> None:
    known = {kind: can_dequantize(kind) for kind in {tensor.tensor_type for tensor in tensors.values()}}
    for name, tensor in tensors.items():
        if not known[tensor.tensor_type]:
            raise _unsupported(name, tensor.tensor_type.name)


def _unsupported(name: str, kind: str) -> UserError:
    mend = "take a file with another quantization, such as Q8_0, Q6_K or Q4_K_M"
    return UserError(f"the GGUF file has the tensor {name} in the type {kind}, which cannot be read: {mend}")


def _permuted_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """How many heads lie in the projections whose rows llama.cpp's converter reorders."""
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}


def _write_header(file: BinaryIO, shapes: Mapping[str, Shape]) -> None:
    """The format is a length, a JSON header and the raw bytes, so that no two tensors need be in memory."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **dict(_layout(shapes))}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)


def _write_tensor(file: BinaryIO, tensor: gguf.ReaderTensor, shape: Shape, permuted_heads: int) -> None:
    """Write as bf16, some rows at a time; `permuted_heads` is 0 where the rows are in HF's order."""
    head = shape[0] // permuted_heads if permuted_heads else 1
    columns = int(np.prod(shape[1:]))
    step = head * max(1, CHUNK_VALUES // (columns * head))
    if len(shape) == 1:  # quantized, a vector has fewer bytes than values, so that it cannot be cut
        step = shape[0]
    for start in range(0, shape[0], step):
        values = gguf.dequantize(tensor.data[start : start + step], tensor.tensor_type)
        if permuted_heads:
            values = undo_permutation(values, len(values) // head)
        file.write(to_bf16(values).astype("<u2").tobytes())


def _layout(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, dict[str, Any]]]:
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        yield name, {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
