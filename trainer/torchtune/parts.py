"""The components of a configuration, one by one, into our options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError
from trainer.option_groups import LINEAR_LAYERS
from trainer.torchtune.fields import Collected, component_of, nearest, text_at, texts_at
from trainer.torchtune.keys import PROMPT, by_name
from trainer.torchtune.models import BUILDERS, CHECKPOINT_TYPES

FILE_TYPES = ("json", "csv", "text", "parquet")
WHOLE_CONTEXT = 1_048_576
"""max_seq_len without a limit: the model's own context is below it."""
MAX_STEPS = 10**9
ADAMW_RATE, ADAMW_DECAY = 1e-3, 0.01
"""torch.optim.AdamW's own defaults."""

TEMPLATES: dict[str, dict[str, list[str]]] = {
    "torchtune.data.GrammarErrorCorrectionTemplate": {
        "user": ["Correct this to standard English: ", "\n---\nCorrected: "]
    },
    "torchtune.data.SummarizeTemplate": {"user": ["Summarize this dialogue:\n", "\n---\nSummary:\n"]},
    "torchtune.data.QuestionAnswerTemplate": {"user": ["Question: ", "\n\nAnswer: "]},
}
CHAT_TEMPLATES = (
    "torchtune.models.llama2.Llama2ChatTemplate",
    "torchtune.models.mistral.MistralChatTemplate",
    "torchtune.data.ChatMLTemplate",
)
"""Where the model has no template of its own, its family's default is the same."""
LORA_LAYERS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
LORA_KEYS = {
    "target_modules": "lora_attn_modules",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
}
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPart:
    model_type: str | None
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerPart:
    template: dict[str, list[str]] | None = None


def read_model(group: object, collected: Collected) -> str | None:
    """The builder's name. LoRA's keys become `lora`."""
    if group is None:
        return None
    name, component, keys = component_of("model", group)
    collected.read(keys, component.keys, "model")
    if BUILDERS[name].is_lora:
        lora = _lora(keys)
        collected.set("lora", lora, "model")
        collected.origins |= {f"lora.{name}": f"model.{LORA_KEYS[name]}" for name in lora}
    return name


def _lora(keys: Mapping[str, Any]) -> dict[str, Any]:
    where = "model.lora_attn_modules"
    names = keys.get("lora_attn_modules")
    if not isinstance(names, list) or not names:
        raise UserError(f"{where}: a list of names is expected; {nearest('', LORA_LAYERS)}", param=where)
    if unknown := [name for name in names if not isinstance(name, str) or name not in LORA_LAYERS]:
        raise UserError(f"{where}: {unknown[0]!r:.80} is unknown; {nearest(str(unknown[0]), LORA_LAYERS)}", param=where)
    on_mlp = keys.get("apply_lora_to_mlp", False)
    if not isinstance(on_mlp, bool):
        raise UserError(
            f"model.apply_lora_to_mlp: true or false is expected (got {on_mlp!r:.80})", param="model.apply_lora_to_mlp"
        )
    chosen = {LORA_LAYERS[name] for name in names} | set(MLP_LAYERS if on_mlp else ())
    lora: dict[str, Any] = {"target_modules": [layer for layer in LINEAR_LAYERS if layer in chosen]}
    return lora | {name: keys[key] for name, key in LORA_KEYS.items() if key in keys and name != "target_modules"}


def read_checkpointer(group: object, collected: Collected) -> CheckpointPart:
    if group is None:
        raise UserError("checkpointer: this field is required: it names the model's folder", param="checkpointer")
    _, component, keys = component_of("checkpointer", group)
    collected.read(keys, component.keys, "checkpointer")
    collected.set("model", text_at(keys, "checkpoint_dir", "checkpointer"), "checkpointer.checkpoint_dir")
    model_type = keys.get("model_type")
    if model_type is not None and (not isinstance(model_type, str) or model_type not in CHECKPOINT_TYPES):
        message = f"checkpointer.model_type: {model_type!r:.80} is not supported; {nearest('', CHECKPOINT_TYPES)}"
        raise UserError(message, param="checkpointer.model_type")
    return CheckpointPart(model_type=model_type, names=_checkpoint_files(keys))


def _checkpoint_files(keys: Mapping[str, Any]) -> tuple[str, ...]:
    where, value = "checkpointer.checkpoint_files", keys.get("checkpoint_files")
    if value is None:
        return ()
    if isinstance(value, dict):
        return _numbered(value, where)
    return tuple(texts_at(keys, "checkpoint_files", "checkpointer"))


