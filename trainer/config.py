"""The configuration of one run: what `config.yaml` in a run folder and POST /finetune say. Torch-free.

Every option is validated and documented here, and nowhere else. HTTP and the command line accept the same fields.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from lm.errors import UserError
from trainer.data.options import COLUMN_NAMES, DataFormat, ReadOptions, Role, Source
from trainer.data.split import parse_split

Recipe = Literal["full", "lora"]
OptionsT = TypeVar("OptionsT", bound=BaseModel)

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

DEFAULT_EPOCHS = 3
DEFAULT_MIN_STEPS = 48
DEFAULT_LEARNING_RATE: dict[Recipe, float] = {"full": 1e-4, "lora": 5e-4}


MAX_FIELDS = 256
SECRET = "secret"
"""Type of the mistakes in a field whose value no message shows."""


def _fail_fast(schema: Any) -> None:
    for node in schema if isinstance(schema, list) else schema.values() if isinstance(schema, dict) else ():
        _fail_fast(node)
    if isinstance(schema, dict) and schema.get("type") in ("list", "tuple"):
        schema["fail_fast"] = True


class Strict(BaseModel):
    """No unknown field is dropped in silence, and nothing is converted: "4" and true are no numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A list is left at its first mistake: only one is told, and millions would take minutes to collect."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"one object has at most {MAX_FIELDS} fields, not {len(data)}")
        return data


Affixes = Annotated[tuple[str, str], Field(strict=False)]
"""Text before and after."""


