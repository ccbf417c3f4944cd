"""Every family against transformers: whole sequences, the block cache, shapes, LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lm.adapter import merge_adapter, save_adapter
from lm.cache import KVCache, PagedBatch
from lm.config import FAMILIES, load_config
from lm.lora import LINEAR_LAYERS, LoraSpec, add_lora, lora_parameters
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE, choose_ops
from lm.weight_files import expected_shapes
from tests.support.families import EVERY_FAMILY, OWN, YARN, difference, make, names_of, positions_of, random_ids, worst
from tests.support.tiny import load_tiny_model, make_tiny_model

CPU = torch.device("cpu")
LENGTH, BLOCK_SIZE = 200, 16
WINDOWED = [(family, name) for family in OWN for name in OWN[family] if name.startswith("window")]
Figure = Callable[[str, object], None]
every_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits_of(model: CausalLM, ids: Tensor) -> Tensor:
    return model.logits(model(ids, positions_of(ids)))


@torch.no_grad()
def theirs_logits(folder: Path, ids: Tensor) -> Tensor:
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert isinstance(logits, Tensor)
    return logits


@every_family
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path, figure: Figure) -> None:
    """200 positions: far past windows of 24 tokens and original contexts of 32 and 64."""
    ids, differences = random_ids(2, LENGTH), {}
    for name in names_of(family):
        folder = make(tmp_path / name, family, name)
        expected = theirs_logits(folder, ids)
        differences[name] = difference(logits_of(load_tiny_model(folder), ids), expected)
        differences[f"{name}, reference"] = difference(logits_of(load_tiny_model(folder, ops=REFERENCE), ids), expected)
    figure(f"{family}: largest difference of fp32 logits from transformers", worst(differences))


@every_family
def test_logits_through_the_cache_equal_those_of_transformers(family: str, tmp_path: Path, figure: Figure) -> None:
    """Prefill in chunks of several sizes, then token by token."""
    ids, differences = random_ids(2, 80), {}
    for name in names_of(family):
        folder = make(tmp_path / name, family, name)
        expected = theirs_logits(folder, ids)
        for ops in (None, REFERENCE):
            logits = through_cache(load_tiny_model(folder, ops=ops), ids, [0, 7, 40, 64, *range(65, 81)])
            differences[f"{name}, {ops and 'reference'}"] = difference(logits, expected)
    figure(f"{family}: largest difference of fp32 logits through the cache", worst(differences))


@torch.inference_mode()
def through_cache(model: CausalLM, ids: Tensor, edges: list[int]) -> Tensor:
    """Logits (B, T, V); rows take turns with the blocks, behind the null block."""
    rows, length = ids.shape
    blocks = -(-length // BLOCK_SIZE)
    cache = KVCache.allocate(model.config, 1 + rows * blocks, BLOCK_SIZE, CPU, torch.float32)
    table = 1 + torch.arange(rows * blocks).view(blocks, rows).T
    parts = []
    for start, end in pairwise(edges):
        positions = torch.arange(start, end).expand(rows, -1)
        slots = table.gather(1, positions // BLOCK_SIZE) * BLOCK_SIZE + positions % BLOCK_SIZE
        used = table[:, : -(-end // BLOCK_SIZE)].contiguous()
        paged = PagedBatch(cache=cache, slot_mapping=slots.flatten(), block_table=used)
        parts.append(model.logits(model(ids[:, start:end], positions, paged)))
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("family", "name"), WINDOWED)
def test_the_window_matters_in_these_comparisons(family: str, name: str, tmp_path: Path) -> None:
    folder, ids = make(tmp_path, family, name), random_ids(1, LENGTH)
    model = load_tiny_model(folder)
    windowed = logits_of(model, ids)
    model.config = replace(model.config, sliding_windows=(None,) * model.config.num_hidden_layers)
    assert bool((logits_of(model, ids) - windowed).abs().max() > 0.1) is (name != "window, off")


@pytest.mark.parametrize("rope", [name for name, change in EVERY_FAMILY.items() if "rope_parameters" in change])
def test_the_scaling_matters_in_these_comparisons(rope: str, tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 500.0}
    scaled, ids = load_tiny_model(make(tmp_path / "scaled", "llama", rope)), random_ids(1, LENGTH)
    other = load_tiny_model(make(tmp_path / "plain", "llama", "plain", rope_parameters=plain))
    assert (logits_of(scaled, ids) - logits_of(other, ids)).abs().max() > 0.1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_frequencies_of_qwen_equal_those_of_transformers(head_dim: int, truncate: bool, tmp_path: Path) -> None:
    rope = YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32_768, "truncate": truncate}
    folder = make_tiny_model(tmp_path, "qwen3", head_dim=head_dim, rope_parameters=rope)
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    ours = load_tiny_model(folder)
    torch.testing.assert_close(ours.inverse_frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling)


@every_family
def test_parameters_have_the_names_and_the_number_that_the_config_says(family: str, tmp_path: Path) -> None:
    for name in names_of(family):
        folder = make(tmp_path / name, family, name)
        config, theirs = load_config(folder), load_file(folder / "model.safetensors")
        assert dict(expected_shapes(config)) == {key: tuple(tensor.shape) for key, tensor in theirs.items()}
        assert config.num_parameters == sum(tensor.numel() for tensor in theirs.values())


# ---- devices


@every_family
@pytest.mark.parametrize("ops_of", ["cpu", "cuda"])
def test_a_forward_creates_all_on_its_device_and_reads_no_value(ops_of: str, family: str, tmp_path: Path) -> None:
    """On `meta` nothing has a value: reading one raises, and so does a mix with another device."""
    device = torch.device("meta")
    for name in names_of(family):
        config = load_config(make(tmp_path / name, family, name))
        ops, _ = choose_ops(torch.device(ops_of), torch.float32)
        model = build_model(config, device=device, dtype=torch.float32, ops=ops)
        ids = torch.zeros(3, 40, dtype=torch.int64, device=device)
        table = torch.zeros(3, 10, dtype=torch.int32, device=device)
        cache = KVCache.allocate(config, 30, 4, device, torch.float32)
        paged = PagedBatch(cache=cache, slot_mapping=ids.flatten(), block_table=table)
        for hidden in (model(ids, ids), model(ids, ids, documents=ids), model(ids, ids, paged)):
            assert hidden.shape == (3, 40, config.hidden_size)
            assert hidden.device == device


# ---- LoRA


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "attention bias"), ("mistral", "window"), ("qwen2", "plain"), ("qwen3", "attention bias")],
)
def test_an_adapter_of_every_family_is_that_of_peft(family: str, name: str, tmp_path: Path, figure: Figure) -> None:
    """Loaded by peft, merged by us, and merged by peft."""
    folder, ids = make(tmp_path / "base", family, name), random_ids(2, 60)
    spec = LoraSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=LINEAR_LAYERS)
    model = load_tiny_model(folder)
    add_lora(model, spec)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "adapter", base_model=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
    merged = load_tiny_model(folder)
    assert (logits_of(merged, ids) - expected).abs().max() > 0.1
    merge_adapter(merged, tmp_path / "adapter")
    apart = {
        "beside": difference(logits_of(model, ids), expected),
        "merged": difference(logits_of(merged, ids), expected),
    }
    figure(f"{family}: LoRA, largest difference of logits from peft", worst(apart))
