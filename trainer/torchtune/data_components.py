"""torchtune's builders of data sets, each with its keys and with what it fills in by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.data.options import DataFormat
from trainer.torchtune.component import Component
from trainer.torchtune.keys import Key, by_name, honoured, mapped, refused

PREFIX = "torchtune.datasets."


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBuilder:
    data_format: DataFormat | None
    """None: its `conversation_style` says it."""
    text: str
    keys: tuple[Key, ...]
    source: str | None = None
    """The data set of the hub that it reads where nothing else is said."""
    hub_config: str | None = None
    column_map: dict[str, str] = field(default_factory=dict)
    trains_on_input: bool = False
    """Where nothing else is said."""


_PLACE = (
    honoured("source", "`json`, `csv`, `text` or `parquet` with data_files; else a data set of the Hugging Face hub"),
    honoured("data_files", "a file, or a list of them"),
    honoured("name", "which configuration of the hub's data set"),
    honoured("split", "`train`, or a slice such as `train[:10%]`"),
    refused("filter_fn", "no code is run from a configuration; filter the file", only=(None,)),
    refused("data_dir", "a folder of a hub's data set cannot be chosen; save it as a file", only=(None,)),
)
_PACKED = honoured("packed", "several records in one row; needs tokenizer.max_seq_len")
_TRAIN_ON_INPUT = honoured("train_on_input", "train on the prompt too")
_TRAIN_ON = (
    _TRAIN_ON_INPUT,
    honoured("masking_strategy", "train_on_assistant, train_on_last or train_on_all, in place of train_on_input"),
)
_SYSTEM = honoured("new_system_prompt", "in place of each record's own")
_COLUMNS = honoured("column_map", "standard name -> the file's name")
_INSTRUCT = (*_PLACE, _PACKED, *_TRAIN_ON, _COLUMNS, _SYSTEM)
_TEXT = (
    *_PLACE,
    _PACKED,
    honoured("column", "the column that holds the text; default `text`"),
    refused("add_eos", "each text ends with the end of sequence", only=(None, True)),
    honoured("split_across_pack", "a text longer than max_seq_len becomes several records, rather than cut"),
    mapped("max_seq_len", "tokenizer.max_seq_len is for all data", silent=(None,)),
)
_PREFERENCE = (
    *_PLACE,
    refused("packed", "pairs are compared as a whole, one by one"),
    refused("train_on_input", "both answers have the same prompt"),
    _COLUMNS,
    _SYSTEM,
)
_CHAT = (
    *_PLACE,
    _PACKED,
    *_TRAIN_ON,
    honoured("conversation_column", "the column that holds the conversation"),
    honoured("conversation_style", "`sharegpt`, or `openai` for messages"),
    _SYSTEM,
)

_ALPACA = "data_format alpaca; train_on_input is true by default"

BUILDERS = {
    "instruct_dataset": DataBuilder(data_format="instruct", text="data_format instruct", keys=_INSTRUCT),
    "chat_dataset": DataBuilder(data_format=None, text="data_format sharegpt or messages", keys=_CHAT),
    "alpaca_dataset": DataBuilder(
        data_format="alpaca",
        text=_ALPACA,
        keys=(*_PLACE, _PACKED, *_TRAIN_ON, _COLUMNS),
        source="tatsu-lab/alpaca",
        trains_on_input=True,
    ),
    "alpaca_cleaned_dataset": DataBuilder(
        data_format="alpaca",
        text=_ALPACA,
        keys=(*_PLACE, _PACKED, *_TRAIN_ON, _COLUMNS),
        source="yahma/alpaca-cleaned",
        trains_on_input=True,
    ),
    "grammar_dataset": DataBuilder(
        data_format="instruct", text="data_format instruct", keys=_INSTRUCT, source="liweili/c4_200m"
    ),
    "samsum_dataset": DataBuilder(
        data_format="instruct",
        text="data_format instruct; columns dialogue, summary",
        keys=_INSTRUCT,
        source="Samsung/samsum",
        column_map={"input": "dialogue", "output": "summary"},
    ),
    "slimorca_dataset": DataBuilder(
        data_format="sharegpt",
        text="data_format sharegpt",
        keys=(*_PLACE, _PACKED, *_TRAIN_ON, _COLUMNS, _SYSTEM),
        source="Open-Orca/SlimOrca-Dedup",
    ),
    "text_completion_dataset": DataBuilder(data_format="text", text="data_format text", keys=_TEXT),
    "cnn_dailymail_articles_dataset": DataBuilder(
        data_format="text",
        text="data_format text; column article",
        keys=_TEXT,
        source="ccdv/cnn_dailymail",
        hub_config="3.0.0",
        column_map={"text": "article"},
    ),
    "wikitext_dataset": DataBuilder(
        data_format="text",
        text="data_format text; column page",
        keys=(*_TEXT, honoured("subset", "as `name`")),
        source="EleutherAI/wikitext_document_level",
        hub_config="wikitext-103-v1",
        column_map={"text": "page"},
    ),
    "preference_dataset": DataBuilder(
        data_format="preference", text="of DPO; data_format preference", keys=_PREFERENCE
    ),
    "hh_rlhf_helpful_dataset": DataBuilder(
        data_format="preference",
        text="of DPO; data_format preference",
        keys=_PREFERENCE,
        source="RLHFlow/HH-RLHF-Helpful-standard",
    ),
    "stack_exchange_paired_dataset": DataBuilder(
        data_format="preference",
        text="of DPO; columns question, response_j, response_k; needs source or data_files, since its own data lie in a "
        "folder of their repository",
        keys=_PREFERENCE,
        column_map={"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
}
"""By their names behind `torchtune.datasets.`."""

DATASETS = {
    PREFIX + name: Component(keys=by_name(builder.keys), text=builder.text) for name, builder in BUILDERS.items()
}
