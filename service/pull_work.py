"""What every kind of pull does: one at a time, leftovers away, conversion, messages. Torch-free."""

from __future__ import annotations

import fcntl
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Never

from tqdm import tqdm

from lm.errors import UserError
from lm.gguf import convert_gguf
from service.model_facts import MODEL_NAME


def destination(name: str, home: Path) -> Path:
    """`home/models/NAME`. Raises UserError for a name that fits no model id."""
    if not MODEL_NAME.fullmatch(name):
        raise UserError(
            f"name: {name!r:.120} cannot stand in a model id; give another with --name: letters, digits, `.`, `_`, `-`",
            param="name",
        )
    return home / "models" / name


def cleaned(name: str) -> str:
    """A file's or folder's name as a model id: what cannot stand in one becomes `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")


def is_present(folder: Path) -> bool:
    """Whether the model is there; then the user reads so."""
    if folder.exists():
        say(f"{folder.name} is there already, in {folder.parent}: for another one choose --name, or delete that folder")
    return folder.exists()


def convert(source: Path, target: Path) -> None:
    """Convert a GGUF file, with a progress bar."""
    with tqdm(desc=f"converting {source.name}", unit="tensor", dynamic_ncols=True) as bar:
        convert_gguf(source, target, lambda done, total: _advance(bar, done, total))


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One pull of a model at a time; holding the lock, every temporary folder is one that a killed pull left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another pull of this model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover)
        yield


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _advance(bar: tqdm[Never], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
