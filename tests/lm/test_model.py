"""The transformer against transformers, and its forms against each other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from lm.config import load_config
from lm.model import CausalLM, build_model, inverse_frequencies
from lm.ops import REFERENCE, choose_ops
from tests.support.families import LLAMA3
from tests.support.tiny import VOCAB_SIZE, load_tiny_model, make_tiny_llama

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied, GQA 2": {},
    "untied": {"tie_word_embeddings": False},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
    "both biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "GQA 1": {"num_key_value_heads": 4},
    "GQA 4": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "MQA": {"num_key_value_heads": 1},
    "head_dim above hidden / heads": {"head_dim": 24},
    "head_dim below hidden / heads": {"head_dim": 4},
    "llama3 scaling": {"rope_parameters": LLAMA3},
    "large eps": {"rms_norm_eps": 0.1},
}


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(5))


def positions_of(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def logits_of(model: CausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ids, positions_of(ids)))


def theirs_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        logits = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_those_of_transformers(variant: dict[str, Any], tmp_path: Path) -> None:
    """200 positions: with llama3 scaling that is far past the 32 of its original context."""
    folder = make_tiny_llama(tmp_path, **variant)
    ids = random_ids(2, 200)
    expected = theirs_logits(folder, ids)
    assert expected.std() > 0.5, "logits that are all alike would prove nothing"
    torch.testing.assert_close(logits_of(load_tiny_model(folder), ids), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_of(load_tiny_model(folder, ops=REFERENCE), ids), expected, rtol=0, atol=1e-4)


def test_llama3_scaling_matters_in_that_comparison(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path, rope_parameters=LLAMA3)
    scaled, ids = load_tiny_model(folder), random_ids(1, 200)
    plain = copy.copy(scaled)
    plain.inverse_frequencies = inverse_frequencies(load_config(make_tiny_llama(tmp_path, rope_parameters=PLAIN_ROPE)))
    assert (logits_of(scaled, ids) - logits_of(plain, ids)).abs().max() > 0.1


@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama31_frequencies_equal_those_of_transformers(head_dim: int, tmp_path: Path) -> None:
    rope = LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    folder = make_tiny_llama(tmp_path, head_dim=head_dim, rope_parameters=rope)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse_frequencies(load_config(folder)), theirs, rtol=1e-6, atol=0)


def test_bf16_weights_are_as_near_to_fp32_as_in_transformers(tiny: Path) -> None:
    ids = random_ids(2, 100)
    exact = theirs_logits(tiny, ids)
    ours = logits_of(load_tiny_model(tiny, dtype=torch.bfloat16), ids)
    assert ours.dtype == torch.bfloat16
    their_error = (theirs_logits(tiny, ids, torch.bfloat16).float() - exact).square().mean().sqrt()
    our_error = (ours.float() - exact).square().mean().sqrt()
    assert our_error < 1.1 * their_error


def test_a_cast_of_the_model_does_not_round_its_rotation(tiny: Path) -> None:
    model = load_tiny_model(tiny)
    before = model.inverse_frequencies.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.inverse_frequencies, before)
    assert model.inverse_frequencies.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameters_have_the_names_and_the_number_that_the_config_says(variant: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path, **variant)
    model = load_tiny_model(folder)
    assert set(model.state_dict()) == set(load_file(folder / "model.safetensors"))
    assert sum(parameter.numel() for parameter in model.parameters()) == load_config(folder).num_parameters


def test_right_padding_does_not_change_a_row(tiny: Path) -> None:
    model, ids = load_tiny_model(tiny), random_ids(2, 40)
    ids[0, 25:] = 0
    alone = logits_of(model, ids[:1, :25])
    torch.testing.assert_close(logits_of(model, ids)[:1, :25], alone, rtol=0, atol=1e-5)


def train_gradients(model: CausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model.logits(model(ids, positions_of(ids)))
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_equal_those_of_transformers(tiny: Path) -> None:
    ids = random_ids(2, 30)
    ours = train_gradients(load_tiny_model(tiny), ids)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tiny)
    theirs(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(ours) == set(expected)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_activation_checkpointing_gives_the_same_gradients(tiny: Path) -> None:
    model, ids = load_tiny_model(tiny), random_ids(2, 30)
    plain = train_gradients(model, ids)
    calls = count_calls(model.model.layers[0])
    model.checkpoint_activations = True
    recomputed = train_gradients(model, ids)
    assert len(calls) == 2, "the layer runs again in the backward pass"
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())


def test_activation_checkpointing_of_every_other_layer_keeps_the_gradients_too(tmp_path: Path) -> None:
    model, ids = load_tiny_model(make_tiny_llama(tmp_path, num_hidden_layers=4)), random_ids(2, 30)
    plain = train_gradients(model, ids)
    calls = [count_calls(layer) for layer in model.model.layers]
    model.checkpoint_activations, model.checkpoint_interval = True, 2
    recomputed = train_gradients(model, ids)
    assert [len(times) for times in calls] == [2, 1, 2, 1]
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())


def count_calls(module: torch.nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def test_autocast_keeps_the_residual_and_the_gradients_in_fp32(tiny: Path) -> None:
    model, ids = load_tiny_model(tiny), random_ids(2, 30)
    exact = train_gradients(model, ids)
    model.checkpoint_activations = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(ids, positions_of(ids))
        assert model.logits(hidden).dtype == torch.bfloat16
        rounded = train_gradients(model, ids)
    assert hidden.dtype == torch.float32
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        assert torch.cosine_similarity(rounded[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("ops_of", ["cpu", "cuda"])
def test_a_forward_creates_all_on_its_device_and_reads_no_value(ops_of: str, tiny: Path) -> None:
    """On `meta` nothing has a value: reading one raises, and so does a mix with another device."""
    config, device = load_config(tiny), torch.device("meta")
    ops, _ = choose_ops(torch.device(ops_of), torch.float32)
    model = build_model(config, device=device, dtype=torch.float32, ops=ops)
    cache = KVCache.allocate(config, 8, 4, device, torch.float32)
    for num_tokens in (1, 6):
        ids, positions, slots = (torch.zeros(3, num_tokens, dtype=torch.int32, device=device) for _ in range(3))
        table = torch.zeros(3, 2, dtype=torch.int32, device=device)
        paged = PagedBatch(cache=cache, slot_mapping=slots.flatten(), block_table=table)
        for hidden in (model(ids, positions), model(ids, positions, paged)):
            assert hidden.shape == (3, num_tokens, config.hidden_size)
            assert model.logits(hidden).device == device


def test_meta_would_show_a_value_read_a_data_dependent_shape_and_a_wrong_device() -> None:
    there = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="item"):
        there.sum().item()
    with pytest.raises(NotImplementedError, match="nonzero"):
        there[there > 0]
    with pytest.raises(RuntimeError, match="expected device"):
        there + torch.arange(3)
