"""Every type of weights that a GGUF file may have, and files that are damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import lm.gguf
from lm.errors import UserError
from lm.gguf import can_dequantize, convert_gguf, undo_permutation
from tests.support.gguf_file import bpe_metadata, make_tiny_gguf, tiny_parts, write_gguf

Kind = gguf.GGMLQuantizationType
READABLE = [kind for kind in Kind if can_dequantize(kind)]
HIDDEN, INNER = 256, 512
NEVER_FILES_OF_WEIGHTS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0"}
"""The library knows their names and cannot dequantize them."""


@pytest.fixture
def wide(tmp_path: Path) -> Callable[..., Path]:
    """Writes a llama of one layer whose rows are blocks of 256, with some tensors as they are given."""
    model, tokenizer = tiny_parts(
        tmp_path / "original", hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1
    )

    def write(**raw: tuple[NDArray[np.generic], Kind]) -> Path:
        tensors = {f"blk.0.{name}.weight": value for name, value in raw.items()}
        write_gguf(tmp_path / "wide.gguf", model, bpe_metadata(tokenizer, "smollm"), raw=tensors)
        return tmp_path / "wide.gguf"

    return write


def blocks(kind: Kind, rows: int, columns: int) -> NDArray[np.generic]:
    """By the library where it quantizes this type, else random bytes of which every block is finite numbers."""
    rng = np.random.default_rng(int(kind))
    try:
        quantized: NDArray[np.generic] = gguf.quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
        return quantized
    except NotImplementedError:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        wanted = rows * columns // block_size
        found = rng.integers(0, 256, (2 * wanted, block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            finite = np.isfinite(gguf.dequantize(found, kind)).all(axis=1)
        valid: NDArray[np.generic] = found[finite][:wanted].reshape(rows, -1)
        return valid


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_each_type_is_written_as_the_librarys_values_rounded(
    wide: Callable[..., Path], tmp_path: Path, kind: Kind
) -> None:
    up, query = blocks(kind, INNER, HIDDEN), blocks(kind, HIDDEN, HIDDEN)
    (folder := tmp_path / "out").mkdir()
    convert_gguf(wide(ffn_up=(up, kind), attn_q=(query, kind)), folder)
    written = load_file(folder / "model.safetensors")
    values = gguf.dequantize(up, kind)
    assert values.std() > 0
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(values).bfloat16())
    ordered = undo_permutation(gguf.dequantize(query, kind), 4)
    assert torch.equal(written["model.layers.0.self_attn.q_proj.weight"], torch.from_numpy(ordered).bfloat16())


def test_the_types_are_all_that_the_library_reads(figure: Callable[[str, object], None]) -> None:
    assert {kind.name for kind in Kind} - {kind.name for kind in READABLE} == NEVER_FILES_OF_WEIGHTS
    figure("GGUF types of weights that are read", len(READABLE))


@pytest.mark.parametrize("name", sorted(NEVER_FILES_OF_WEIGHTS))
def test_another_type_is_refused_with_the_tensors_name(wide: Callable[..., Path], tmp_path: Path, name: str) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[getattr(Kind, name)]
    data = np.zeros((INNER, HIDDEN // block_size * block_bytes), np.uint8)
    with pytest.raises(UserError, match=f"the tensor blk.0.ffn_up.weight in the type {name}, which cannot be read"):
        convert_gguf(wide(ffn_up=(data, getattr(Kind, name))), tmp_path)


def test_a_type_without_a_name_is_refused_with_its_number(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "tiny.gguf")
    data = bytearray((tmp_path / "tiny.gguf").read_bytes())
    name = b"blk.0.ffn_down.weight"
    data[data.index(name) + len(name) + 4 + 2 * 8] = 31  # behind the number of dimensions and the two of them
    (tmp_path / "tiny.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"tensor blk.0.ffn_down.weight in the type number 31, .* such as Q8_0"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_rows_taken_some_at_a_time_are_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_gguf(tmp_path / "tiny.gguf")
    results = []
    for name, values in (("whole", lm.gguf.CHUNK_VALUES), ("row by row", 1), ("some rows", 7 * 32)):
        monkeypatch.setattr(lm.gguf, "CHUNK_VALUES", values)
        (folder := tmp_path / name).mkdir()
        convert_gguf(tmp_path / "tiny.gguf", folder)
        results.append((folder / "model.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (folder := tmp_path / "out").mkdir()
    for length in [*range(0, len(data), len(data) // 40), len(data) - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(UserError, match="is not a readable GGUF file"):
            convert_gguf(tmp_path / "cut.gguf", folder)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_altered_bytes_raise_nothing_but_our_error(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    """And soon: lengths of 2**60 are not believed."""
    make_tiny_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    head = whole.index(b"blk.1.ffn_down.weight")
    (folder := tmp_path / "out").mkdir()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 8))):
            data[rng.randrange(4, head)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        (tmp_path / "altered.gguf").write_bytes(data)
        try:
            convert_gguf(tmp_path / "altered.gguf", folder)
        except UserError:
            refused += 1
    figure("GGUF files with altered headers", f"{refused} of 150 refused, the rest converted")
    assert refused > 20


def test_a_file_for_machines_of_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_uint32("llama.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="the byte order of another kind of machine"):
        convert_gguf(tmp_path / "big.gguf", tmp_path)
