"""Files and folders that appear whole or not at all. Torch-free."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_path(text: str | Path) -> Path:
    """A path as a user wrote it, `~` and `~name` replaced; the tilde of a user that does not exist stays."""
    return Path(os.path.expanduser(text))


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader sees the old bytes or the new ones, also after a power cut."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def publish(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on success it is fsynced and renamed to `final`.

    A folder with its final name is complete. Raises FileExistsError when `final` exists. A body that raises leaves
    nothing behind; a process killed in the body leaves a folder named `.NAME.XXXX.tmp`.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(final.parent)
