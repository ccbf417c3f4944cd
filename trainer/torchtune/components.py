"""The names that may stand behind `_component_`, each with its keys. Literal: nothing is imported by its name."""

from __future__ import annotations

from trainer.torchtune.component import Component
from trainer.torchtune.data_components import DATASETS
from trainer.torchtune.keys import by_name, honoured, mapped, refused
from trainer.torchtune.models import BUILDERS, PREFIX, QUANTIZED
from trainer.torchtune.training_components import LOSSES, METRIC_LOGGERS, OPTIMIZERS, SCHEDULERS

LORA = by_name(
    (
        honoured("lora_attn_modules", "lora.target_modules; output_proj is o_proj here"),
        honoured("apply_lora_to_mlp", "adds gate_proj, up_proj and down_proj"),
        refused("apply_lora_to_output", "the output layer gets no adapter"),
        honoured("lora_rank", "lora.rank; default 8"),
        honoured("lora_alpha", "lora.alpha; default 16"),
        honoured("lora_dropout", "lora.dropout; default 0"),
        refused("quantize_base", "the base is not quantized (QLoRA)"),
        honoured("use_dora", "lora.use_dora"),
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
    honoured("truncation_type", "`right` or `left`: which end of a long record goes"),
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
        mapped("adapter_checkpoint", "a resumed run finds its own state in output_dir", silent=(None,)),
        mapped("recipe_checkpoint", "a resumed run finds its own state in output_dir", silent=(None,)),
        honoured("resume_from_checkpoint", "as resume_from_checkpoint at the top"),
        honoured("should_load_recipe_state", "as resume_from_checkpoint at the top"),
        mapped("safe_serialization", "checkpoints are always safetensors", silent=(None, True)),
        honoured(
            "keep_last_n_checkpoints",
            "older ones are removed; the best one stays, and what is or was served",
            option="keep_last_n_checkpoints",
        ),
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
    "torchtune.training.metric_logging.CometLogger": "figures do not go to Comet; take DiskLogger, WandBLogger, "
    "TensorBoardLogger or MLFlowLogger",
    "torchtune.training.DistributedCheckpointer": "training goes over one device; take FullModelHFCheckpointer",
    **{
        f"torchtune.rlhf.loss.{name}": "preferences are learned by the sigmoid loss; take DPOLoss"
        for name in ("RSOLoss", "PPOLoss", "SimPOLoss", "IPOLoss")
    },
    "torchtune.datasets.multimodal.vqa_dataset": "models of text are trained",
    "torchtune.datasets.multimodal.multimodal_chat_dataset": "models of text are trained",
}
"""Names of torchtune that are told why not, rather than that they are unknown."""
