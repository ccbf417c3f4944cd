"""The components of a configuration, one by one, into our options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError
from trainer.option_groups import LINEAR_LAYERS
from trainer.torchtune.data import WHOLE_CONTEXT
from trainer.torchtune.fields import Collected, component_of, nearest, text_at, texts_at
from trainer.torchtune.keys import PROMPT, by_name
from trainer.torchtune.models import BUILDERS, CHECKPOINT_TYPES

MAX_STEPS = 10**9

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
    "use_dora": "use_dora",
}
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPart:
    model_type: str | None
    names: tuple[str, ...]
    resume: bool = False
    """Whether the run in output_dir shall go on."""


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
    on_mlp = _flag(keys, "apply_lora_to_mlp", "model")
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
    resume = any(_flag(keys, name, "checkpointer") for name in ("resume_from_checkpoint", "should_load_recipe_state"))
    return CheckpointPart(model_type=model_type, names=_checkpoint_files(keys), resume=resume)


def _flag(keys: Mapping[str, Any], name: str, where: str = "") -> bool:
    value, path = keys.get(name), f"{where}.{name}" if where else name
    if value is None or isinstance(value, bool):
        return bool(value)
    raise UserError(f"{path}: true or false is expected (got {value!r:.80})", param=path)


def read_reference(group: object, model: str) -> None:
    """The reference of DPO is the model as it begins: `ref_checkpointer` may only name it again. Raises UserError."""
    if group is None:
        return
    _, _, keys = component_of("checkpointer", group, "ref_checkpointer")
    if (folder := text_at(keys, "checkpoint_dir", "ref_checkpointer")).rstrip("/") != model.rstrip("/"):
        where = "ref_checkpointer.checkpoint_dir"
        reason = f"{folder:.200}: the reference is the model that training begins with, {model:.200}; name the same one"
        raise UserError(f"{where}: {reason}", param=where)


def is_resumed(data: Mapping[str, Any], checkpointer: CheckpointPart) -> bool:
    return checkpointer.resume or _flag(data, "resume_from_checkpoint")


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
    if keys.get("truncation_type") is not None:
        collected.set("truncation", keys["truncation_type"], "tokenizer.truncation_type")
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
