"""The names that may stand behind `_component_`, each with its keys. Literal: nothing is imported by its name."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.torchtune.keys import Key, by_name, honoured, mapped, refused
from trainer.torchtune.models import BUILDERS, PREFIX, QUANTIZED


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    keys: dict[str, Key] = field(default_factory=dict)
    text: str = ""
    """What becomes of the component itself, for the table."""


LORA = by_name(
    (
        honoured("lora_attn_modules", "lora.target_modules; output_proj is o_proj here"),
        honoured("apply_lora_to_mlp", "adds gate_proj, up_proj and down_proj"),
        refused("apply_lora_to_output", "the output layer gets no adapter"),
        honoured("lora_rank", "lora.rank; default 8"),
        honoured("lora_alpha", "lora.alpha; default 16"),
        honoured("lora_dropout", "lora.dropout; default 0"),
        refused("quantize_base", "the base is not quantized (QLoRA)"),
        refused("use_dora", "DoRA is not done"),
    )
)

MODELS = {
    name: Component(keys=LORA if builder.is_lora else {}, text="checked against config.json")
    for name, builder in BUILDERS.items()
}

_SEQUENCE = (
    honoured("path", "used unless tokenizer.json lies beside the checkpoint, which is preferred; a note says which"),
    honoured("max_seq_len", "longer records are cut; null or missing: the model's context"),
    honoured("prompt_template", "null, {role: [before, after]} or one of torchtune's; a chat template is the model's"),
    refused("truncation_type", "long records are cut at their end", only=(None, "right")),
)
_SPECIAL = mapped("special_tokens_path", "special tokens come with the tokenizer's own file", silent=(None,))
_MERGES = honoured("merges_file", "goes with vocab.json; tokenizer.json, beside the checkpoint, holds both")

TOKENIZERS = {
    f"{PREFIX}llama2.llama2_tokenizer": Component(keys=by_name(_SEQUENCE), text="SentencePiece"),
    f"{PREFIX}llama3.llama3_tokenizer": Component(keys=by_name((*_SEQUENCE, _SPECIAL)), text="tiktoken"),
    f"{PREFIX}mistral.mistral_tokenizer": Component(keys=by_name(_SEQUENCE), text="SentencePiece"),
    **{
        f"{PREFIX}{family}.{family}_tokenizer": Component(
            keys=by_name((*_SEQUENCE, _MERGES, _SPECIAL)), text="tokenizer.json beside vocab.json"
        )
        for family in ("qwen2", "qwen2_5", "qwen3")
    },
}

_CHECKPOINTER = by_name(
    (
        honoured("checkpoint_dir", "the model's folder"),
        honoured("checkpoint_files", "a list, or {filename_format, max_filename}; must lie in checkpoint_dir"),
        honoured("output_dir", "where the run goes"),
        honoured("model_type", "checked against config.json"),
        mapped("adapter_checkpoint", "only read when a run is resumed, which is not done", silent=(None,)),
        mapped("recipe_checkpoint", "only read when a run is resumed, which is not done", silent=(None,)),
        refused("resume_from_checkpoint", "a run cannot be resumed; start from a checkpoint as checkpoint_dir"),
        refused("should_load_recipe_state", "a run cannot be resumed; start from a checkpoint as checkpoint_dir"),
        mapped("safe_serialization", "checkpoints are always safetensors", silent=(None, True)),
        mapped("keep_last_n_checkpoints", "every checkpoint is kept", silent=(None,)),
        refused("enable_dcp", "checkpoints are whole Hugging Face folders"),
    )
)
CHECKPOINTERS = {
    f"torchtune.training.{name}": Component(keys=_CHECKPOINTER, text=text)
    for name, text in (
        ("FullModelHFCheckpointer", "written: a Hugging Face folder"),
        ("FullModelMetaCheckpointer", "consolidated.00.pth is read; written: a Hugging Face folder"),
        ("FullModelTorchTuneCheckpointer", "torchtune's shards are read; written: a Hugging Face folder"),
    )
}

_DATA = (
    honoured("source", "`json`, `csv`, `text` or `parquet`; the name of a remote data set is refused", option="source"),
    honoured("data_files", "a file, or a list of them"),
    honoured("split", "`train`, or a slice such as `train[:10%]`", option="split"),
    honoured("packed", "several records in one row; needs tokenizer.max_seq_len", option="packed"),
    refused("filter_fn", "no code is run from a configuration; filter the file", only=(None,)),
)
_TRAIN_ON = (
    honoured("train_on_input", "train on the prompt too", option="train_on_input"),
    honoured("masking_strategy", "train_on_assistant or train_on_all; train_on_last is refused"),
)
_SYSTEM = honoured("new_system_prompt", "in place of each record's own", option="new_system_prompt")
_COLUMNS = honoured("column_map", "standard name -> the file's name", option="column_map")
_ACROSS = mapped("split_across_pack", "a record is never split over two rows", silent=(None, False))
_ALPACA = Component(
    keys=by_name((*_DATA, *_TRAIN_ON, _COLUMNS)),
    text="data_format alpaca; train_on_input is true by default; needs data_files, since its remote data are not fetched",
)
DATASETS = {
    "torchtune.datasets.instruct_dataset": Component(
        keys=by_name((*_DATA, *_TRAIN_ON, _COLUMNS, _SYSTEM)), text="data_format instruct"
    ),
    "torchtune.datasets.chat_dataset": Component(
        keys=by_name(
            (
                *_DATA,
                *_TRAIN_ON,
                honoured("conversation_column", "the column that holds the conversation"),
                honoured("conversation_style", "`sharegpt`, or `openai` for messages"),
                _SYSTEM,
            )
        ),
        text="data_format sharegpt or messages",
    ),
    "torchtune.datasets.alpaca_dataset": _ALPACA,
    "torchtune.datasets.alpaca_cleaned_dataset": _ALPACA,
    "torchtune.datasets.text_completion_dataset": Component(
        keys=by_name(
            (
                *_DATA,
                honoured("column", "the column that holds the text; default `text`"),
                refused("add_eos", "each text ends with the end of sequence", only=(None, True)),
                _ACROSS,
            )
        ),
        text="data_format text",
    ),
}

_OPTIMIZER = (
    honoured("lr", "the peak; default of torch: 1e-3", option="learning_rate"),
    honoured("weight_decay", "on matrices only; default of torch: 0.01", option="weight_decay"),
    refused("betas", "AdamW's are 0.9 and 0.999", only=(None, [0.9, 0.999])),
    refused("eps", "AdamW's is 1e-8", only=(None, 1e-8)),
    refused("amsgrad", "plain AdamW is used"),
)
OPTIMIZERS = {
    "torch.optim.AdamW": Component(
        keys=by_name(
            (
                *_OPTIMIZER,
                mapped("fused", "the device decides; the numbers are the same", silent=(None, True, False)),
                mapped("foreach", "the device decides; the numbers are the same", silent=(None, True, False)),
                refused("maximize", "the loss is minimized"),
                refused("capturable", "no step is captured in a graph"),
                refused("differentiable", "no gradient goes through the optimizer"),
            )
        ),
        text="AdamW with fp32 moments",
    ),
    **{
        f"bitsandbytes.optim.{name}": Component(
            keys=by_name(
                (
                    *_OPTIMIZER,
                    mapped("optim_bits", "moments have 32 bits", silent=(None, 32)),
                    mapped("percentile_clipping", "gradients are clipped by clip_grad_norm", silent=(None, 100)),
                    mapped("block_wise", "moments are not quantized", silent=(None, True, False)),
                    mapped("min_8bit_size", "moments are not quantized", silent=(None,)),
                    mapped("fused", "the device decides; the numbers are the same", silent=(None, True, False)),
                )
            ),
            text="becomes AdamW with fp32 moments, which take 4 times (8bit) the memory; a note says so",
        )
        for name in ("PagedAdamW8bit", "PagedAdamW", "AdamW8bit", "AdamW")
    },
}

_LOSS = (
    mapped("num_output_chunks", "logits are always made in chunks", silent=(None, 8)),
    refused("ignore_index", "tokens that are not trained are left out whole", only=(None, -100)),
)
LOSSES = {
    "torchtune.modules.loss.LinearCrossEntropyLoss": Component(
        keys=by_name(
            (
                *_LOSS,
                refused("tp_enabled", "training goes over one device"),
                mapped("mask_ignored_tokens", "their logits are never made", silent=(None, True, False)),
            )
        ),
        text="cross entropy",
    ),
    "torchtune.modules.loss.CEWithChunkedOutputLoss": Component(keys=by_name(_LOSS), text="cross entropy"),
    "torch.nn.CrossEntropyLoss": Component(
        keys=by_name((_LOSS[1], refused("reduction", "the mean over trained tokens", only=(None, "mean")))),
        text="cross entropy",
    ),
}

SCHEDULERS = {
    "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup": Component(
        keys=by_name(
            (
                honoured("num_warmup_steps", "becomes warmup_steps", option="warmup_steps"),
                refused("num_cycles", "half a cosine, from the peak to 0", only=(None, 0.5)),
                refused("last_epoch", "a run cannot be resumed", only=(None, -1)),
            )
        ),
        text="lr_schedule cosine",
    )
}

_LOGS = mapped("log_dir", "figures stand in metrics.csv and events.jsonl of the run folder", silent=(None,))
METRIC_LOGGERS = {
    "torchtune.training.metric_logging.DiskLogger": Component(
        keys=by_name(
            (
                _LOGS,
                mapped("output_fmt", "metrics.csv and events.jsonl", silent=(None, "txt", "jsonl")),
                mapped("filename", "metrics.csv and events.jsonl", silent=(None,)),
            )
        ),
        text="metrics.csv and events.jsonl of the run",
    ),
    "torchtune.training.metric_logging.StdoutLogger": Component(text="the progress bar; metrics.csv has the rest"),
}

_PROFILER_PARTS = (
    *("output_dir", "cpu", "cuda", "profile_memory", "with_stack", "record_shapes", "with_flops"),
    *("wait_steps", "warmup_steps", "active_steps", "num_cycles"),
)
PROFILERS = {
    "torchtune.training.setup_torch_profiler": Component(
        keys=by_name(
            (
                refused("enabled", "there is no profiler; write False", only=(None, False)),
                *(honoured(name, "has no effect while `enabled` is false") for name in _PROFILER_PARTS),
            )
        ),
        text="off",
    )
}

COMPONENTS: dict[str, dict[str, Component]] = {
    "model": MODELS,
    "tokenizer": TOKENIZERS,
    "checkpointer": CHECKPOINTERS,
    "dataset": DATASETS,
    "optimizer": OPTIMIZERS,
    "lr_scheduler": SCHEDULERS,
    "loss": LOSSES,
    "metric_logger": METRIC_LOGGERS,
    "profiler": PROFILERS,
}
"""Place in the configuration -> name -> component."""

REFUSED = {
    **{name: "the base is not quantized (QLoRA); take the lora_* builder of the same size" for name in QUANTIZED},
    **{
        f"torchtune.training.metric_logging.{name}": "figures go to metrics.csv and events.jsonl; take DiskLogger"
        for name in ("WandBLogger", "TensorBoardLogger", "CometLogger", "MLFlowLogger")
    },
    "torchtune.training.DistributedCheckpointer": "training goes over one device; take FullModelHFCheckpointer",
    **{
        f"torchtune.datasets.{name}": "its data are fixed and remote; save them as a file and take instruct_dataset or "
        "chat_dataset with data_files"
        for name in ("grammar_dataset", "samsum_dataset", "slimorca_dataset", "cnn_dailymail_articles_dataset")
    },
    **{
        f"torchtune.datasets.{name}": "preference data (DPO) are not trained on"
        for name in ("preference_dataset", "stack_exchange_paired_dataset", "hh_rlhf_helpful_dataset")
    },
}
"""Names of torchtune that are told why not, rather than that they are unknown."""
