"""POST /finetune with a configuration of torchtune: from it to a base model, options and data of this service.

Nothing outside of models/ and data/ is read, and errors name the key as the request has it: `config.dataset.source`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.errors import NotFoundError, UserError
from service.registry import Registry
from service.schemas.datasets import DatasetRequest, named_datasets
from service.schemas.finetune import JobOptions, TorchtuneRequest
from trainer.config import TrainingOptions
from trainer.strict import parse_options
from trainer.torchtune import Translation, apply_overrides, compare, parse_yaml, translate
from trainer.torchtune.data import FILE_TYPES
from trainer.torchtune.overrides import COMPONENT
from trainer.torchtune.reading import check_plain

CONFIG = "config"
BESIDE_CONFIG = frozenset({*JobOptions.model_fields, "recipe"})
"""Fields of the request itself."""
CHECKPOINTER = {COMPONENT: "torchtune.training.FullModelHFCheckpointer"}
DATASET = {COMPONENT: "torchtune.datasets.instruct_dataset", "data_files": "-"}
PREFERENCES = {COMPONENT: "torchtune.datasets.preference_dataset", "data_files": "-"}
"""Stand where the request itself names model and data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenConfig:
    model: str
    """The name of the base model."""
    options: TrainingOptions
    datasets: dict[str, DatasetRequest]
    """By what error messages call each."""
    validation: DatasetRequest | None
    notes: tuple[str, ...]


def take_config(request: TorchtuneRequest, registry: Registry) -> TakenConfig:
    """Raises UserError, NotFoundError for `model`."""
    data = parse_yaml(request.config) if isinstance(request.config, str) else check_plain(request.config)
    try:
        data, has_form = _with_stand_ins(data, request)
        translation = translate(data, recipe=request.recipe)
        name, folder = _find_base(translation.options["model"], registry, is_given=request.model is not None)
        translation = _compared(translation, name, folder)
    except NotFoundError:
        raise
    except UserError as error:
        raise in_config(error) from error
    if translation.resume:
        mend = "a job goes on by POST /finetune/{id}/resume; write False"
        raise UserError(f"{CONFIG}.resume_from_checkpoint: {mend}", param=f"{CONFIG}.resume_from_checkpoint")
    options = {key: value for key, value in translation.options.items() if key in TrainingOptions.model_fields}
    if not has_form:
        options.pop("data_format", None)
    datasets = named_datasets(request.dataset or _datasets(translation.options), "dataset")
    if any(one.data_files is None for one in datasets.values()):
        options.pop("source", None)
    notes = translation.notes
    if translation.output_dir is not None:
        notes = (*notes, "output_dir: not taken over HTTP; the run lies in runs/ of the service")
    held_out = translation.options.get("validation")
    return TakenConfig(
        model=name,
        options=TrainingOptions(**options),
        datasets=datasets,
        validation=request.validation or (None if held_out is None else _dataset(held_out, "dataset_val")),
        notes=notes,
    )


def _datasets(options: dict[str, Any]) -> DatasetRequest | list[DatasetRequest]:
    if "data_files" in options:
        return _dataset({"data_files": options["data_files"]}, "dataset")
    several = [_dataset(one, f"dataset.{number}") for number, one in enumerate(options["datasets"])]
    return several[0] if len(several) == 1 else several


def _dataset(options: dict[str, Any], where: str) -> DatasetRequest:
    """Raises UserError: over HTTP there may be fewer files than on the command line."""
    try:
        return parse_options(DatasetRequest, options)
    except UserError as error:
        raise in_config(UserError(f"{where}.{error}", param=f"{where}.{error.param}")) from error


def in_config(error: UserError) -> UserError:
    """`error`, naming its key within the request."""
    param, message = error.param, str(error)
    if param is None or param == CONFIG or param.split(".")[0] in BESIDE_CONFIG:
        return error
    named = message if message.startswith((param, "~")) else f"{param}: {message}"
    return UserError(f"{CONFIG}.{named}", param=f"{CONFIG}.{param}")


def _with_stand_ins(data: dict[str, Any], request: TorchtuneRequest) -> tuple[dict[str, Any], bool]:
    """`data` with what the request says besides it, and whether the form of the data is the configuration's."""
    data, has_form = {**data}, "dataset" in data or request.dataset is None
    if request.model is not None:
        given = data.get("checkpointer", CHECKPOINTER)
        if isinstance(given, dict):
            data["checkpointer"] = {**given, "checkpoint_dir": request.model}
    if request.dataset is not None:
        given = data.get("dataset", PREFERENCES if request.recipe == "dpo" else DATASET)
        if isinstance(given, dict):
            kept = {key: value for key, value in given.items() if key != "source" or value in FILE_TYPES}
            data["dataset"] = {**kept, "data_files": "-"}
    return apply_overrides(data, ()), has_form


def _find_base(written: str, registry: Registry, *, is_given: bool) -> tuple[str, Path]:
    """Name and folder of the base model that `checkpoint_dir` means: its name, or a path to its folder."""
    if is_given:
        return written, registry.base_folder(written)
    bases, where = registry.bases(), "checkpointer.checkpoint_dir"
    if written in bases:
        return written, bases[written]
    try:
        path = (registry.home / "models" / written).resolve()
        found = next(((name, folder) for name, folder in bases.items() if folder.resolve() == path), None)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {written!r:.200} is not a path: {error}", param=where) from error
    if found is None:
        known = ", ".join([*bases][:20]) or "none yet"
        raise UserError(
            f"{where}: {written!r:.200} is no model of this service; over HTTP it is the name of one in models/: {known}",
            param=where,
        )
    return found


def _compared(translation: Translation, name: str, folder: Path) -> Translation:
    """Compared with the checkpoint, which messages call by its name, and with the tokenizer that it is served with."""
    options = dict(translation.options)
    tokenizer = options.pop("tokenizer_file", None)
    notes = translation.notes
    if tokenizer is not None:
        _check_tokenizer(tokenizer, folder, name)
        notes = (*notes, f"tokenizer.path: the tokenizer of {name} is used, from its folder in models/")
    try:
        compared = compare(replace(translation, options=options, notes=notes), folder)
    except UserError as error:
        raise UserError(str(error).replace(str(folder), name), param=error.param or "checkpointer") from error
    return replace(compared, notes=tuple(note.replace(str(folder), name) for note in compared.notes))


def _check_tokenizer(written: str, folder: Path, name: str) -> None:
    where = "tokenizer.path"
    try:
        root = folder.resolve()
        path = (root / written).resolve()
        is_there = path.is_relative_to(root) and path.is_file()
        beside = (root.parent / written).resolve()
        is_there = is_there or (beside.is_relative_to(root) and beside.is_file())
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {written!r:.200} is not a path: {error}", param=where) from error
    if not is_there and not (root / "tokenizer.json").is_file():
        raise UserError(
            f"{where}: {written!r:.200} is no file in the folder of {name}, where its tokenizer must be", param=where
        )
