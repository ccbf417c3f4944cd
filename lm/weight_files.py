"""The safetensors files of a model folder, by their headers alone: which tensors are where, and whether they fit.

Torch-free, and no tensor is read: a folder from anywhere can be judged before memory is taken for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lm.config import ModelConfig
from lm.errors import NotFoundError, UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
HEAD = "lm_head.weight"
UNUSED_SUFFIX = ".rotary_emb.inv_freq"  # a table that llama checkpoints of 2023 carry and that is computed today

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as a file's header describes it."""

    file: Path
    dtype: str
    """In safetensors' spelling: `F32`, `BF16` ..."""
    shape: Shape


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every parameter of the model that `config` describes, an untied head last."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention, mlp = config.attention_bias, config.mlp_bias
    linears = (
        ("self_attn.q_proj", query, hidden, attention),
        ("self_attn.k_proj", key_value, hidden, attention),
        ("self_attn.v_proj", key_value, hidden, attention),
        ("self_attn.o_proj", hidden, query, config.attention_output_bias),
        ("mlp.gate_proj", inner, hidden, mlp),
        ("mlp.up_proj", inner, hidden, mlp),
        ("mlp.down_proj", hidden, inner, mlp),
    )
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for prefix in (f"model.layers.{index}." for index in range(config.num_hidden_layers)):
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        if config.qk_norm:
            yield f"{prefix}self_attn.q_norm.weight", (config.head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (config.head_dim,)
        for name, rows, columns, bias in linears:
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def validate_checkpoint(folder: Path, config: ModelConfig) -> dict[str, TensorEntry]:
    """The tensors of a folder's safetensors files, checked against `config` from the headers alone.

    A tied checkpoint may also hold `lm_head.weight`. Raises NotFoundError when the folder does not exist, and
    UserError that names the files or tensors which are missing, damaged, unknown or of another shape.
    """
    found = {name: entry for name, entry in read_entries(folder).items() if not name.endswith(UNUSED_SUFFIX)}
    check_tensors(
        folder,
        {name: entry.shape for name, entry in found.items()},
        config,
        wrong_dtypes={name: entry.dtype for name, entry in found.items() if entry.dtype not in FLOAT_DTYPES},
    )
    return found


def check_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    config: ModelConfig,
    *,
    wrong_dtypes: Mapping[str, object],
    config_file: str | None = "config.json",
) -> None:
    """Raise UserError that names the tensors of `folder` which are missing, unknown, or of another shape or dtype."""
    expected = dict(expected_shapes(config))
    wrong = [
        f"{name} is {_times(shapes[name])} and should be {_times(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    wrong += [f"{name} has dtype {dtype}" for name, dtype in wrong_dtypes.items()]
    unknown = [name for name in shapes if name not in expected and name != HEAD]
    refuse(folder, "lacks the tensors", [name for name in expected if name not in shapes])
    refuse(folder, f"does not fit its {config_file}:", wrong)
    refuse(folder, f"has tensors that its {config_file} leaves no place for:", unknown)


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder: of model.safetensors, else of the files its index names."""
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}", param="model")
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise UserError(f"{folder} has no weights: looked for {SINGLE_FILE} and {INDEX_FILE}", param="model")
    weight_map = _read_index(folder / INDEX_FILE)
    headers = {name: read_header(folder / name) for name in sorted(set(weight_map.values()))}
    misplaced = [f"{tensor} ({file})" for tensor, file in weight_map.items() if tensor not in headers[file]]
    refuse(folder / INDEX_FILE, "names tensors that are not in their files:", misplaced)
    entries = [(tensor, entry) for header in headers.values() for tensor, entry in header.items()]
    refuse(
        folder / INDEX_FILE, "does not name the tensors", [tensor for tensor, _ in entries if tensor not in weight_map]
    )
    return {tensor: entry for tensor, entry in entries if entry.file.name == weight_map[tensor]}


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. The library checks the header against the file's size. Raises UserError if damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {
                name: TensorEntry(file=path, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}", param="model") from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error!r}", param="model") from error
    if not isinstance(weight_map, Mapping) or not all(_is_plain_name(name) for name in weight_map.values()):
        raise UserError(f"{path}: weight_map must map tensors to names of files beside it", param="model")
    return dict(weight_map)


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def refuse(where: Path, what: str, names: Iterable[str]) -> None:
    """Raise UserError that lists the first of `names`, if there are any."""
    listed = list(names)
    if listed:
        rest = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise UserError(f"{where} {what} {', '.join(listed[:5])}{rest}", param="model")


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
