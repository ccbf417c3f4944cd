"""A model folder written as one GGUF file, which llama.cpp and its relatives read: the way back of lm/gguf.py. Torch-free.

Matrices are stored in the type that is asked for, vectors in fp32 as llama.cpp wants them. Some rows at a time are in
memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from lm.config import ModelConfig, load_config
from lm.errors import UserError
from lm.gguf import CHUNK_VALUES, LAYER_TENSORS, OUTER_TENSORS, ROPE_TABLE, OnTensor
from lm.gguf_config_export import ARCHITECTURES, Metadata, model_metadata, rope_table
from lm.gguf_tokenizer_export import tokenizer_metadata
from lm.layout import has_safetensors
from lm.template import find_template
from lm.tokenizer import load_tokenizer
from lm.weight_files import HEAD, TensorEntry, validate_checkpoint

GgufType = Literal["f32", "f16", "bf16", "q8_0"]

KINDS: dict[GgufType, gguf.GGMLQuantizationType] = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES: dict[GgufType, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
PERMUTED = ("llama", "mistral")
LARGEST_F16 = 65504.0
SPARE_BYTES = 64 << 20
GGUF_LAYERS = {theirs: ours for ours, theirs in LAYER_TENSORS.items()}
GGUF_OUTER = {theirs: ours for ours, theirs in OUTER_TENSORS.items()}
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor on its way: where its values are, and what it is in the file."""

    values: NDArray[Any]
    """Not read yet; bf16 as raw bits."""
    is_bf16: bool
    kind: gguf.GGMLQuantizationType
    permuted_heads: int
    """0 where the rows are stored in Hugging Face's order."""

    def rows(self) -> Iterator[NDArray[np.float32]]:
        """All rows in the file's order, some at a time."""
        count, *columns = self.values.shape
        head = count // self.permuted_heads if self.permuted_heads else 1
        step = head * max(1, CHUNK_VALUES // (int(np.prod(columns)) * head))
        for start in range(0, count, step):
            rows = to_float32(self.values[start : start + step], self.is_bf16)
            yield permute(rows, len(rows) // head) if self.permuted_heads else rows


def export_gguf(
    source: Path,
    target: Path,
    kind: GgufType = "f16",
    *,
    name: str | None = None,
    on_tensor: OnTensor = lambda done, total: None,
) -> None:
    """Write the model folder `source`, its tokenizer and its chat template into the file `target`, whole or not at all.

    `name` is what the file calls the model; by default the folder's name. Raises FileExistsError when `target` exists,
    and UserError for a folder that is no model of ours in safetensors, for what GGUF has no words for (windows of qwen
    models, some kinds of YaRN, other tokenizers), and where the disk has no room.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    config = load_config(source)
    if not has_safetensors(source):
        raise UserError(f"{source} has no safetensors files; only such models can be exported", param="model")
    entries = {name: entry for name, entry in validate_checkpoint(source, config).items() if _is_written(name, config)}
    metadata = {**model_metadata(config, name or source.name), **_file_metadata(kind), **_texts(source, config)}
    tensors = {_gguf_name(name): _open(name, entry, config, kind) for name, entry in entries.items()}
    _check_room(target, tensors)
    with _whole_file(target) as path:
        writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
        try:
            _write(writer, metadata, rope_table(config), tensors, on_tensor)
        finally:
            writer.close()


def permute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of a q or k projection (or its bias) into llama.cpp's order; see `lm.gguf.undo_permutation`."""
    rows, *columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, *columns).swapaxes(1, 2).reshape(weight.shape)


def to_float32(values: NDArray[Any], is_bf16: bool) -> NDArray[np.float32]:
    if not is_bf16:
        return np.ascontiguousarray(values, dtype=np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def _file_metadata(kind: GgufType) -> Metadata:
    return {
        "general.file_type": int(FILE_TYPES[kind]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
    }


def _texts(source: Path, config: ModelConfig) -> Metadata:
    tokenizer = load_tokenizer(source)
    template, _ = find_template(source, tokenizer)
    return {**tokenizer_metadata(tokenizer, config.vocab_size), "tokenizer.chat_template": template}


def _is_written(name: str, config: ModelConfig) -> bool:
    """A tied head is the embedding again."""
    return not (name == HEAD and config.tie_word_embeddings)


def _gguf_name(name: str) -> str:
    if name in GGUF_OUTER:
        return GGUF_OUTER[name]
    _, _, index, layer = name.split(".", 3)
    layer, _, kind = layer.rpartition(".")
    return f"blk.{index}.{GGUF_LAYERS[layer]}.{kind}"


def _open(name: str, entry: TensorEntry, config: ModelConfig, kind: GgufType) -> _Stored:
    is_matrix = len(entry.shape) == 2
    # A block of q8_0 is 32 values of one row
    fits = kind != "q8_0" or entry.shape[-1] % gguf.GGML_QUANT_SIZES[KINDS["q8_0"]][0] == 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return _Stored(
        values=_memory_map(entry, name),
        is_bf16=entry.dtype == "BF16",
        kind=KINDS[kind if fits else "f16"] if is_matrix else KINDS["f32"],
        permuted_heads=heads.get(name.split(".")[-2], 0) if config.model_type in PERMUTED else 0,
    )


def _memory_map(entry: TensorEntry, name: str) -> NDArray[Any]:
    """A tensor of a safetensors file that has been checked, bf16 as raw bits: numpy has no such type."""
    with entry.file.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(length))[name]["data_offsets"]
    return np.memmap(entry.file, DTYPES[entry.dtype], mode="r", offset=8 + length + start, shape=entry.shape)


def _num_bytes(stored: _Stored) -> int:
    values, size = gguf.GGML_QUANT_SIZES[stored.kind]
    return stored.values.size // values * size


def _check_room(target: Path, tensors: Mapping[str, _Stored]) -> None:
    needed = sum(map(_num_bytes, tensors.values())) + SPARE_BYTES
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(f"the file takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {target.parent}")


def _write(
    writer: gguf.GGUFWriter,
    metadata: Metadata,
    table: NDArray[np.float32] | None,
    tensors: Mapping[str, _Stored],
    on_tensor: OnTensor,
) -> None:
    for key, value in metadata.items():
        _add(writer, key, value)
    if table is not None:
        writer.add_tensor_info(ROPE_TABLE, table.shape, table.dtype, table.nbytes)
    for name, stored in tensors.items():
        shape, size = stored.values.shape, _num_bytes(stored)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=stored.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None  # opened with the header
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    if table is not None:
        file.write(table.tobytes())
        writer.write_padding(file, table.nbytes)
    for done, (name, stored) in enumerate(tensors.items(), start=1):
        for rows in stored.rows():
            file.write(_quantized(name, rows, stored.kind))
        writer.write_padding(file, _num_bytes(stored))
        on_tensor(done, len(tensors))


def _quantized(name: str, rows: NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> bytes:
    if kind == KINDS["f16"] and np.abs(rows).max(initial=0) > LARGEST_F16:
        raise UserError(f"{name} has weights beyond what f16 can hold; take bf16, f32 or q8_0")
    data: bytes = gguf.quantize(rows, kind).tobytes()
    return data


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


@contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` once the body is through."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(descriptor)
    path = Path(name)
    try:
        yield path
        path.chmod(0o644)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.rename(target)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
