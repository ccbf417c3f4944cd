"""A translated configuration beside the checkpoint that it names: builder, files and tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lm.config import read_hf_config
from lm.errors import UserError
from lm.folder import user_path
from trainer.torchtune.models import BUILDERS, CHECKPOINT_TYPES, Shape, fitting
from trainer.torchtune.overrides import COMPONENT
from trainer.torchtune.translation import Translation


def compare(translation: Translation, folder: Path) -> Translation:
    """`translation`, once it is known to fit the model in `folder`, with notes on the files that are really read.

    `tokenizer_file` stays only where the folder itself would give another tokenizer, or none. Raises UserError.
    """
    config = read_hf_config(folder)
    if translation.builder is not None:
        _compare_builder(translation.builder, config, folder)
    _compare_type(translation.checkpoint_type, config, folder)
    notes = [*_file_notes(translation.checkpoint_files, folder)]
    options = dict(translation.options)
    path = options.pop("tokenizer_file", None)
    if path is not None:
        chosen, text = _tokenizer(path, folder)
        notes.append(f"tokenizer.path: {text}")
        if chosen is not None:
            options["tokenizer_file"] = str(chosen)
    generation = translation.generation and translation.generation.model_copy(
        update={"tokenizer_file": options.get("tokenizer_file"), "model_dir": str(folder)}
    )
    notes = [*translation.notes, *notes]
    return replace(translation, options=options, generation=generation, notes=tuple(notes))


def shape_of(config: dict[str, Any], names: Shape) -> dict[str, Any]:
    """The numbers of a config.json that a builder has, too."""
    heads = config.get("num_attention_heads")
    return {name: config.get(name, heads if name == "num_key_value_heads" else None) for name in names}


def _compare_builder(name: str, config: dict[str, Any], folder: Path) -> None:
    builder = BUILDERS[name]
    found, model_type = shape_of(config, builder.shape), config.get("model_type")
    differences = [
        f"{key} is {found[key]!r:.20} there, {value} in the builder"
        for key, value in builder.shape.items()
        if found[key] != value
    ]
    if model_type != builder.model_type:
        differences.insert(0, f"model_type is {model_type!r:.40} there, {builder.model_type!r} in the builder")
    if not differences:
        return
    others = fitting(found, str(model_type))
    fits = f"take {' or '.join(others)}, or remove" if others else "remove"
    raise UserError(
        f"model.{COMPONENT}: {name} does not fit the checkpoint in {folder}: {'; '.join(differences[:3])}. Name the right "
        f"checkpoint_dir, or {fits} `model`: the model is built from config.json",
        param=f"model.{COMPONENT}",
    )


def _compare_type(name: str | None, config: dict[str, Any], folder: Path) -> None:
    model_type = config.get("model_type")
    if name is not None and CHECKPOINT_TYPES[name] != model_type:
        raise UserError(
            f"checkpointer.model_type: {name} does not fit: model_type is {model_type!r:.40} in {folder}",
            param="checkpointer.model_type",
        )


def _file_notes(names: tuple[str, ...], folder: Path) -> list[str]:
    where = "checkpointer.checkpoint_files"
    outside = next((name for name in names if name.startswith("/") or ".." in name.split("/")), None)
    if outside is not None:
        raise UserError(f"{where}: {outside!r:.80} is no file of checkpoint_dir", param=where)
    missing = next((name for name in names if not _is_file(folder / name)), None)
    if missing is not None:
        raise UserError(f"{where}: there is no file {missing!r:.80} in {folder}", param=where)
    others = [path for path in folder.glob("*.safetensors") if path.name not in names]
    if names and others and not any(name.endswith(".safetensors") for name in names):
        return [f"{where}: weights are read from the safetensors files beside {names[0]}, which are preferred"]
    return []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        return False


def _tokenizer(path: str, folder: Path) -> tuple[Path | None, str]:
    """The file to read where it is not the one that `folder` gives by itself, and what is said about it."""
    named = user_path(path)
    if (folder / "tokenizer.json").is_file():
        return None, f"{folder / 'tokenizer.json'} is read, which is preferred to {path:.200}"
    if named.suffix == ".json" and named.name != "tokenizer.json":
        raise UserError(
            f"tokenizer.path: {path:.200} cannot be read by itself; put the tokenizer.json of the model into {folder}",
            param="tokenizer.path",
        )
    if not _is_file(named):
        raise UserError(
            f"tokenizer.path: there is no file {path:.200}, nor a tokenizer.json in {folder}", param="tokenizer.path"
        )
    return named.resolve(), f"{path:.200} is read, since there is no tokenizer.json in {folder}"
