"""Pull a model that is on this machine: a GGUF file, or a folder of Hugging Face's, torchtune's or Meta's files."""

from __future__ import annotations

import shutil
from pathlib import Path

from lm.folder import publish
from lm.layout import ORIGINAL, has_safetensors
from service.pull_work import check_model, convert, only_one, refuse_present, say

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
OTHER_ENDINGS = (".json", ".jinja", ".model", ".txt", ".md")
OTHER_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


def pull_gguf(source: Path, folder: Path) -> Path:
    """Convert the GGUF file `source` into the new model folder `folder`. Raises UserError."""
    with only_one(folder):
        refuse_present(folder)
        with publish(folder) as target:
            convert(source, target)
            check_model(target)
    return folder


def pull_folder(source: Path, folder: Path) -> Path:
    """Copy the model folder `source` to `folder`, whole or not at all. Raises UserError for what is no model.

    Links are followed, so that a snapshot of Hugging Face's cache becomes files; code is left behind.
    """
    check_model(source)
    with only_one(folder):
        refuse_present(folder)
        say(f"copying {source}")
        with publish(folder) as target:
            for path in model_files(source):
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
