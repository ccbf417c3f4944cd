"""Whether a folder holds a model that can be trained and served, and what model it is. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lm.config import load_config
from lm.errors import NotFoundError, UserError
from lm.layout import ORIGINAL, find_pickled, has_safetensors, is_model_folder
from lm.template import load_template
from lm.tokenizer import load_tokenizer
from lm.weight_files import validate_checkpoint

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What can stand in a model id."""
NUMBERS = re.compile(r"[-_]?\d|\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    family: str
    """`model_type` of its config."""
    num_parameters: int
    context_length: int
    weights: str
    """`safetensors`, or what the names of the files begin with: `pytorch_model`, `hf_model`, `consolidated` ..."""
    tokenizer: str
    """The tokenizer's file and its kind."""


def check_model(folder: Path) -> ModelFacts:
    """Check the config, the weights' headers, the tokenizer and the chat template.

    Of files that torch wrote only the names are checked: reading them takes torch. Raises UserError.
    """
    config = load_config(folder)
    if has_safetensors(folder):
        validate_checkpoint(folder, config)
        weights = "safetensors"
    else:
        weights = NUMBERS.split(find_pickled(folder).files[0].name)[0]
    tokenizer = load_tokenizer(folder)
    load_template(folder, tokenizer)
    return ModelFacts(
        family=config.model_type,
        num_parameters=config.num_parameters,
        context_length=config.max_position_embeddings,
        weights=weights,
        tokenizer=tokenizer.origin,
    )


def check_folder_in(models: Path, written: str) -> tuple[Path, ModelFacts]:
    """The model folder that a request means by a path inside `models`. Raises UserError and NotFoundError for `path`."""
    try:
        folder = _find(models, written)
        _refuse_links_out(models, folder, written)
        return folder, _facts(folder, written)
    except (OSError, RuntimeError) as error:  # too long a name, no permission, links or JSON without an end
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"path: {written!r:.200} cannot be read: {reason}; mend it there", param="path") from error


def _find(models: Path, written: str) -> Path:
    path = PurePosixPath(written)
    if path.is_absolute() or ".." in path.parts or "\0" in written or not path.parts:
        raise _refusal(written, "must be a folder inside models/, relative to it, without `..`")
    folder = models / path
    if folder.is_dir():
        if any(part.startswith(".") and part.endswith(".tmp") for part in path.parts):
            raise _refusal(written, "is what a pull has not finished; wait for it, or run `tuneserve pull` again")
        return folder
    if path.suffix.lower() == ".gguf":
        raise _refusal(written, "is a GGUF file, which must be converted first: run `tuneserve pull` with its path")
    if folder.is_symlink():
        raise _refusal(written, "is a link that leads nowhere; mend it, or name the folder itself")
    if folder.is_file():
        raise _refusal(written, "is a file; name the folder that it lies in")
    raise NotFoundError(f"path: there is no folder {written!r:.200} in models/; put the model there", param="path")


def _refuse_links_out(models: Path, folder: Path, written: str) -> None:
    """Of what lies deeper only original/ is ever read."""
    inside = models.resolve()
    links = (path for path in (*folder.iterdir(), *(folder / ORIGINAL).glob("*")) if path.is_symlink())
    for path in (folder, *links):
        if not path.resolve().is_relative_to(inside):
            reason = f"leaves models/ by the link {path.name!r:.120}; `tuneserve pull FOLDER` copies a model with what"
            raise _refusal(written, f"{reason} its links mean")


def _facts(folder: Path, written: str) -> ModelFacts:
    try:
        return check_model(folder)
    except UserError as error:
        if not folder.is_dir():
            gone = f"path: the folder {written!r:.200} in models/ has just gone; put the model there"
            raise NotFoundError(gone, param="path") from error
        mend = ""
        if not is_model_folder(folder) and next(folder.glob("*.gguf"), None):
            mend = "; its GGUF file must be converted first: run `tuneserve pull` with its path"
        reason = str(error).replace(str(folder), written)
        raise _refusal(written, f"is no model that can be used: {reason}{mend}") from error


def _refusal(written: str, reason: str) -> UserError:
    return UserError(f"path: {written!r:.200} {reason}", param="path")
