"""Weights from a model folder into a model, and from a model into a folder that transformers and vLLM load.

What is read may be safetensors or the files of torch.save; what is written is safetensors under Hugging Face's names.
A folder is published whole: one with its final name is complete, and it is never written again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm.config import ModelConfig, load_config, read_hf_config
from lm.errors import UserError
from lm.folder import publish
from lm.layout import ORIGINAL, config_name, has_safetensors, warn_of_unread
from lm.model import CausalLM
from lm.pickled_weights import open_pickled, read_pickled
from lm.template import OWN_PLACES, TOOL_TEMPLATE_FILE, find_template
from lm.tokenizer import load_tokenizer
from lm.weight_files import INDEX_FILE, SINGLE_FILE, validate_checkpoint

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILE, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"
ORIGINAL_TOKENIZER = f"{ORIGINAL}/{TOKENIZER_MODEL}"
TOKENIZER_PARTS = (TOKENIZER_FILE, TOKENIZER_MODEL, ORIGINAL_TOKENIZER, "added_tokens.json", "vocab.json", "merges.txt")
"""What is a base's own tokenizer; its settings hold for another file of it, too."""
TIKTOKEN_SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast"}
SENTENCEPIECE_SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
}
"""What transformers has to be told of Meta's files; of Llama 2's it would leave out the BOS."""
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
    TOOL_TEMPLATE_FILE,
    ORIGINAL_TOKENIZER,
    "LICENSE",
)
"""What makes weights a model that others can use; copied from the base where it has it."""


def validate_weights(folder: Path, config: ModelConfig) -> None:
    """Raise what `load_weights` would refuse, from headers and file tables alone; no weights are read."""
    if has_safetensors(folder):
        validate_checkpoint(folder, config)
    else:
        open_pickled(folder, config)


def load_weights(model: CausalLM, folder: Path) -> None:
    """Fill every parameter of `model` from the files of `folder` (see `lm.layout`), cast to the model's dtype.

    One tensor at a time is in memory beside the model; the head that a tied checkpoint may repeat stays to the end.
    Raises UserError, before a parameter has changed, when the tensors are not exactly those of the model.
    """
    parameters = dict(model.named_parameters())
    head: Tensor | None = None
    read = _read_safetensors if has_safetensors(folder) else read_pickled
    with torch.no_grad():
        for name, tensor in read(folder, model.config):
            if name in parameters:
                parameters[name].copy_(tensor)
            elif model.lm_head is None:
                head = tensor
    if head is not None:
        _check_tied_head(model, head, folder)


def save_model(
    state: Mapping[str, Tensor],
    config_folder: Path,
    final: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    tokenizer_file: Path | None = None,
) -> None:
    """Publish what `write_model` writes as the model folder `final`. Raises FileExistsError when `final` exists."""
    with publish(final) as folder:
        write_model(state, config_folder, folder, dtype=dtype, shard_bytes=shard_bytes, tokenizer_file=tokenizer_file)


def write_model(
    state: Mapping[str, Tensor],
    config_folder: Path,
    folder: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    tokenizer_file: Path | None = None,
) -> None:
    """Write `state` (names as in `CausalLM.state_dict()`) as a model into the empty `folder`, cast to `dtype`.

    config.json, with its dtype set, and tokenizer, template and generation settings come from `config_folder`, the
    base model; one in Meta's format gets Hugging Face's config.json and tokenizer.json. A base without a chat template
    gets the default one that it was used with. `tokenizer_file` is the file of the tokenizer that the model was trained
    with, if it is not the base's own. Raises UserError when `state` does not fit the config.
    """
    _copy_companions(config_folder, folder)
    _write_config(config_folder, folder, dtype)
    _write_tokenizer(config_folder, folder, load_config(config_folder), tokenizer_file)
    tokenizer = load_tokenizer(config_folder, tokenizer_file) if tokenizer_file else None
    template, origin = find_template(config_folder, tokenizer)
    if origin not in OWN_PLACES:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
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


def _read_safetensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, file by file. Raises UserError before the first one."""
    warn_of_unread(folder)
    by_file: dict[Path, list[str]] = {}
    for name, entry in validate_checkpoint(folder, config).items():
        by_file.setdefault(entry.file, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)


def _check_tied_head(model: CausalLM, head: Tensor, folder: Path) -> None:
    """A tied checkpoint may repeat its embedding as the head; another head would be dropped in silence."""
    embedding = model.model.embed_tokens.weight
    if not torch.equal(head.to(embedding.dtype), embedding.detach().cpu()):
        raise UserError(
            f"{folder} holds an lm_head.weight unlike its embedding, but tie_word_embeddings is true: set it to "
            f"false in its {config_name(folder)}, or remove the tensor",
            param="model",
        )


def _copy_companions(source: Path, folder: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _write_tokenizer(source: Path, folder: Path, config: ModelConfig, file: Path | None) -> None:
    """Where the base's is not to be taken as it is, since it is another one or Meta's file alone: in a form, or in the
    place, in which transformers reads it."""
    models = [path for path in (source / TOKENIZER_MODEL, source / ORIGINAL_TOKENIZER) if path.is_file()]
    if file is None and ((source / TOKENIZER_FILE).is_file() or not models):
        return
    tokenizer = load_tokenizer(source, file)
    exported = tokenizer.tokenizer_json()
    if file is not None:
        for name in TOKENIZER_PARTS:
            (folder / name).unlink(missing_ok=True)
    if exported is None:
        shutil.copyfile(file or models[0], folder / TOKENIZER_MODEL)
    else:
        (folder / TOKENIZER_FILE).write_text(exported, encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        kind = SENTENCEPIECE_SETTINGS if exported is None else TIKTOKEN_SETTINGS
        length = {"model_max_length": config.max_position_embeddings, "clean_up_tokenization_spaces": False}
        _write_json(folder / "tokenizer_config.json", {**kind, **length, **tokenizer.special_tokens})


def _write_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    config = read_hf_config(source)
    name = str(dtype).removeprefix("torch.")
    config["dtype"] = name
    if "torch_dtype" in config:  # transformers 4 reads this one
        config["torch_dtype"] = name
    _write_json(folder / "config.json", config)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        _write_json(folder / INDEX_FILE, index)


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
