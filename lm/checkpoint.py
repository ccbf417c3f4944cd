"""Weights from a model folder into a model, and from a model into a folder that transformers and vLLM load.

A folder is published whole: one with its final name is complete, and it is never written again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm.config import load_config
from lm.errors import UserError
from lm.folder import publish
from lm.model import CausalLM
from lm.template import DEFAULT_ORIGIN, DEFAULT_TEMPLATE, find_template
from lm.weight_files import INDEX_FILE, SINGLE_FILE, TensorEntry, validate_checkpoint

SHARD_BYTES = 5_000_000_000
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
)
"""What makes weights a model that others can use; copied from the base where it has it."""


def load_weights(model: CausalLM, folder: Path) -> None:
    """Fill every parameter of `model` from the safetensors files of `folder`, cast to the model's dtype.

    One tensor at a time is in memory beside the model. Raises UserError, before anything is read, when the tensors
    are not exactly those of the model.
    """
    entries = validate_checkpoint(folder, model.config)
    parameters = dict(model.named_parameters())
    by_file: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append(name)
    with torch.no_grad():
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if name in parameters:
                        parameters[name].copy_(file.get_tensor(name))
    if model.lm_head is None and (head := entries.get("lm_head.weight")):
        _check_tied_head(model, head)


def save_model(
    state: Mapping[str, Tensor],
    config_folder: Path,
    final: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Publish `state` (names as in `CausalLM.state_dict()`) as the model folder `final`, cast to `dtype`.

    config.json, with its dtype set, and tokenizer, template and generation settings come from `config_folder`, the
    base model. A base without a chat template gets the default one that it was used with. Raises FileExistsError when
    `final` exists, UserError when `state` does not fit the config.
    """
    with publish(final) as folder:
        for name in COMPANIONS:
            if (config_folder / name).is_file():
                shutil.copyfile(config_folder / name, folder / name)
        _write_config(config_folder, folder, dtype)
        if find_template(config_folder)[1] == DEFAULT_ORIGIN:
            (folder / "chat_template.jinja").write_text(DEFAULT_TEMPLATE, encoding="utf-8")
        _write_weights(state, folder, dtype, shard_bytes)
        validate_checkpoint(folder, load_config(folder))


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of a SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _check_tied_head(model: CausalLM, head: TensorEntry) -> None:
    """A tied checkpoint may repeat its embedding as the head; another head would be dropped in silence."""
    embedding = model.model.embed_tokens.weight
    with safe_open(head.file, framework="pt") as file:
        same = torch.equal(file.get_tensor("lm_head.weight").to(embedding.dtype), embedding.detach().cpu())
    if not same:
        raise UserError(
            f"{head.file} holds an lm_head.weight unlike its embedding, but tie_word_embeddings is true: set it to "
            "false in config.json, or remove the tensor",
            param="model",
        )


def _write_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    config["dtype"] = name
    if "torch_dtype" in config:  # transformers 4 reads this one
        config["torch_dtype"] = name
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    shards = list(_shards(state, dtype.itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(state: Mapping[str, Tensor], itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut so that a shard holds `shard_bytes` at most; a larger tensor has a shard of its own."""
    names: list[str] = []
    size = 0
    for name, tensor in state.items():
        tensor_bytes = tensor.numel() * itemsize
        if names and size + tensor_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor_bytes
    yield names
