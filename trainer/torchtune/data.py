"""The data sets of a configuration, into our own terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError
from trainer.option_groups import DatasetConfig
from trainer.strict import parse_options
from trainer.torchtune.data_components import BUILDERS, DataBuilder
from trainer.torchtune.fields import Collected, component_of, in_users_words, text_at, texts_at
from trainer.torchtune.overrides import COMPONENT

FILE_TYPES = ("json", "csv", "text", "parquet")
WHOLE_CONTEXT = 1_048_576
"""max_seq_len without a limit: the model's own context is below it."""
MASKING = {"train_on_assistant": "assistant", "train_on_last": "last", "train_on_all": "all"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    config: dict[str, Any]
    """Fields of DatasetConfig."""
    origins: dict[str, str]
    """Each of them -> the key that said it."""
    common: dict[str, tuple[Any, str]]
    """Options that all data sets of a run share -> value, and the key that said it."""
    trained: tuple[str, str] | None
    """What is trained (`masking`), also where nothing is said, and the key for it. None where it is all of a text."""


def is_preference(group: object) -> bool:
    """Whether the component that `group` names, or the first one of a list, holds preferences."""
    group = group[0] if isinstance(group, list) and group else group
    name = group.get(COMPONENT) if isinstance(group, dict) else None
    builder = BUILDERS.get(str(name).rsplit(".", 1)[-1])
    return builder is not None and builder.data_format == "preference"


def read_datasets(data: Mapping[str, Any], recipe: str, collected: Collected) -> None:
    """`dataset` and `dataset_val`. Raises UserError."""
    group = data.get("dataset")
    if group is None or group == []:
        raise UserError("dataset: this field is required", param="dataset")
    sets = (
        [_read(one, f"dataset.{n}", recipe, collected) for n, one in enumerate(group)]
        if isinstance(group, list)
        else []
    )
    sets = sets or [_read(group, "dataset", recipe, collected)]
    _set_common(sets, collected)
    if len(sets) == 1 and "data_files" in sets[0].config:
        for option, value in sets[0].config.items():
            collected.set(option, value, sets[0].origins[option])
    else:
        collected.set("datasets", [one.config for one in sets], "dataset")
    if (held_out := data.get("dataset_val")) is not None:
        validation = _read(held_out, "dataset_val", recipe, collected)
        collected.set("validation", validation.config, "dataset_val")
    elif data.get("run_val_every_n_steps") is not None:
        collected.note("run_val_every_n_steps", "has no effect without dataset_val")
    if collected.options.get("packed") and collected.options["max_seq_len"] == WHOLE_CONTEXT:
        raise UserError("tokenizer.max_seq_len: packed data need it, as in torchtune", param="tokenizer.max_seq_len")


def _set_common(sets: Sequence[DataSet], collected: Collected) -> None:
    """What a run has once: how rows are made, and what of them is trained. Raises UserError where two sets differ."""
    for one in sets:
        for option, (value, origin) in one.common.items():
            if option in collected.options and option in collected.origins and collected.options[option] != value:
                reason = (
                    f"it is {value!r:.40} here, and {collected.options[option]!r:.40} by {collected.origins[option]}"
                )
                raise UserError(f"{origin}: {reason}; one run has one of them for all its data", param=origin)
            collected.set(option, value, origin)
    (first, by), *others = [one.trained for one in sets if one.trained is not None] or [("", "")]
    for masking, origin in others:
        if masking != first:
            reason = f"what is trained is {masking!r} here, and {first!r} by {by}"
            raise UserError(f"{origin}: {reason}; one run has one of them for all its data", param=origin)


def _read(group: object, where: str, recipe: str, collected: Collected) -> DataSet:
    name, component, keys = component_of("dataset", group, where)
    builder = BUILDERS[name.rsplit(".", 1)[1]]
    _check_recipe(builder, where, name, recipe)
    collected.read(keys, component.keys, where)
    config, origins = _place(builder, keys, where)
    config["data_format"], origins["data_format"] = _format(builder, keys, where), f"{where}.{COMPONENT}"
    column_map, origin = _columns(builder, keys, where, config["data_format"])
    if column_map:
        config["column_map"], origins["column_map"] = column_map, origin
    for option in ("new_system_prompt", "split"):
        if keys.get(option) is not None:
            config[option], origins[option] = keys[option], f"{where}.{option}"
    try:
        parse_options(DatasetConfig, config)
    except UserError as error:
        if not error.param:  # of several fields together, of which only the split can be wrong by now
            raise UserError(f"{where}.split: {error}", param=f"{where}.split") from error
        raise in_users_words(error, origins) from error
    common, trained = _common(builder, keys, where, collected), _trained(builder, keys, where)
    return DataSet(config=config, origins=origins, common=common, trained=trained)


def _check_recipe(builder: DataBuilder, where: str, name: str, recipe: str) -> None:
    if (builder.data_format == "preference") != (recipe == "dpo"):
        fits = "takes preferences, such as preference_dataset" if recipe == "dpo" else "takes no preferences"
        param = f"{where}.{COMPONENT}"
        raise UserError(f"{param}: {name}: the recipe {recipe} {fits}", param=param)


def _place(builder: DataBuilder, keys: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    source = keys.get("source")
    is_file_type = source in FILE_TYPES
    if keys.get("data_files") is not None:
        if source is not None and not is_file_type:
            expected = f"with data_files it is one of {', '.join(FILE_TYPES)} (got {source!r:.80})"
            raise UserError(f"{where}.source: {expected}", param=f"{where}.source")
        files: dict[str, Any] = {"data_files": _data_files(keys, where)}
        return (
            files | ({"source": source} if is_file_type else {}),
            {"data_files": f"{where}.data_files", "source": f"{where}.source"},
        )
    hub_id = builder.source if source is None else source
    if is_file_type or hub_id is None:
        mend = "; or name a data set of the hub as source" if hub_id is None else ""
        raise UserError(f"{where}.data_files: this field is required{mend}", param=f"{where}.data_files")
    config = {"hub_id": hub_id}
    hub_config = keys.get("name", keys.get("subset", None if source else builder.hub_config))
    if hub_config is not None:
        config["hub_config"] = hub_config
    name = "name" if "name" in keys else "subset"
    return config, {"hub_id": f"{where}.source", "hub_config": f"{where}.{name}"}


def _data_files(keys: Mapping[str, Any], where: str) -> list[str]:
    value = keys["data_files"]
    if isinstance(value, dict):
        if set(value) != {"train"}:
            path = f"{where}.data_files"
            raise UserError(f"{path}: a file, a list or {{train: ...}} is expected (got {value!r:.80})", param=path)
        value = value["train"]
    return texts_at({"data_files": value}, "data_files", where)


def _format(builder: DataBuilder, keys: Mapping[str, Any], where: str) -> str:
    if builder.data_format is not None:
        return builder.data_format
    style = text_at(keys, "conversation_style", where)
    if style not in ("sharegpt", "openai"):
        path = f"{where}.conversation_style"
        raise UserError(f"{path}: sharegpt or openai is expected (got {style!r:.80})", param=path)
    return "sharegpt" if style == "sharegpt" else "messages"


def _columns(
    builder: DataBuilder, keys: Mapping[str, Any], where: str, data_format: str
) -> tuple[Mapping[str, str], str]:
    """What the files call their columns, and the key that said so."""
    if builder.data_format is None:
        standard = {"sharegpt": "conversations"}.get(data_format, data_format)
        return {standard: text_at(keys, "conversation_column", where)}, f"{where}.conversation_column"
    if keys.get("column") is not None:
        return {"text": text_at(keys, "column", where)}, f"{where}.column"
    if keys.get("column_map") is not None:
        return keys["column_map"], f"{where}.column_map"
    return builder.column_map, f"{where}.{COMPONENT}"


def _common(
    builder: DataBuilder, keys: Mapping[str, Any], where: str, collected: Collected
) -> dict[str, tuple[Any, str]]:
    common = {}
    if builder.data_format != "preference":
        common["packed"] = (keys.get("packed") or False, f"{where}.packed")
    if keys.get("split_across_pack"):
        common["truncation"] = ("split", f"{where}.split_across_pack")
    path = f"{where}.train_on_input"
    strategy = keys.get("masking_strategy")
    if strategy is not None:
        path = f"{where}.masking_strategy"
        if strategy not in MASKING:
            raise UserError(f"{path}: {', '.join(MASKING)} are known (got {strategy!r:.80})", param=path)
        return common | {"masking": (MASKING[strategy], path)}
    if builder.trains_on_input and "train_on_input" not in keys:
        collected.note(path, "true, torchtune's default for alpaca")
    if builder.trains_on_input or keys.get("train_on_input") is not None:
        given = keys.get("train_on_input", builder.trains_on_input)
        common["train_on_input"] = (given, path)
    return common


def _trained(builder: DataBuilder, keys: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    if "masking_strategy" not in (key.name for key in builder.keys):
        return None
    if (strategy := keys.get("masking_strategy")) is not None:
        return MASKING[strategy], f"{where}.masking_strategy"
    return "all" if keys.get("train_on_input", builder.trains_on_input) else "assistant", f"{where}.train_on_input"
