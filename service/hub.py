"""Pull a model from the Hugging Face hub. Torch-free; no code is ever downloaded.

The hub's library finds the token, the endpoint and the files; what to do with the files is ours, because the library
begins a file anew where a process was killed in it, and weights come in files of gigabytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from lm.errors import NotFoundError, UserError
from lm.folder import publish
from service.model_facts import check_model
from service.pull_work import is_present, only_one, say

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
COMPANIONS = (
    *("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.md"),
    "original/tokenizer.model",  # torchtune's configs name it
)
SAFETENSORS, TORCH = "*.safetensors", "pytorch_model*.bin"
MISTRAL = "consolidated*"
"""The same weights a second time, under mistral's own names."""
META = "*.pth"
PLAIN = re.compile(r"(original/)?[A-Za-z0-9_][\w. +-]*", re.ASCII)
NETWORK_MODULES = ("httpx", "httpcore", "requests", "urllib3")
PARTIAL = ".part"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file as the hub lists it."""

    name: str
    size: int | None
    blob: str
    """What git calls this content."""
    sha256: str | None
    """Of large files only."""


def pull_hub(source: str, folder: Path) -> Path:
    """Download `org/name` or `org/name@revision` to `folder`, which appears whole or not at all.

    Started again, a download that was cut or killed goes on where it ended. Raises UserError, NotFoundError.
    """
    found = HUB_ID.fullmatch(source)
    assert found is not None  # pull_any looked
    with only_one(folder):
        if is_present(folder):
            return folder
        partial = folder.parent / f".{folder.name}.download"
        try:
            places = _download(found["repo"], found["revision"], partial)
        except UserError:
            raise
        except Exception as error:
            raise _explained(source, error) from error
        with publish(folder) as target:
            _link(places, target)
            check_model(target)
        shutil.rmtree(partial)
    return folder


def wanted(names: list[str]) -> list[str]:
    """What to download of a repository's files: safetensors, else torch's own files, else Meta's. Never code."""
    plain = [name for name in names if PLAIN.fullmatch(name)]
    weights = _weights(plain)
    return [name for name in plain if name in weights or any(fnmatchcase(name, pattern) for pattern in COMPANIONS)]


def _weights(names: list[str]) -> list[str]:
    top = [name for name in names if "/" not in name and not fnmatchcase(name, MISTRAL)]
    for pattern in (SAFETENSORS, TORCH):
        if found := [name for name in top if fnmatchcase(name, pattern)]:
            return found
    return [name for name in names if fnmatchcase(name, META)]


def _download(repo: str, revision: str | None, partial: Path) -> dict[str, Path]:
    """All files of one commit, so that a branch that moves meanwhile mixes nothing: where each of them lies."""
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    commit = info.sha or revision or "main"
    files = _files(info, commit)
    say(f"downloading {repo} at {commit} ({len(files)} files, {sum(file.size or 0 for file in files):,} bytes)")
    places = {file: _place(file, partial) for file in files}
    partial.mkdir(exist_ok=True)
    for stale in set(partial.iterdir()) - {partial / place.relative_to(partial).parts[0] for place in places.values()}:
        shutil.rmtree(stale)
    _check_space(files, partial)
    for file, place in places.items():
        _get(hf_hub_url(repo, file.name, revision=commit), file, place)
    return {file.name: place for file, place in places.items()}


def _files(info: ModelInfo, commit: str) -> list[HubFile]:
    listed = info.siblings or []
    names = wanted([file.rfilename for file in listed])
    return [
        HubFile(
            name=file.rfilename,
            size=file.size,
            blob=file.blob_id or commit,
            sha256=file.lfs.sha256 if file.lfs else None,
        )
        for file in listed
        if file.rfilename in names
    ]


def _place(file: HubFile, partial: Path) -> Path:
    """By content, so that what another commit left is never taken for this one's."""
    return partial / hashlib.sha256(f"{file.name} {file.blob} {file.sha256}".encode()).hexdigest()[:16] / file.name


def _check_space(files: list[HubFile], partial: Path) -> None:
    done = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    needed, free = sum(file.size or 0 for file in files) - done, shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"model: {needed:,} bytes are to be downloaded, and {partial.parent} has room for {free:,}: free some, or "
            "choose another place with --home",
            param="model",
        )


def _get(url: str, file: HubFile, path: Path) -> None:
    """Download one file, or what is missing of it. The whole file has its name, the beginning of one another name."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PARTIAL)
    if part.exists() and (file.size is None or part.stat().st_size > file.size):
        part.unlink()
    headers = build_hf_headers() | {"accept-encoding": "identity"}  # a range of bytes is one of the file itself
    with part.open("ab") as stream:
        resume, name = stream.tell(), file.name
        http_get(url, stream, resume_size=resume, headers=headers, expected_size=file.size, displayed_filename=name)
    _check_content(part, file)
    part.rename(path)


def _check_content(part: Path, file: HubFile) -> None:
    if file.sha256 is None:
        return
    with part.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        part.unlink()
        raise UserError(
            f"model: {file.name} arrived damaged: its SHA-256 is {found}, and should be {file.sha256}. It was deleted; "
            "run the same command again",
            param="model",
        )


def _link(places: dict[str, Path], target: Path) -> None:
    """Hard links: no second copy, and what was downloaded stays until the model is published."""
    for name, place in places.items():
        (target / name).parent.mkdir(exist_ok=True)
        os.link(place, target / name)


def _explained(source: str, error: Exception) -> UserError:
    """One line for the user. The hub's own texts are long, so we say it ourselves; none holds the token."""
    kind, reason = _explanation(error)
    return kind(f"model: {source}: {reason}", param="model")


def _explanation(error: Exception) -> tuple[type[UserError], str]:
    match error:
        case GatedRepoError():
            return (
                UserError,
                "it is gated: accept its terms on its page on the hub, and set HF_TOKEN to a token of yours",
            )
        case RevisionNotFoundError():
            return NotFoundError, "there is no such revision; leave `@...` out for the newest"
        case RepositoryNotFoundError():
            return NotFoundError, "the hub has no such model, or it is private: check the spelling, and HF_TOKEN"
        case OfflineModeIsEnabled():
            return UserError, "HF_HUB_OFFLINE forbids asking the hub: unset it, or pull a folder that is here already"
        case HfHubHTTPError():
            return UserError, _status(error.response.status_code)
        case OSError() if error.errno == errno.ENOSPC:
            return UserError, "the disk is full: free some space and run the same command again, it goes on from there"
        case _ if type(error).__module__.startswith(NETWORK_MODULES) or "Consistency check" in str(error):
            again = "run the same command again, it goes on from there"
            check = "Check the network, HF_ENDPOINT and the proxy"
            return UserError, f"the hub cannot be reached or was cut off ({type(error).__name__}): {again}. {check}"
    first_line = str(error).strip().partition("\n")[0]
    return UserError, f"it could not be downloaded: {type(error).__name__}: {first_line}"


def _status(status: int) -> str:
    hints = {
        401: "HF_TOKEN is not set or not valid",
        403: "HF_TOKEN has no access to it",
        429: "too many requests, wait a while",
    }
    return f"the hub answered {status}: {hints.get(status, 'run the same command again, it goes on from there')}"
