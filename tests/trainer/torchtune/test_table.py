"""The lists of names and keys are whole, and the documentation is printed from them."""

from __future__ import annotations

from pathlib import Path

from service.shipped import stock_configs
from trainer.torchtune import is_torchtune, parse_yaml, translate
from trainer.torchtune.components import COMPONENTS
from trainer.torchtune.models import BUILDERS, FAMILIES
from trainer.torchtune.table import all_keys, markdown

ROOT = Path(__file__).parents[3]


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
