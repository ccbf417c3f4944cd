"""Groups of options: what stands under `lora`, `dpo`, `optimizer`, `tracking` and `datasets` in a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lm.errors import UserError
from trainer.data.options import COLUMN_NAMES, DataFormat, ReadOptions, Role, Source
from trainer.data.split import parse_split
from trainer.strict import Strict

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Affixes = Annotated[tuple[str, str], Field(strict=False)]
"""Text before and after."""


def known_columns(value: dict[str, str] | None) -> dict[str, str] | None:
    unknown = sorted(set(value or {}) - set(COLUMN_NAMES))
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r:.80}: it maps a name among {', '.join(COLUMN_NAMES)}")
    return value


def is_a_split(value: str, *, any_name: bool = False) -> str:
    try:
        parse_split(value, any_name=any_name)
    except UserError as error:
        raise ValueError(str(error).removeprefix("split: ")) from error
    return value


class LoraConfig(Strict):
    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Inner dimension of the low-rank update."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the update while training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = LINEAR_LAYERS
    """Which linear layers get an update: names among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    use_rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rank-stabilized LoRA), so that high ranks learn as fast."""
    use_dora: bool = False
    """Learn the length of each weight row apart from its direction (DoRA): better at low ranks, and slower."""

    @model_validator(mode="after")
    def _known_targets(self) -> LoraConfig:
        unknown = sorted(set(self.target_modules) - set(LINEAR_LAYERS))
        if unknown:
            raise ValueError(f"unknown target_modules {unknown}: choose among {list(LINEAR_LAYERS)}")
        return self


class DpoConfig(Strict):
    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """How strongly the policy is held to the reference model; higher stays closer."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs whose preference is the wrong way round."""
    update: Literal["lora", "full"] = "lora"
    """What is trained: an adapter, with the reference model being the same weights without it, or every weight, with the
    reference's log probabilities computed before the first step."""


class OptimizerConfig(Strict):
    name: Literal["adamw", "adamw_8bit", "sgd", "adafactor"] = "adamw"
    """`adamw_8bit` keeps its moments in 8 bits: a quarter of their memory, and slow on a CPU. `adafactor` keeps a row and
    a column of them. `sgd` keeps the momentum, if any."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False
    )
    """adamw, adamw_8bit: decay of the two moments."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """adamw, adamw_8bit: added to the root of the second moment."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """sgd only."""


def by_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Optimizer = Annotated[OptimizerConfig, BeforeValidator(by_name)]
"""A name alone stands for the optimizer with its defaults."""


class WandbConfig(Strict):
    """Needs `pip install tuneserve[wandb]`. The key is read from WANDB_API_KEY, never from here."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    entity: Annotated[str, Field(max_length=128)] | None = None
    name: Annotated[str, Field(max_length=128)] | None = None
    """Default: the run folder's name."""
    tags: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(max_length=50, strict=False)
    ] = ()


class MlflowConfig(Strict):
    """Needs `pip install tuneserve[mlflow]`. The server is MLFLOW_TRACKING_URI's, never named here."""

    experiment: Annotated[str, Field(min_length=1, max_length=128)]
    name: Annotated[str, Field(max_length=128)] | None = None
    """Default: the run folder's name."""


class TrackingConfig(Strict):
    """Where the figures of a run go besides metrics.csv and events.jsonl, which are always written."""

    tensorboard: bool = True
    """Event files for TensorBoard, in `tensorboard/` of the run folder."""
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None


class DatasetReading(Strict):
    """What is said of a dataset wherever its records lie. What is not said is as the options beside it say."""

    hub_id: Annotated[str, Field(pattern=r"^[\w.-]{1,96}(/[\w.-]{1,96})?$")] | None = None
    """A dataset of the Hugging Face hub, such as `tatsu-lab/alpaca`. It is fetched when the run starts, and needs a
    network or its cache."""
    hub_config: Annotated[str, Field(max_length=200)] | None = None
    """Which configuration of the hub's dataset, where it has several."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each record is seen in one pass: 0.5 takes every other record, drawn anew by the seed, 2 each twice."""
    source: Source | None = None
    """What the data files are, as in datasets.load_dataset. It belongs to data_files."""
    data_format: DataFormat | None = None
    column_map: dict[str, str] | None = None
    new_system_prompt: Annotated[str, Field(max_length=1_000_000)] | None = None
    prompt_template: dict[Role, Affixes] | None = None
    split: str | None = None
    """Of a hub's dataset another split than `train`, too: `test[:100]`."""

    _known_columns = field_validator("column_map")(known_columns)

    def reading(self, default: ReadOptions) -> ReadOptions:
        """How its records are read: as it says itself, else as `default` says."""
        names = ("source", "data_format", "column_map", "new_system_prompt", "prompt_template")
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        return ReadOptions(**{name: getattr(default, name) if own[name] is None else own[name] for name in names})


class DatasetConfig(DatasetReading):
    """One of several datasets, or the held-out one."""

    data_files: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """JSON, JSONL, CSV, Parquet or text files; records follow each other in this order."""

    @model_validator(mode="after")
    def _one_place(self) -> DatasetConfig:
        if (self.data_files is None) == (self.hub_id is None):
            raise ValueError("give either data_files or hub_id")
        if self.hub_id is None and self.hub_config is not None:
            raise ValueError("hub_config belongs to hub_id; remove it")
        if self.hub_id is not None and self.source is not None:
            raise ValueError("source belongs to data_files; remove it")
        if self.split is not None:
            is_a_split(self.split, any_name=self.hub_id is not None)
        return self