class LoraConfig(Strict):
    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Inner dimension of the low-rank update."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the update while training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = LINEAR_LAYERS
    """Which linear layers get an update: names among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""

    @model_validator(mode="after")
    def _known_targets(self) -> LoraConfig:
        unknown = sorted(set(self.target_modules) - set(LINEAR_LAYERS))
        if unknown:
            raise ValueError(f"unknown target_modules {unknown}: choose among {list(LINEAR_LAYERS)}")
        return self


class TrainingOptions(Strict):
    """What a user may choose about a run, whatever way it is started."""

    recipe: Recipe = "lora"
    """`lora` trains a small adapter, `full` every weight."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Passes over the dataset. Default: 3, or as many as 48 steps take, since few records need more passes."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    """Records per forward pass."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    """Batches per optimizer step. Gradients are weighted by trained tokens, so 8 x 1 = 4 x 2; more batches pad less."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate. Default: 5e-4 for lora, 1e-4 for full."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises linearly; after that it goes as `lr_schedule` says."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    """The same as a number of steps, in place of `warmup_ratio`. In a run that has fewer, the rate only rises."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up the rate falls along a `cosine` to 0, or stays `constant`."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """AdamW's decoupled decay, on matrices only: norms and biases are left out."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null switches it off."""
    max_seq_len: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Longer records are cut at this many tokens, or at the model's context, and counted in the dataset report."""
    train_on_input: bool = False
    """Train on the prompt as well as on the answer."""
    source: Source = "auto"
    """What the data files are: `json` (a list, or JSONL: a record a line), `csv` (with a header), `parquet`, or `text`,
    where each line that is not blank is a record. `auto` goes by the file's ending, else by its content."""
    data_format: DataFormat = "auto"
    """The columns of a record: `instruct` {input, output}; `alpaca` {instruction, input, output}, where `input` may be
    missing, written with Alpaca's two prompts; `sharegpt` {conversations: [{from, value}]}; `messages` {messages:
    [{role, content}]}; `text` {text}, trained whole, with the end of sequence behind it and no chat template around it.
    `auto` goes by the columns of each record, and the log says what it found."""
    column_map: dict[str, str] | None = None
    """What the files call a column, where it is not the standard name: {"input": "question", "output": "answer"}."""
    new_system_prompt: Annotated[str, Field(max_length=1_000_000)] | None = None
    """The system prompt of every record, in place of the record's own. It does not go into prompts that are served."""
    prompt_template: dict[Role, Affixes] | None = None
    """Text before and after each message of a role: {"user": ["Summarize:\n", "\nSummary:\n"]}. Prompts that are served
    do not get it by themselves."""
    split: str = "train"
    """Which of the records are used, over all files: `train`, or a slice as in `train[:10%]`, `train[100:200]`,
    `train[-5%:]`."""
    packed: bool = False
    """Put several records into one row of `max_seq_len` tokens. None sees another, so only the padding goes away; a
    batch then has `batch_size` rows."""
    validation_split: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the records that is held out; its loss is measured at every checkpoint."""
    save_every_n_steps: Annotated[int, Field(ge=1)] | None = None
    """Publish a checkpoint every so many steps, besides the final one. Default: at the end of each epoch, or three times
    in a run whose `epochs` are not given."""
    lora: LoraConfig = LoraConfig()
    """Used by the lora recipe only."""
    enable_activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision. bf16 keeps fp32 master weights. `auto` is bf16 where the device is fast at it."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|npu)(:\d+)?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, `npu`, `npu:N`."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seeds the shuffle, dropout and LoRA's initial weights."""

    @field_validator("column_map")
    @classmethod
    def _known_columns(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        unknown = sorted(set(value or {}) - set(COLUMN_NAMES))
        if unknown:
            raise ValueError(f"unknown column {unknown[0]!r:.80}: it maps a name among {', '.join(COLUMN_NAMES)}")
        return value

    @field_validator("split")
    @classmethod
    def _is_a_split(cls, value: str) -> str:
        try:
            parse_split(value)
        except UserError as error:
            raise ValueError(str(error).removeprefix("split: ")) from error
        return value

    @property
    def peak_learning_rate(self) -> float:
        return DEFAULT_LEARNING_RATE[self.recipe] if self.learning_rate is None else self.learning_rate

    @property
    def reading(self) -> ReadOptions:
        """What of the options says how the data files are read."""
        return ReadOptions(
            source=self.source,
            data_format=self.data_format,
            column_map=self.column_map,
            new_system_prompt=self.new_system_prompt,
            prompt_template=self.prompt_template,
        )

    def planned_epochs(self, steps_per_epoch: int) -> int:
        """Passes over a dataset that takes so many optimizer steps for one."""
        return self.epochs or max(DEFAULT_EPOCHS, math.ceil(DEFAULT_MIN_STEPS / steps_per_epoch))


class RunConfig(TrainingOptions):
    """A whole run: the options plus where the model and the data are, as paths."""

    model: str
    """Folder of the base model in Hugging Face format."""
    data_files: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """JSON, JSONL, CSV, Parquet or text files, as `source` and `data_format` say; records follow each other in this order."""
    tokenizer_file: str | None = None
    """The tokenizer.json or tokenizer.model to use, and to put into the checkpoints. Default: the model's own."""
    model_name: str | None = None
    """The base model's public name, written into the adapter. Default: the folder."""


class ConfigLoader(yaml.SafeLoader):
    """YAML as its readers expect it: 1e-3 is a number, though YAML 1.1 wants 1.0e-3."""


ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_run_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file, with dotted overrides such as {"lora.rank": 16}. Raises UserError naming the field."""
    return parse_options(RunConfig, read_config(path, overrides))


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a YAML file says, with dotted overrides, not validated. Raises UserError for a file that says nothing clear."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=ConfigLoader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{path} must hold a mapping from the names of options to their values")
    for key, value in (overrides or {}).items():
        _set(data, key, value)
    return data


def parse_options(model: type[OptionsT], data: dict[str, Any]) -> OptionsT:
    """Validate `data` as `model`. Raises UserError with the first mistake: the field, its value and what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, model), param=dotted(error.errors()[0]["loc"])) from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake of a validation, for people: `learning_rate: input should be greater than 0 (got -1.0)`."""
    first = error.errors()[0]
    field = dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown field; {known_fields(model, first['loc'])}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "missing":
        return f"{field}: this field is required"
    return f"{field}: {message}" + ("" if first["type"] == SECRET else f" (got {first['input']!r:.200})")


def known_fields(model: type[BaseModel], location: tuple[str | int, ...]) -> str:
    """What may stand where an unknown field stood: the nearest name first, then all of them."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return "remove it"
        model = field.annotation
    names = list(model.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known are {', '.join(names)}"


def dotted(location: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in location)


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"{key}: {parent} is not a group of options", param=key)
    data[last] = value
