"""What each part of a torchtune configuration becomes, and what is refused with its reason."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from service.shipped import stock_configs
from tests.support.json_fuzz import any_text, junk
from trainer.config import RunConfig, parse_options
from trainer.torchtune import apply_overrides, compare, is_torchtune, parse_yaml, translate
from trainer.torchtune.components import COMPONENTS
from trainer.torchtune.models import BUILDERS, FAMILIES, SHAPES
from trainer.torchtune.parts import WHOLE_CONTEXT
from trainer.torchtune.table import all_keys, markdown

ROOT = Path(__file__).parents[3]
FULL, LORA = "full_finetune_single_device", "lora_finetune_single_device"

SEED = """
device: npu
dtype: bf16
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: json
  data_files: ascend_dataset.json
  train_on_input: False
  packed: False
  split: train
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: ${output_dir}/original/tokenizer.model
  prompt_template: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ...
  checkpoint_files: [..]
  output_dir: ...
epochs: 10         # example values
batch_size: 2
enable_activation_checkpointing: True
prompt:            # generation config
  system: null
  user: "..."
"""
"""The configuration that must run unchanged, character for character; the dots are its own holes."""

STOCK = """
output_dir: /tmp/out
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /m/tokenizer.model, max_seq_len: null}
dataset: {_component_: torchtune.datasets.alpaca_dataset, source: json, data_files: a.json, packed: False}
seed: null
shuffle: True
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 4
  lora_alpha: 8
  lora_dropout: 0.1
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /m
  checkpoint_files: {filename_format: "model-{}-of-{}.safetensors", max_filename: "00002"}
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
save_adapter_weights_only: False
batch_size: 2
epochs: 3
optimizer: {_component_: torch.optim.AdamW, fused: True, weight_decay: 0.1, lr: 3e-4}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
max_steps_per_epoch: 7
gradient_accumulation_steps: 8
clip_grad_norm: 1.0
compile: True
device: cuda
enable_activation_checkpointing: True
enable_activation_offloading: True
dtype: bf16
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: "${output_dir}/logs"}
log_every_n_steps: 1
log_peak_memory_stats: True
log_level: INFO
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: False, output_dir: x, cpu: True, num_cycles: 1}
"""


def stock(*words: str) -> dict[str, Any]:
    return apply_overrides(parse_yaml(STOCK), words)


def refusal(data: dict[str, Any], recipe: str = LORA) -> UserError:
    with pytest.raises(UserError) as caught:
        translate(data, recipe=recipe)
    return caught.value


def test_the_seeds_configuration_is_taken_unchanged() -> None:
    data = parse_yaml(SEED)
    assert is_torchtune(data)
    translation = translate(data, recipe=FULL)
    config = parse_options(RunConfig, translation.options)
    assert (config.recipe, config.device, config.dtype, config.epochs, config.batch_size) == (
        "full",
        "npu",
        "bf16",
        10,
        2,
    )
    assert (config.model, config.tokenizer_file) == ("...", ".../original/tokenizer.model")
    assert (config.data_files, config.source, config.data_format) == (("ascend_dataset.json",), "json", "instruct")
    assert config.enable_activation_checkpointing
    assert not config.train_on_input
    assert translation.generation is not None
    asked = translation.generation
    assert (asked.user, asked.system, asked.max_new_tokens, asked.temperature, asked.top_k) == (
        "...",
        None,
        300,
        0.6,
        300,
    )
    assert translate(data, recipe="generate").generation == asked


def test_a_stock_configuration_becomes_our_options() -> None:
    translation = translate(stock(), recipe=LORA)
    expected = {
        "recipe": "lora",
        "model": "/m",
        "device": "cuda",
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "warmup_steps": 100,
        "max_grad_norm": 1.0,
        "max_steps": 21,
        "gradient_accumulation_steps": 8,
        "data_format": "alpaca",
        "train_on_input": True,
        "max_seq_len": WHOLE_CONTEXT,
        "lora": {
            "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "rank": 4,
            "alpha": 8,
            "dropout": 0.1,
        },
    }
    assert {key: translation.options[key] for key in expected} == expected
    assert translation.output_dir == "/tmp/out"
    assert translation.checkpoint_files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    told = [note.partition(":")[0] for note in translation.notes]
    for key in (
        "compile",
        "enable_activation_offloading",
        "dtype",
        "seed",
        "metric_logger.log_dir",
        "max_steps_per_epoch",
    ):
        assert key in told
    assert "optimizer.fused" not in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["~lr_scheduler"], {"lr_schedule": "constant", "warmup_steps": 0}),
        (["~optimizer.lr", "~optimizer.weight_decay"], {"learning_rate": 1e-3, "weight_decay": 0.01}),
        (["~clip_grad_norm"], {"max_grad_norm": None}),
        (["tokenizer.max_seq_len=512", "dataset.packed=True"], {"max_seq_len": 512, "packed": True}),
        (["dataset.split='train[:10%]'"], {"split": "train[:10%]"}),
        (["dataset.column_map={input: q, output: a}"], {"column_map": {"input": "q", "output": "a"}}),
        (["dataset.data_files={train: [a, b]}"], {"data_files": ["a", "b"]}),
        (["dataset.masking_strategy=train_on_all"], {"train_on_input": True}),
        (
            ["dataset=torchtune.datasets.text_completion_dataset", "dataset.column=body"],
            {"data_format": "text", "column_map": {"text": "body"}},
        ),
        (
            [
                "dataset=torchtune.datasets.chat_dataset",
                "dataset.conversation_column=chat",
                "dataset.conversation_style=sharegpt",
                "dataset.new_system_prompt=Be brief.",
            ],
            {"data_format": "sharegpt", "column_map": {"conversations": "chat"}, "new_system_prompt": "Be brief."},
        ),
        (
            [
                "dataset=torchtune.datasets.chat_dataset",
                "dataset.conversation_column=c",
                "dataset.conversation_style=openai",
            ],
            {"data_format": "messages", "column_map": {"messages": "c"}},
        ),
        (["tokenizer.prompt_template={user: [a, b]}"], {"prompt_template": {"user": ["a", "b"]}}),
        (
            ["tokenizer.prompt_template=torchtune.data.QuestionAnswerTemplate"],
            {"prompt_template": {"user": ["Question: ", "\n\nAnswer: "]}},
        ),
    ],
)
def test_a_key_does_what_it_does_in_torchtune(words: list[str], expected: dict[str, Any]) -> None:
    options = translate(stock(*words), recipe=LORA).options
    assert {key: options.get(key) for key in expected} == expected
    parse_options(RunConfig, options)


@pytest.mark.parametrize(
    ("words", "param", "message"),
    [
        (["bacth_size=1"], "bacth_size", "did you mean batch_size"),
        (["model.lora_ranks=1"], "model.lora_ranks", "did you mean lora_rank"),
        (["model=torchtune.models.llama3.llama3_8b"], "model.lora_attn_modules", "unknown key"),
        (
            ["model={_component_: torchtune.models.llama3.llama3_8b}"],
            "model._component_",
            "take torchtune.models.llama3.lora",
        ),
        (["model=torchtune.models.llama3.qlora_llama3_8b"], "model._component_", "QLoRA"),
        (["model=torchtune.models.gemma2.gemma2_9b"], "model._component_", "no such family"),
        (["model=os.system"], "model._component_", "'os.system' is not in the list"),
        (["model={_component_: 7}"], "model._component_", "name of a component"),
        (["model=x", "model._component_=[x]"], "model._component_", "name of a component"),
        (["model={lora_rank: 8}"], "model._component_", "required"),
        (["model.quantize_base=True"], "model.quantize_base", "QLoRA"),
        (["model.use_dora=True"], "model.use_dora", "DoRA"),
        (["model.lora_attn_modules=[o_proj]"], "model.lora_attn_modules", "output_proj"),
        (["model.lora_rank=0"], "model.rank", "greater than or equal to 1"),
        (["optimizer.betas=[0.9, 0.95]"], "optimizer.betas", "0.999"),
        (["optimizer=torch.optim.SGD"], "optimizer._component_", "torch.optim.AdamW"),
        (["optimizer.lr=fast"], "optimizer.lr", "valid number"),
        (["lr_scheduler.num_cycles=2"], "lr_scheduler.num_cycles", "half a cosine"),
        (["~lr_scheduler.num_warmup_steps"], "lr_scheduler.num_warmup_steps", "required"),
        (["profiler.enabled=True"], "profiler.enabled", "write False"),
        (["loss=torch.nn.MSELoss"], "loss._component_", "not in the list"),
        (["metric_logger=torchtune.training.metric_logging.WandBLogger"], "metric_logger._component_", "DiskLogger"),
        (["~dataset.data_files"], "dataset.data_files", "remote data"),
        (["dataset.source=tatsu-lab/alpaca"], "dataset.source", "not fetched"),
        (["dataset.packed=True"], "tokenizer.max_seq_len", "as in torchtune"),
        (["dataset.masking_strategy=train_on_last"], "dataset.masking_strategy", "train_on_all"),
        (["dataset=[a]"], "dataset", "one data set"),
        (["dataset=torchtune.datasets.preference_dataset"], "dataset._component_", "DPO"),
        (["dataset=torchtune.datasets.samsum_dataset"], "dataset._component_", "save them as a file"),
        (["tokenizer.prompt_template=os.path"], "tokenizer.prompt_template", "not in the list"),
        (["tokenizer.truncation_type=left"], "tokenizer.truncation_type", "at their end"),
        (["tokenizer.max_seq_len=2"], "tokenizer.max_seq_len", "greater than or equal to 8"),
        (["checkpointer.checkpoint_files={a: b}"], "checkpointer.checkpoint_files.filename_format", "required"),
        (["checkpointer=torchtune.training.DistributedCheckpointer"], "checkpointer._component_", "one device"),
        (["~checkpointer"], "checkpointer", "required"),
        (["~dataset"], "dataset", "required"),
        (["dtype=fp16"], "dtype", "bf16 or fp32"),
        (["device=tpu"], "device", "tpu"),
        (["shuffle=False"], "shuffle", "write True"),
        (["max_steps_per_epoch=0"], "max_steps_per_epoch", "from 1"),
        (["seed=-1"], "seed", "greater than or equal to 0"),
        (["teacher_model=x"], "teacher_model", "distillation"),
        (["resume_from_checkpoint=True"], "resume_from_checkpoint", "cannot be resumed"),
        (["output_dir=[a]", "~metric_logger", "checkpointer.output_dir=1"], "checkpointer.output_dir", "folder"),
    ],
)
def test_what_is_not_done_is_refused_where_it_stands(words: list[str], param: str, message: str) -> None:
    error = refusal(stock(*words))
    assert message in str(error)
    assert error.param == param
    assert str(error).startswith(param)


def test_generate_refuses_what_it_cannot_do_and_asks_for_a_prompt() -> None:
    words = ["~dataset", "prompt={system: Be brief., user: Hi}", "tokenizer.prompt_template={user: [Q, A]}"]
    asked = translate(stock(*words), recipe="generate").generation
    assert asked is not None
    assert (asked.system, asked.user, asked.seed) == ("Be brief.", "QHiA", None)
    assert refusal(stock(*words, "quantizer={_component_: x}"), "generate").param == "quantizer"
    assert refusal(stock(*words, "max_new_tokens=0"), "generate").param == "max_new_tokens"
    assert refusal(stock(*words, "prompt={user: null}"), "generate").param == "prompt.user"
    assert refusal(stock("~dataset"), "generate").param == "prompt"


def test_without_a_recipe_the_builder_decides() -> None:
    assert translate(stock()).options["recipe"] == "lora"
    assert translate(stock("model={_component_: torchtune.models.llama3.llama3_8b}")).options["recipe"] == "full"
    assert translate(stock("~model")).options["recipe"] == "full"


def test_the_8_bit_optimizer_becomes_adamw_with_a_note() -> None:
    translation = translate(stock("optimizer=bitsandbytes.optim.PagedAdamW8bit"), recipe=LORA)
    assert any("PagedAdamW8bit becomes AdamW" in note for note in translation.notes)


def model_folder(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES["llama3.llama3_8b"], "model_type": model_type, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").touch()
    return folder


def test_a_configuration_that_fits_its_checkpoint_passes_and_the_tokenizer_is_told(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (tmp_path / "tokenizer.model").touch()
    translation = translate(stock(f"tokenizer.path={tmp_path}/tokenizer.model"), recipe=LORA)
    found = compare(translation, folder)
    assert found.options["tokenizer_file"] == str(tmp_path / "tokenizer.model")
    assert "is read" in found.notes[-1]
    (folder / "tokenizer.json").touch()
    found = compare(translation, folder)
    assert "tokenizer_file" not in found.options
    assert "preferred" in found.notes[-1]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"num_hidden_layers": 16}, "model._component_", "num_hidden_layers is 16 there, 32 in the builder"),
        (SHAPES["llama3_2.llama3_2_1b"], "model._component_", "take torchtune.models.llama3_2.llama3_2_1b, or remove"),
        ({"model_type": "qwen2"}, "model._component_", "model_type is 'qwen2' there"),
        ({"num_key_value_heads": None}, "model._component_", "num_key_value_heads"),
    ],
)
def test_a_builder_that_does_not_fit_its_checkpoint_is_refused(
    tmp_path: Path, changes: dict[str, Any], param: str, message: str
) -> None:
    folder = model_folder(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        compare(translate(stock(), recipe=LORA), folder)
    assert caught.value.param == param
    assert message in str(caught.value)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    for words, param in (
        (["checkpointer.checkpoint_files=[x.bin]"], "checkpointer.checkpoint_files"),
        (["checkpointer.checkpoint_files=[/etc/passwd]"], "checkpointer.checkpoint_files"),
        (["checkpointer.checkpoint_files=[../x]"], "checkpointer.checkpoint_files"),
        (["tokenizer.path=/none/tokenizer.model"], "tokenizer.path"),
        (["checkpointer.model_type=MISTRAL"], "checkpointer.model_type"),
    ):
        with pytest.raises(UserError) as caught:
            compare(translate(stock(*words), recipe=LORA), folder)
        assert caught.value.param == param


@pytest.mark.parametrize("name", ["os.system", "subprocess.run", "builtins.eval", "torchtune.nothing", "antigravity"])
@pytest.mark.parametrize("place", COMPONENTS)
def test_a_dotted_path_is_never_imported(name: str, place: str) -> None:
    data = stock()
    data[place] = {"_component_": name}
    before = set(sys.modules)
    assert refusal(data).param == f"{place}._component_"
    assert set(sys.modules) == before


def test_every_builder_belongs_to_a_family_and_has_a_twin() -> None:
    assert {builder.name.split(".")[0] for builder in BUILDERS.values()} == FAMILIES.keys()
    assert sum(builder.is_lora for builder in BUILDERS.values()) * 2 == len(BUILDERS)


STOCK_KEYS = """output_dir tokenizer dataset seed shuffle model checkpointer resume_from_checkpoint batch_size epochs
optimizer lr_scheduler loss max_steps_per_epoch gradient_accumulation_steps optimizer_in_bwd clip_grad_norm compile device
enable_activation_checkpointing enable_activation_offloading dtype metric_logger log_every_n_steps log_peak_memory_stats
log_level profiler save_adapter_weights_only low_cpu_ram prompt max_new_tokens temperature top_k enable_kv_cache quantizer
save_every_n_steps enable_async_checkpointing resize_token_embeddings cudnn_deterministic_mode collate_fn"""


def test_every_key_that_torchtunes_three_recipes_read_is_in_the_table() -> None:
    known = {key.name for _, keys in all_keys() for key in keys} | COMPONENTS.keys() | {"prompt"}
    assert set(STOCK_KEYS.split()) <= known


def test_the_table_in_the_documentation_is_current() -> None:
    text = (ROOT / "docs" / "torchtune.md").read_text(encoding="utf-8")
    assert text == markdown(), "run `python -m trainer.torchtune > docs/torchtune.md`"


def test_shipped_configurations_of_torchtunes_shape_are_taken() -> None:
    found = {name: parse_yaml(path.read_text(encoding="utf-8")) for name, path in stock_configs().items()}
    shaped = {name: data for name, data in found.items() if is_torchtune(data)}
    assert shaped.keys() >= {"generation", "full_finetune_torchtune"}
    for data in shaped.values():
        translate(data, recipe=None if "dataset" in data else "generate")


paths = st.sampled_from(sorted({f"{where}.{key.name}".lstrip(".") for where, keys in all_keys() for key in keys}))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(
    changes=st.lists(st.tuples(paths | any_text, junk), max_size=4),
    recipe=st.sampled_from([FULL, LORA, "generate", None]),
)
def test_no_change_gets_past_as_anything_but_options_or_an_error_of_the_user(
    changes: list[tuple[str, Any]], recipe: str | None
) -> None:
    data: Any = deepcopy(parse_yaml(STOCK))
    for path, value in changes:
        *parents, last = path.split(".")
        group = data
        for parent in parents:
            group = group.setdefault(parent, {}) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group[last] = value
    try:
        translation = translate(data, recipe=recipe)
    except UserError:
        return
    if recipe != "generate":
        parse_options(RunConfig, translation.options)