def _numbered(value: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """`{filename_format: model-{}-of-{}.safetensors, max_filename: "00004"}` -> four names."""
    form, last = (text_at(value, name, where) for name in ("filename_format", "max_filename"))
    if (
        set(value) != {"filename_format", "max_filename"}
        or not last.isascii()
        or not last.isdecimal()
        or int(last) > 9999
    ):
        raise UserError(f"{where}: {{filename_format, max_filename}} is expected, the latter as '00004'", param=where)
    if form.count("{}") != 2 or "/" in form:
        raise UserError(f"{where}.filename_format: two {{}} are expected (got {form!r:.80})", param=where)
    before, between, after = form.split("{}")
    return tuple(f"{before}{n:0{len(last)}d}{between}{last}{after}" for n in range(1, int(last) + 1))


def read_tokenizer(group: object, collected: Collected) -> TokenizerPart:
    collected.set("max_seq_len", WHOLE_CONTEXT, "tokenizer.max_seq_len")
    if group is None:
        return TokenizerPart()
    _, component, keys = component_of("tokenizer", group)
    collected.read(keys, component.keys, "tokenizer")
    collected.set("tokenizer_file", text_at(keys, "path", "tokenizer"), "tokenizer.path")
    if keys.get("max_seq_len") is not None:
        collected.set("max_seq_len", keys["max_seq_len"], "tokenizer.max_seq_len")
    template = _prompt_template(keys.get("prompt_template"), collected)
    if template is not None:
        collected.set("prompt_template", template, "tokenizer.prompt_template")
    return TokenizerPart(template=template)


def _prompt_template(value: object, collected: Collected) -> dict[str, list[str]] | None:
    where = "tokenizer.prompt_template"
    if value is None:
        return None
    if isinstance(value, str) and value in CHAT_TEMPLATES:
        collected.note(where, f"the model's own chat template is used, or its family's default, rather than {value}")
        return None
    if isinstance(value, str):
        if value not in TEMPLATES:
            known = nearest(value, (*TEMPLATES, *CHAT_TEMPLATES))
            raise UserError(
                f"{where}: {value!r:.120} is not in the list; {known}; or write {{role: [before, after]}}", param=where
            )
        return TEMPLATES[value]
    is_pairs = isinstance(value, dict) and all(
        role in ("system", "user", "assistant")
        and isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        for role, pair in value.items()
    )
    if not isinstance(value, dict) or not is_pairs:
        raise UserError(f"{where}: {{role: [before, after]}} is expected, of texts (got {value!r:.80})", param=where)
    return value


def read_scalars(data: Mapping[str, Any], collected: Collected) -> None:
    """Keys at the top whose value is not an option's as it stands."""
    dtype = data.get("dtype")
    if dtype is not None:
        if dtype not in ("bf16", "fp32"):
            raise UserError(f"dtype: bf16 or fp32 is expected, as in torchtune (got {dtype!r:.80})", param="dtype")
        collected.set("dtype", dtype, "dtype")
    if dtype == "bf16":
        collected.note("dtype", "with bf16, trained weights and AdamW's moments are kept in fp32")
    if data.get("seed") is not None:
        collected.set("seed", data["seed"], "seed")
    elif "seed" in data:
        collected.note("seed", "null is seed 0, so that the run can be repeated")
    collected.set("max_grad_norm", data.get("clip_grad_norm"), "clip_grad_norm")
    steps, epochs = data.get("max_steps_per_epoch"), data.get("epochs", 1)
    if steps is not None:
        if type(steps) is not int or type(epochs) is not int or not (1 <= steps <= MAX_STEPS and epochs <= MAX_STEPS):
            where = "max_steps_per_epoch"
            raise UserError(f"{where}: a number from 1 to {MAX_STEPS} is expected (got {steps!r:.80})", param=where)
        collected.set("max_steps", steps * epochs, "max_steps_per_epoch")


def read_dataset(group: object, collected: Collected) -> None:
    if group is None:
        raise UserError("dataset: this field is required", param="dataset")
    name, component, keys = component_of("dataset", group)
    kind = name.rsplit(".", 1)[1]
    if "source" in keys and keys["source"] not in FILE_TYPES:
        raise UserError(
            f"dataset.source: {keys['source']!r:.80}: remote data sets are not fetched; save it as a file, and write "
            f"its type ({', '.join(FILE_TYPES)}) here and its path in data_files",
            param="dataset.source",
        )
    if keys.get("data_files") is None:
        remote = ": the remote data of this component are not fetched; save them as a file, and name it here"
        message = remote if kind.startswith("alpaca") else ": this field is required"
        raise UserError(f"dataset.data_files{message}", param="dataset.data_files")
    collected.read(keys, component.keys, "dataset")
    collected.set("data_files", _data_files(keys), "dataset.data_files")
    _read_form(kind, keys, collected)
    _read_masking(kind, keys, collected)
    if keys.get("packed") and collected.options["max_seq_len"] == WHOLE_CONTEXT:
        raise UserError("tokenizer.max_seq_len: packed data need it, as in torchtune", param="tokenizer.max_seq_len")


def _data_files(keys: Mapping[str, Any]) -> list[str]:
    value = keys["data_files"]
    if isinstance(value, dict):
        if set(value) != {"train"}:
            where = "dataset.data_files"
            raise UserError(f"{where}: a file, a list or {{train: ...}} is expected (got {value!r:.80})", param=where)
        value = value["train"]
    return texts_at({"data_files": value}, "data_files", "dataset")


def _read_form(kind: str, keys: Mapping[str, Any], collected: Collected) -> None:
    form, column, origin = (
        {"instruct_dataset": "instruct", "text_completion_dataset": "text"}.get(kind, "alpaca"),
        None,
        "",
    )
    if kind == "chat_dataset":
        style = text_at(keys, "conversation_style", "dataset")
        if style not in ("sharegpt", "openai"):
            where = "dataset.conversation_style"
            raise UserError(f"{where}: sharegpt or openai is expected (got {style!r:.80})", param=where)
        form = "sharegpt" if style == "sharegpt" else "messages"
        column, origin = text_at(keys, "conversation_column", "dataset"), "dataset.conversation_column"
    if kind == "text_completion_dataset" and keys.get("column") is not None:
        column, origin = text_at(keys, "column", "dataset"), "dataset.column"
    collected.set("data_format", form, "dataset._component_")
    if column is not None:
        standard = {"sharegpt": "conversations"}.get(form, form)
        collected.set("column_map", {standard: column}, origin)


def _read_masking(kind: str, keys: Mapping[str, Any], collected: Collected) -> None:
    if kind.startswith("alpaca") and "train_on_input" not in keys:
        collected.set("train_on_input", True, "dataset.train_on_input")
        collected.note("dataset.train_on_input", "true, torchtune's default for alpaca")
    strategy, where = keys.get("masking_strategy"), "dataset.masking_strategy"
    if strategy is None:
        return
    if strategy not in ("train_on_assistant", "train_on_all"):
        message = f"{where}: train_on_assistant or train_on_all is expected (got {strategy!r:.80})"
        raise UserError(message, param=where)
    collected.set("train_on_input", strategy == "train_on_all", where)


def read_optimizer(group: object, scheduler: object, collected: Collected) -> None:
    """Without both, our own defaults; with the optimizer alone, its rate is constant, as in torchtune."""
    if group is None and scheduler is None:
        collected.note("optimizer", "missing: AdamW with this service's rate, warm-up and cosine")
        return
    if scheduler is None:
        collected.set("lr_schedule", "constant", "lr_scheduler")
        collected.set("warmup_steps", 0, "lr_scheduler")
    else:
        _, component, keys = component_of("lr_scheduler", scheduler)
        collected.read(keys, component.keys, "lr_scheduler")
        if keys.get("num_warmup_steps") is None:
            where = "lr_scheduler.num_warmup_steps"
            raise UserError(f"{where}: this field is required", param=where)
    if group is None:
        return
    name, component, keys = component_of("optimizer", group)
    collected.set("learning_rate", ADAMW_RATE, "optimizer.lr")
    collected.set("weight_decay", ADAMW_DECAY, "optimizer.weight_decay")
    taken = {key: value for key, value in keys.items() if value is not None or key not in component.keys}
    collected.read(taken, component.keys, "optimizer")
    if not name.startswith("torch."):
        collected.note("optimizer", f"{name} becomes AdamW with moments in fp32, which take more memory")


def read_prompt(prompt: object, tokenizer: TokenizerPart) -> dict[str, Any]:
    """`system` and `user`, with the prompt template's texts around them. A bare text is the user's."""
    if isinstance(prompt, str):
        prompt = {"user": prompt}
    if not isinstance(prompt, dict):
        raise UserError(f"prompt: {{system, user}} is expected (got {prompt!r:.80})", param="prompt")
    Collected().read(prompt, by_name(PROMPT), "prompt")
    prompt = {role: _bare(message) for role, message in prompt.items()}
    user, system = text_at(prompt, "user", "prompt"), prompt.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"prompt.system: a text or null is expected (got {system!r:.80})", param="prompt.system")
    before, after = (tokenizer.template or {}).get("user", ("", ""))
    system_before, system_after = (tokenizer.template or {}).get("system", ("", ""))
    return {"user": before + user + after, "system": None if not system else system_before + system + system_after}


def _bare(message: object) -> object:
    """torchtune's second form of a message is `{text: ...}`."""
    return message["text"] if isinstance(message, dict) and [*message] == ["text"] else message
