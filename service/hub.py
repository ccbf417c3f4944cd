"""Pull a model from the Hugging Face hub. Torch-free; no code is ever downloaded."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lm.errors import NotFoundError, UserError
from lm.folder import publish
from service.pull_work import check_model, only_one, refuse_present, say

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
COMPANIONS = (
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.md",
)
META = ("original/*.pth", "original/params.json", "original/tokenizer.model")


def pull_hub(source: str, folder: Path) -> Path:
    """Download `org/name` or `org/name@revision` to `folder`, which appears whole or not at all.

    Started again, a download that was cut or killed keeps the files that were finished. Raises UserError, NotFoundError.
    """
    found = HUB_ID.fullmatch(source)
    assert found is not None  # pull_any looked
    with only_one(folder):
        refuse_present(folder)
        partial = folder.parent / f".{folder.name}.download"
        try:
            _download(found["repo"], found["revision"], partial)
        except Exception as error:
            raise _explained(source, error) from error
        with publish(folder) as target:
            _link(partial, target)
            check_model(target)
        shutil.rmtree(partial)
    return folder


def wanted(files: list[str]) -> list[str]:
    """Patterns of what to download: safetensors, else torch's own files, else Meta's. Never code."""
    top = [name for name in files if "/" not in name]
    for ending in (".safetensors", ".bin"):
        if any(name.endswith(ending) for name in top):
            return [name for name in top if name.endswith(ending) or _is_companion(name)]
    return [name for name in files if _is_companion(name) or any(Path(name).match(pattern) for pattern in META)]


def _is_companion(name: str) -> bool:
    return "/" not in name and any(Path(name).match(pattern) for pattern in COMPANIONS)


def _download(repo: str, revision: str | None, partial: Path) -> None:
    """All files of one commit, so that a branch that moves meanwhile mixes nothing."""
    info = HfApi().model_info(repo, revision=revision)
    files = wanted([file.rfilename for file in info.siblings or []])
    say(f"downloading {repo} at {info.sha} ({len(files)} files)")
    snapshot_download(repo, revision=info.sha, local_dir=partial, allow_patterns=files)


def _link(partial: Path, target: Path) -> None:
    """Hard links: no second copy, and what was downloaded stays until the model is published."""
    for path in partial.rglob("*"):
        relative = path.relative_to(partial)
        if path.is_file() and relative.parts[0] != ".cache":
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / relative)


def _explained(source: str, error: Exception) -> Exception:
    """One line for the user. The hub's own texts never hold the token, but are long, so we say it ourselves."""
    match error:
        case GatedRepoError():
            return UserError(
                f"model: {source} is gated: accept its terms on its page on the hub, and set HF_TOKEN", param="model"
            )
        case RevisionNotFoundError():
            return NotFoundError(
                f"model: {source} has no such revision; leave `@...` out for the newest", param="model"
            )
        case RepositoryNotFoundError():
            return NotFoundError(
                f"model: the hub has no model {source}, or it is private; check the spelling, and HF_TOKEN",
                param="model",
            )
        case HfHubHTTPError():
            status = error.response.status_code
            hint = (
                "HF_TOKEN is not valid"
                if status == 401
                else "HF_TOKEN may lack access"
                if status == 403
                else "try again"
            )
            return UserError(f"model: the hub answered {status} for {source}: {hint}", param="model")
        case _ if type(error).__module__.startswith("httpx") or isinstance(error, ConnectionError | FileNotFoundError):
            return UserError(
                f"model: the hub could not be reached or was cut off ({type(error).__name__}); run the same command "
                "again, it keeps finished files. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
                param="model",
            )
        case _:
            reason = str(error).partition("\n")[0]
            return UserError(f"model: {source} could not be downloaded: {type(error).__name__}: {reason}", param="model")
