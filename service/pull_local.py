"""Pull a model that is on this machine: a GGUF file, or a folder of Hugging Face's, torchtune's or Meta's files."""

from __future__ import annotations

import shutil
from pathlib import Path

from lm.errors import UserError
from lm.folder import publish
from lm.layout import ORIGINAL, has_safetensors
from service.model_facts import check_model
from service.pull_work import convert, is_present, only_one, say

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
OTHER_ENDINGS = (".json", ".jinja", ".model", ".txt", ".md")
OTHER_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


def pull_gguf(source: Path, folder: Path) -> Path:
    """Convert the GGUF file `source` into the new model folder `folder`. Raises UserError."""
    with only_one(folder):
        if is_present(folder):
            return folder
        with publish(folder) as target:
            convert(source, target)
            check_model(target)
    return folder


def pull_folder(source: Path, folder: Path) -> Path:
    """Copy the model folder `source` to `folder`, whole or not at all. Raises UserError for what is no model.

    A snapshot in Hugging Face's cache becomes files; other links that leave the folder are refused, and code is left
    behind.
    """
    check_model(source)
    files = model_files(source)
    _refuse_links(source, files)
    with only_one(folder):
        if is_present(folder):
            return folder
        say(f"copying {source}")
        with publish(folder) as target:
            for path in files:
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
            check_model(target)
    return folder


def model_files(source: Path) -> list[Path]:
    """The files of a model folder that are needed, also those in original/. Torch's only where no safetensors are."""
    unneeded = tuple(ending for ending in WEIGHT_ENDINGS[1:] if has_safetensors(source))
    found = [*sorted(source.iterdir()), *sorted((source / ORIGINAL).glob("*"))]
    return [path for path in found if path.is_file() and _is_wanted(path.name, unneeded)]


def _is_wanted(name: str, unneeded: tuple[str, ...]) -> bool:
    if name.startswith(".") or name.endswith(unneeded or "/"):
        return False
    return name.endswith(WEIGHT_ENDINGS + OTHER_ENDINGS) or name.startswith(OTHER_NAMES)


def _refuse_links(source: Path, files: list[Path]) -> None:
    """A folder from elsewhere must not have files of this machine copied beside a model."""
    root = source.resolve()
    cache = root.parent.parent / "blobs"
    roots = (root, cache) if root.parent.name == "snapshots" else (root,)
    for path in files:
        if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
            raise UserError(
                f"model: {path} is a link to {path.resolve()}, outside the folder: copy it there", param="model"
            )
