"""Which files of a model folder hold its weights, by their names alone. Torch-free.

In this order: safetensors, Hugging Face's pytorch_model.bin, what torchtune's checkpointers write, and Meta's
consolidated.00.pth. What a torchtune run left beside its base has to be moved to a folder of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lm.config import CONFIG_FILE
from lm.config_fields import read_json_object
from lm.errors import NotFoundError, UserError
from lm.meta_params import PARAMS_FILE
from lm.weight_files import INDEX_FILE, SINGLE_FILE

log = logging.getLogger(__name__)

ORIGINAL = "original"
"""Folder in which Hugging Face's repositories keep Meta's files."""
TORCH_FILE, TORCH_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
PATTERNS = (
    re.compile(r"pytorch_model-(?P<part>\d+)-of-(?P<parts>\d+)\.bin"),
    re.compile(r"ft-model-(?P<part>\d+)-of-(?P<parts>\d+)\.bin"),
    re.compile(r"hf_model_(?P<part>\d+)_(?P<epoch>\d+)\.pt"),
    re.compile(r"meta_model_(?P<epoch>\d+)\.pt"),
    re.compile(r"torchtune_model_(?P<epoch>\d+)\.pt"),
)
"""Names of files that belong together by their numbers, where no index says it."""
CONSOLIDATED = re.compile(r"consolidated\.\d+\.pth")
LOOKED_FOR = (
    f"{SINGLE_FILE}, {INDEX_FILE}, {TORCH_FILE}, {TORCH_INDEX_FILE}, pytorch_model-*.bin, ft-model-*.bin, "
    f"hf_model_*.pt, meta_model_*.pt, torchtune_model_*.pt and consolidated.00.pth (also in {ORIGINAL})"
)

MAX_NAMED = 5

Matches = dict[Path, re.Match[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledFiles:
    """The files that `torch.save` wrote, all of them there."""

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    """Tensor -> name of its file, where there is an index."""
    index: Path | None


def is_model_folder(folder: Path) -> bool:
    """Whether a config says that this is a model: config.json, or Meta's params.json."""
    return config_name(folder) is not None


def config_name(folder: Path) -> str | None:
    """The file that describes the model, of those in the folder the one that is read."""
    names = (CONFIG_FILE, PARAMS_FILE, f"{ORIGINAL}/{PARAMS_FILE}")
    return next((name for name in names if (folder / name).is_file()), None)


def has_weights(folder: Path) -> bool:
    """Whether there are files of weights in a form that can be read. What is in them is not looked at."""
    named = has_safetensors(folder) or any((folder / name).is_file() for name in (TORCH_FILE, TORCH_INDEX_FILE))
    return named or any(_matching(folder, pattern) for pattern in PATTERNS) or bool(_consolidated(folder))


def has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def warn_of_unread(folder: Path) -> None:
    """Say in the log which weights of a run lie beside safetensors, where they are taken for the base's companions."""
    if names := [path.name for pattern in PATTERNS for path in _matching(folder, pattern)]:
        log.warning(
            "%s holds safetensors, which are read, and also %s, which are not: move these into a folder of their own, "
            "with the config and the tokenizer, to use them",
            folder,
            ", ".join(names[:MAX_NAMED]),
        )


def find_pickled(folder: Path) -> PickledFiles:
    """The files with the weights of a folder that has no safetensors.

    Where the files of several epochs lie together, those of the newest one. Raises NotFoundError when there is no such
    folder, UserError when it has no weights, when parts are missing, or when they are split for several devices.
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}", param="model")
    if (folder / TORCH_FILE).is_file():
        return PickledFiles(files=(folder / TORCH_FILE,), weight_map=None, index=None)
    if (folder / TORCH_INDEX_FILE).is_file():
        return _indexed(folder / TORCH_INDEX_FILE)
    files = next(_numbered(folder), None) or _whole(_consolidated(folder))
    if not files:
        raise UserError(f"{folder} has no weights: looked for {LOOKED_FOR}", param="model")
    return PickledFiles(files=files, weight_map=None, index=None)


def _indexed(index: Path) -> PickledFiles:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_plain_name, weight_map.values())):
        reason = "weight_map must map tensors to names of .bin or .pt files beside it"
        raise UserError(f"{index} is damaged: {reason}", param="model")
    names = sorted(set(weight_map.values()))
    _refuse_missing(index.parent, [name for name in names if not (index.parent / name).is_file()], index.name)
    return PickledFiles(files=tuple(index.parent / name for name in names), weight_map=weight_map, index=index)


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith((".bin", ".pt")) and Path(name).name == name


def _numbered(folder: Path) -> Iterator[tuple[Path, ...]]:
    """For each kind of numbered files in the folder, all parts of it."""
    for pattern in PATTERNS:
        if found := _newest(folder, _matching(folder, pattern)):
            _check_parts(folder, found)
            yield tuple(found)


def _matching(folder: Path, pattern: re.Pattern[str]) -> Matches:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path: match for path in paths if (match := pattern.fullmatch(path.name)) and path.is_file()}


def _newest(folder: Path, found: Matches) -> Matches:
    """Those of the last epoch, or of the only set of parts."""
    kind = "epoch" if any("epoch" in match.groupdict() for match in found.values()) else "parts"
    numbers = {path: int(match.groupdict().get(kind) or 0) for path, match in found.items()}
    distinct = sorted(set(numbers.values()))
    if len(distinct) < 2:
        return found
    if kind == "parts":
        sets = ", ".join(f"*-of-{number:05}" for number in distinct)
        raise UserError(f"{folder} has the parts of several checkpoints ({sets}): leave one of them", param="model")
    log.warning("%s has the weights of the epochs %s: the newest, %d, is read", folder, distinct, distinct[-1])
    return {path: match for path, match in found.items() if numbers[path] == distinct[-1]}


def _check_parts(folder: Path, found: Matches) -> None:
    """Parts count from 1, or, in some of torchtune's versions, from 0."""
    example = next(iter(found.values())).groupdict()
    if "part" not in example:
        return
    parts = {int(match["part"]) for match in found.values()}
    first = min(1, *parts)
    last = first + int(example["parts"]) - 1 if "parts" in example else max(parts)
    missing = islice((part for part in range(first, last + 1) if part not in parts), MAX_NAMED + 1)
    pattern = next(iter(found)).name.replace(example["part"], "{}", 1)
    width = len(example["part"])
    _refuse_missing(folder, [pattern.format(f"{part:0{width}}") for part in missing], "their numbers")


def _refuse_missing(folder: Path, names: list[str], source: str) -> None:
    if names:
        rest = " and more" if len(names) > MAX_NAMED else ""
        reason = f"{', '.join(names[:MAX_NAMED])}{rest}, which {source} call for"
        raise UserError(f"{folder} lacks the files {reason}: copy them there again", param="model")


def _consolidated(folder: Path) -> tuple[Path, ...]:
    return tuple(_matching(folder, CONSOLIDATED)) or tuple(_matching(folder / ORIGINAL, CONSOLIDATED))


def _whole(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Meta splits its larger models by rows and columns for as many devices as there are files."""
    if len(files) > 1:
        raise UserError(
            f"{files[0].parent} has its weights split over {len(files)} files for as many devices "
            f"({files[0].name} to {files[-1].name}): use the model in Hugging Face format, as `tuneserve pull` gets it",
            param="model",
        )
    return files
