"""Weights from files that `torch.save` wrote, under Hugging Face's names. Nothing in such a file is executed.

Names are Hugging Face's, Meta's or torchtune's own, told apart by themselves. Meta turns neighbouring rows of a query
or key head by one angle, Hugging Face row i and row i + D / 2; so the rows of Meta's are put into the other order.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lm.config import ModelConfig
from lm.errors import UserError
from lm.layout import PickledFiles, config_name, find_pickled
from lm.weight_files import HEAD, UNUSED_SUFFIX, check_tensors, refuse

EMBEDDING = "model.embed_tokens.weight"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
UNUSED = "rope.freqs"
"""Meta's table of frequencies, which is computed today."""
INTERLEAVED_FAMILIES = ("llama", "mistral")
"""In torchtune's own format. Its Qwen models turn their rows as Hugging Face does."""
FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
NAME_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|scale|bias)")

TOP = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    "norm.scale": "model.norm.weight",
    "output.weight": HEAD,
}
META = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TORCHTUNE = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "sa_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor as a file has it; `tensor` is a view of the mapped file, of which nothing was read yet."""

    file: Path
    tensor: Tensor
    interleaved_heads: int | None = None
    """Number of heads whose rows are in Meta's order."""

    def read(self) -> Tensor:
        if self.interleaved_heads is None:
            return self.tensor
        pairs: Tensor = self.tensor.unflatten(0, (self.interleaved_heads, -1, 2))  # (H, D / 2, 2) rows
        return pairs.transpose(1, 2).flatten(0, 2)


def open_pickled(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The tensors of a folder by Hugging Face's names, checked against `config`. The files are mapped, not read.

    A tied checkpoint may also hold `lm_head.weight`. Raises NotFoundError when the folder does not exist, and
    UserError that names the files or tensors which are missing, damaged, unknown or of another shape.
    """
    pickled = find_pickled(folder)
    found: dict[str, Stored] = {}
    for path in pickled.files:
        tensors = _read_table(path)
        _check_place(pickled, path, tensors)
        refuse(path, "repeats tensors of another file:", [name for name in tensors if name in found])
        found |= {name: Stored(file=path, tensor=tensor) for name, tensor in tensors.items()}
    _check_index(pickled, found)
    found = {name: stored for name, stored in found.items() if name != UNUSED and not name.endswith(UNUSED_SUFFIX)}
    renamed = _with_hf_names(found, config)
    check_tensors(
        folder,
        {name: tuple(stored.tensor.shape) for name, stored in renamed.items()},
        config,
        wrong_dtypes={n: stored.tensor.dtype for n, stored in renamed.items() if stored.tensor.dtype not in FLOATS},
        config_file=config_name(folder),
    )
    return renamed


def read_pickled(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one after the other. Raises as `open_pickled` does, before the first one."""
    stored = open_pickled(folder, config)
    for name in list(stored):
        yield name, stored.pop(name).read()  # a file's mapping goes with its last tensor


def _read_table(path: Path) -> dict[str, Tensor]:
    """What the file maps names to. Raises UserError unless that is a flat table of plain tensors."""
    _check_archive(path)
    try:
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, error), param="model") from error
    except Exception as error:  # the pickle is a program, and damaged ones fail in many ways
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} is damaged ({reason}): copy it again", param="model") from error
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        raise UserError(f"{path} must hold a table of names and tensors (got {type(table).__name__})", param="model")
    odd = [f"{name} ({type(value).__name__})" for name, value in table.items() if not _is_plain(value)]
    refuse(path, "must map names to plain tensors, unlike", odd)
    return dict(table)


def _check_archive(path: Path) -> None:
    """`torch.save` stores the bytes of tensors as they are; mapped, compressed ones would be read as weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(
            f"{path} is not a whole file of torch.save ({error}): it is damaged or cut off, a pointer of Git LFS, or "
            "older than PyTorch 1.6. Copy it again, or save it anew",
            param="model",
        ) from error
    refuse(path, "has compressed parts, and must be as torch.save wrote it:", compressed)


def _refusal(path: Path, error: Exception) -> str:
    """Without torch's advice to switch the guard off."""
    if match := FORBIDDEN.search(str(error)):
        return (
            f"{path} is refused: it asks for {match[1]}, and a file of weights may hold nothing but tensors. Nothing "
            "of it was run. Save the model's state_dict() alone, best as safetensors"
        )
    return f"{path} is refused, as its pickle is damaged or holds more than tensors; copy it again"


def _is_plain(value: object) -> bool:
    is_tensor = type(value) in (Tensor, torch.nn.Parameter)
    return is_tensor and isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _check_place(pickled: PickledFiles, path: Path, tensors: Iterable[str]) -> None:
    if pickled.weight_map is not None and pickled.index is not None:
        unknown = [name for name in tensors if pickled.weight_map.get(name) != path.name]
        refuse(pickled.index, "does not name the tensors", unknown)


def _check_index(pickled: PickledFiles, found: Mapping[str, Stored]) -> None:
    if pickled.weight_map is not None and pickled.index is not None:
        misplaced = [f"{name} ({file})" for name, file in pickled.weight_map.items() if name not in found]
        refuse(pickled.index, "names tensors that are not in their files:", misplaced)


def _with_hf_names(found: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """Unknown names stay as they are. Meta and torchtune leave out a head that is the embedding."""
    if not any(name in TOP for name in found):
        return dict(found)
    is_torchtune = any(".attn." in name for name in found)
    interleaved = not is_torchtune or config.model_type in INTERLEAVED_FAMILIES
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if interleaved else {}
    renamed: dict[str, Stored] = {}
    for name, stored in found.items():
        hf_name = _hf_name(name, TORCHTUNE if is_torchtune else META)
        refuse(stored.file, f"holds both {name} and another name for", [hf_name] if hf_name in renamed else [])
        layer = hf_name.split(".")[-2] if hf_name != name else ""
        renamed[hf_name] = replace(stored, interleaved_heads=heads.get(layer))
    if EMBEDDING in renamed and not config.tie_word_embeddings:
        renamed.setdefault(HEAD, renamed[EMBEDDING])
    return renamed


def _hf_name(name: str, layers: Mapping[str, str]) -> str:
    if (match := NAME_IN_LAYER.fullmatch(name)) and match[2] in layers:
        kind = "bias" if match[3] == "bias" else "weight"
        return f"model.layers.{match[1]}.{layers[match[2]]}.{kind}"
    return TOP.get(name, name)
