"""What each part of a torchtune configuration becomes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.torchtune_configs import FULL, LORA, SEED, refusal, stock
from trainer.config import RunConfig
from trainer.strict import parse_options
from trainer.torchtune import is_torchtune, parse_yaml, translate
from trainer.torchtune.parts import WHOLE_CONTEXT


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


def test_a_null_limit_of_steps_is_not_told_as_if_it_were_one() -> None:
    assert not any("max_steps_per_epoch" in note for note in translate(stock("max_steps_per_epoch=null")).notes)
    assert any("max_steps_per_epoch" in note for note in translate(stock("max_steps_per_epoch=3")).notes)
