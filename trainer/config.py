"""The configuration of one run: what `config.yaml` in a run folder and POST /finetune say. Torch-free.

Every option is validated and documented here or in option_groups.py, and nowhere else. HTTP and the command line accept
the same fields.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.data.options import DataFormat, ReadOptions, Role, Source
from trainer.option_groups import (
    Affixes,
    DatasetConfig,
    DpoConfig,
    LoraConfig,
    Optimizer,
    OptimizerConfig,
    TrackingConfig,
    is_a_split,
    known_columns,
)
from trainer.strict import Strict, parse_options, read_config

Recipe = Literal["full", "lora", "dpo"]
Masking = Literal["assistant", "last", "all"]
Truncation = Literal["right", "left", "split"]

DEFAULT_EPOCHS = 3
DEFAULT_MIN_STEPS = 48
_ADAMW_RATES = {"full": 1e-4, "lora": 5e-4, "dpo of full": 1e-6, "dpo of lora": 5e-5}
DEFAULT_LEARNING_RATE = {
    "adamw": _ADAMW_RATES,
    "adamw_8bit": _ADAMW_RATES,
    "sgd": {"full": 0.1, "lora": 0.5, "dpo of full": 1e-3, "dpo of lora": 0.05},
    "adafactor": {"full": 2e-3, "lora": 0.1, "dpo of full": 2e-5, "dpo of lora": 1e-2},
}
"""SGD's steps are as long as the gradients, which are clipped; Adafactor's are shares of the weights."""


class TrainingOptions(Strict):
    """What a user may choose about a run, whatever way it is started."""

    recipe: Recipe = "lora"
    """`lora` trains a small adapter, `full` every weight; `dpo` learns from pairs of a preferred and a rejected answer."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Passes over the dataset. Default: 3, or as many as 48 steps take, since few records need more passes."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    """Records per forward pass."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    """Batches per optimizer step. Gradients are weighted by trained tokens, so 8 x 1 = 4 x 2; more batches pad less."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate. Default with adamw: 5e-4 for lora, 1e-4 for full; for dpo 5e-5 with an adapter, 1e-6 without.
    Much higher with sgd and adafactor, whose rates mean other things."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises linearly; after that it goes as `lr_schedule` says."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    """The same as a number of steps, in place of `warmup_ratio`. In a run that has fewer, the rate only rises."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up the rate falls along a `cosine` or a `linear` line to 0, or stays `constant`."""
    optimizer: Optimizer = OptimizerConfig()
    """A name (adamw, adamw_8bit, sgd, adafactor), or an object with the name and its numbers."""
    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is there, and free the gradient: less memory. Not with
    gradient_accumulation_steps above 1, and `max_grad_norm` must be null."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decay of the weights, apart from the gradient (with sgd a part of it), on matrices only: norms and biases are left
    out."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null switches it off."""
    max_seq_len: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Longer records are cut at this many tokens, or at the model's context, and counted in the dataset report."""
    truncation: Truncation = "right"
    """Which end of a longer record goes: its last tokens (`right`) or its first ones (`left`). `split` makes several
    records of it, which is for plain text."""
    masking: Masking = "assistant"
    """Which tokens are trained: every answer of the `assistant`, the `last` one, or `all`, prompts included. A message's
    own `weight` of 0 takes an answer out. Not for dpo."""
    train_on_input: bool = False
    """The same as masking: all."""
    source: Source = "auto"
    """What the data files are: `json` (a list, or JSONL: a record a line), `csv` (with a header), `parquet`, or `text`,
    where each line that is not blank is a record. `auto` goes by the file's ending, else by its content."""
    data_format: DataFormat = "auto"
    """The columns of a record: `instruct` {input, output}; `alpaca` {instruction, input, output}, where `input` may be
    missing, written with Alpaca's two prompts; `sharegpt` {conversations: [{from, value}]}; `messages` {messages:
    [{role, content}], tools}, where an answer of `weight` 0 is not trained; `completion` {prompt, completion}, plain text
    whose completion is trained; `text` {text}, trained whole, with the end of sequence behind it and no chat template
    around it; for dpo `preference` {prompt, chosen, rejected}, as texts or messages, or OpenAI's {input: {messages},
    preferred_output, non_preferred_output}. `auto` goes by the columns of each record, and the log says what it found."""
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
    batch then has `batch_size` rows. Not for dpo."""
    validation_split: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the records that is held out. They are measured every `validate_every_n_steps`, at every checkpoint and at
    the end: loss, perplexity, accuracy of the tokens."""
    validate_every_n_steps: Annotated[int, Field(ge=1)] | None = None
    """Measure the held-out records every so many steps too. Default: at checkpoints and at the end."""
    early_stopping_patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    """End the run after so many validations in a row without a lower loss. Needs held-out records."""
    early_stopping_min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as lower: by more than this."""
    sample_prompts: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=10_000)], ...], Field(max_length=8, strict=False)
    ] = ()
    """Prompts of a user that the model answers, greedily, at every validation or checkpoint; the answers are kept."""
    sample_max_tokens: Annotated[int, Field(ge=1, le=512)] = 64
    """Tokens of such an answer, at most."""
    save_every_n_steps: Annotated[int, Field(ge=1)] | None = None
    """Publish a checkpoint every so many steps, besides the final one. Default: at the end of each epoch, or three times
    in a run whose `epochs` are not given."""
    keep_last_n_checkpoints: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Remove older checkpoints as new ones appear. The one with the lowest validation loss, the last one, and what is or
    was served stay. Default: all stay."""
    lora: LoraConfig = LoraConfig()
    """Used by the lora recipe, and by dpo with an adapter."""
    dpo: DpoConfig = DpoConfig()
    """Used by the dpo recipe only."""
    enable_activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    activation_checkpointing_interval: Annotated[int, Field(ge=1, le=1000)] = 1
    """Recompute only every so many-th layer: 2 saves half of the memory for half of the time."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the figures of a run go besides its own files."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision. bf16 keeps fp32 master weights. `auto` is bf16 where the device is fast at it."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|npu)(:\d+)?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, `npu`, `npu:N`."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seeds the shuffle, dropout and LoRA's initial weights."""

    _known_columns = field_validator("column_map")(known_columns)
    _is_a_split = field_validator("split")(is_a_split)

    @model_validator(mode="after")
    def _fit_together(self) -> TrainingOptions:
        if self.train_on_input and self.masking == "last":
            raise ValueError("train_on_input and masking: last say two things; remove one")
        if self.optimizer_in_backward and self.gradient_accumulation_steps > 1:
            raise ValueError("optimizer_in_backward needs gradient_accumulation_steps: 1, since no gradient is kept")
        if self.optimizer_in_backward and self.max_grad_norm is not None:
            raise ValueError("optimizer_in_backward needs max_grad_norm: null, since the norm is known too late")
        if self.recipe == "dpo" and self.packed:
            raise ValueError("packed: the recipe dpo compares whole answers, pair by pair; remove it")
        if self.recipe == "dpo" and self.trained_on != "assistant":
            name = "train_on_input" if self.train_on_input else "masking"
            raise ValueError(f"{name}: the recipe dpo compares the answers in which a pair differs; remove it")
        return self

    @property
    def peak_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        recipe = f"dpo of {self.dpo.update}" if self.recipe == "dpo" else self.recipe
        return DEFAULT_LEARNING_RATE[self.optimizer.name][recipe]

    @property
    def trains_adapter(self) -> bool:
        return self.recipe == "lora" or (self.recipe == "dpo" and self.dpo.update == "lora")

    @property
    def trained_on(self) -> Masking:
        """`masking`, or what `train_on_input` says about it."""
        return "all" if self.train_on_input else self.masking

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
    data_files: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """JSON, JSONL, CSV, Parquet or text files, as `source` and `data_format` say; records follow each other in this
    order."""
    datasets: Annotated[tuple[DatasetConfig, ...], Field(min_length=1, max_length=64, strict=False)] | None = None
    """In place of data_files: several datasets, each with its own way of reading and its weight."""
    validation: DatasetConfig | None = None
    """Records that are held out, in place of `validation_split`."""
    start_adapter: str | None = None
    """Folder of an adapter on `model` to begin with: an adapter is trained further, `full` merges it first."""
    merge_start: bool = False
    """Where an adapter is trained: merge `start_adapter` first and train a new one, for the merged model in `base/`."""
    num_threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads of the computation. Default: all cores."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the device's memory that the run may take, where others use the device too. Default: all."""
    tokenizer_file: str | None = None
    """The tokenizer.json or tokenizer.model to use, and to put into the checkpoints. Default: the model's own."""
    model_name: str | None = None
    """The base model's public name, written into the adapter. Default: the folder."""

    @model_validator(mode="after")
    def _has_data(self) -> RunConfig:
        if (self.data_files is None) == (self.datasets is None):
            raise ValueError("data_files: give the files to train on, or datasets; exactly one of the two")
        if self.validation is not None and self.validation_split > 0:
            raise ValueError("validation and validation_split say two things; remove one")
        if self.merge_start and self.start_adapter is None:
            raise ValueError("merge_start needs start_adapter")
        return self

    @property
    def training_sets(self) -> tuple[DatasetConfig, ...]:
        return self.datasets or (DatasetConfig(data_files=self.data_files),)


def load_run_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file, with dotted overrides such as {"lora.rank": 16}. Raises UserError naming the field."""
    return parse_options(RunConfig, read_config(path, overrides))
