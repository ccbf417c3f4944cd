"""What each part of a torchtune configuration becomes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.torchtune_configs import FULL, LORA, SEED, refusal, stock
from trainer.config import RunConfig
from trainer.strict import parse_options
from trainer.torchtune import is_torchtune, parse_yaml, translate
from trainer.torchtune.data import WHOLE_CONTEXT

LORA_OF_STOCK = {
    "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "rank": 4,
    "alpha": 8,
    "dropout": 0.1,
}


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
        (["dataset.masking_strategy=train_on_all"], {"masking": "all", "train_on_input": None}),
        (["dataset.masking_strategy=train_on_last"], {"masking": "last"}),
        (["tokenizer.truncation_type=left"], {"truncation": "left"}),
        (["model.use_dora=True", "model.lora_attn_modules=[q_proj]"], {"lora": LORA_OF_STOCK | {"use_dora": True}}),
        (
            ["optimizer.betas=[0.9, 0.95]", "optimizer.eps=1e-6"],
            {"optimizer": {"name": "adamw", "betas": [0.9, 0.95], "eps": 1e-6}},
        ),
        (
            ["optimizer={_component_: torchao.optim.AdamW8bit}"],
            {"optimizer": {"name": "adamw_8bit"}, "learning_rate": 1e-3},
        ),
        (
            ["optimizer={_component_: torch.optim.SGD, momentum: 0.9, lr: 0.1}"],
            {"optimizer": {"name": "sgd", "momentum": 0.9}, "learning_rate": 0.1, "weight_decay": 0.0},
        ),
        (
            ["optimizer={_component_: torch.optim.Adafactor}"],
            {"optimizer": {"name": "adafactor"}, "learning_rate": 0.01, "weight_decay": 0.0},
        ),
        (
            ["optimizer_in_bwd=True", "~clip_grad_norm", "gradient_accumulation_steps=1"],
            {"optimizer_in_backward": True, "max_grad_norm": None},
        ),
        (
            ["lr_scheduler=transformers.get_linear_schedule_with_warmup"],
            {"lr_schedule": "linear", "warmup_steps": 100},
        ),
        (["checkpointer.keep_last_n_checkpoints=2"], {"keep_last_n_checkpoints": 2}),
        (
            [
                "metric_logger={_component_: torchtune.training.metric_logging.WandBLogger, project: p, entity: me}",
            ],
            {"tracking": {"wandb": {"project": "p", "entity": "me"}}},
        ),
        (
            ["metric_logger={_component_: torchtune.training.metric_logging.MLFlowLogger, run_name: r}"],
            {"tracking": {"mlflow": {"experiment": "default_experiment", "name": "r"}}},
        ),
        (
            [
                "dataset_val={_component_: torchtune.datasets.alpaca_dataset, source: json, data_files: v.json}",
                "run_val_every_n_steps=5",
                "batch_size_val=2",
            ],
            {
                "validation": {"data_files": ["v.json"], "source": "json", "data_format": "alpaca"},
                "validate_every_n_steps": 5,
            },
        ),
        (
            ["dataset={_component_: torchtune.datasets.samsum_dataset, split: 'train[:5%]'}"],
            {
                "data_files": None,
                "datasets": [
                    {
                        "hub_id": "Samsung/samsum",
                        "data_format": "instruct",
                        "column_map": {"input": "dialogue", "output": "summary"},
                        "split": "train[:5%]",
                    }
                ],
            },
        ),
        (
            [
                (
                    "dataset=[{_component_: torchtune.datasets.instruct_dataset, data_files: a.json},"
                    "{_component_: torchtune.datasets.alpaca_cleaned_dataset, train_on_input: False}]"
                )
            ],
            {
                "train_on_input": False,
                "datasets": [
                    {"data_files": ["a.json"], "data_format": "instruct"},
                    {"hub_id": "yahma/alpaca-cleaned", "data_format": "alpaca"},
                ],
            },
        ),
        (
            [
                "dataset={_component_: torchtune.datasets.text_completion_dataset, data_files: a.txt, packed: True}",
                "dataset.split_across_pack=True",
                "tokenizer.max_seq_len=512",
            ],
            {"data_format": "text", "packed": True, "truncation": "split"},
        ),
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


def test_the_8_bit_optimizer_is_ours_with_a_note() -> None:
    translation = translate(stock("optimizer=bitsandbytes.optim.PagedAdamW8bit"), recipe=LORA)
    assert translation.options["optimizer"] == {"name": "adamw_8bit"}
    assert any("PagedAdamW8bit is adamw_8bit here" in note for note in translation.notes)


PREFERENCES = (
    "dataset={_component_: torchtune.datasets.stack_exchange_paired_dataset, data_files: p.jsonl}",
    "loss={_component_: torchtune.rlhf.loss.DPOLoss, beta: 0.05}",
)


def test_dpo_of_an_adapter() -> None:
    translation = translate(stock(*PREFERENCES), recipe="lora_dpo_single_device")
    options = translation.options
    assert (options["recipe"], options["dpo"]) == ("dpo", {"update": "lora", "beta": 0.05})
    assert options["lora"]["rank"] == 4
    assert options["column_map"] == {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    assert "packed" not in options
    parse_options(RunConfig, options)
    assert translate(stock(*PREFERENCES)).options["recipe"] == "dpo"


def test_dpo_of_every_weight_with_its_reference() -> None:
    model = "model={_component_: torchtune.models.llama3.llama3_8b}"
    reference = "ref_checkpointer={_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /m/}"
    translation = translate(stock(*PREFERENCES, model, reference), recipe="full_dpo_distributed")
    assert translation.options["dpo"]["update"] == "full"
    assert "lora" not in translation.options
    assert any("one device" in note for note in translation.notes)
    other = stock(*PREFERENCES, model, reference, "ref_checkpointer.checkpoint_dir=/n")
    assert refusal(other, "full_dpo_distributed").param == "ref_checkpointer.checkpoint_dir"


def test_dpo_takes_preferences_and_their_loss_only() -> None:
    assert "takes preferences" in str(refusal(stock(PREFERENCES[1]), "lora_dpo_single_device"))
    assert "DPOLoss" in str(refusal(stock(PREFERENCES[0]), "lora_dpo_single_device"))
    full = "model={_component_: torchtune.models.llama3.llama3_8b}"
    assert "lora_llama3_8b" in str(refusal(stock(*PREFERENCES, full), "lora_dpo_single_device"))


@pytest.mark.parametrize("word", ["resume_from_checkpoint=True", "checkpointer.should_load_recipe_state=True"])
def test_a_run_that_shall_go_on_is_told(word: str) -> None:
    assert translate(stock(word), recipe=LORA).resume
    assert not translate(stock(), recipe=LORA).resume


def test_a_null_limit_of_steps_is_not_told_as_if_it_were_one() -> None:
    assert not any("max_steps_per_epoch" in note for note in translate(stock("max_steps_per_epoch=null")).notes)
    assert any("max_steps_per_epoch" in note for note in translate(stock("max_steps_per_epoch=3")).notes)
