"""Forwards over the block cache against one forward over the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from lm.config import load_config
from lm.model import CausalLM
from lm.ops import REFERENCE
from tests.support.tiny import VOCAB_SIZE, load_tiny_model, make_tiny_llama, make_tiny_model

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS = 4, 40


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of a sequence that owns `blocks`."""

    ids: Tensor
    start: int
    end: int
    blocks: Sequence[int]


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen3": {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """With no window, one window for all layers, and one for the upper layer."""
    return load_tiny_model(make_tiny_model(tmp_path_factory.mktemp("tiny"), request.param, **MODELS[request.param]))


def new_cache(model: CausalLM) -> KVCache:
    return KVCache.allocate(model.config, NUM_BLOCKS, BLOCK_SIZE, CPU, torch.float32)


def random_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def whole(model: CausalLM, ids: Tensor) -> Tensor:
    """Logits (T, V) without a cache."""
    return model.logits(model(ids[None], torch.arange(len(ids))[None]))[0]


@torch.inference_mode()
def paged_hidden(model: CausalLM, cache: KVCache, chunks: Sequence[Chunk], padding: tuple[int, int, int]) -> Tensor:
    """One forward over `chunks`, padded by so many rows, tokens and blocks. Returns (B, T, W), padding included."""
    rows = len(chunks) + padding[0]
    tokens = max(chunk.end - chunk.start for chunk in chunks) + padding[1]
    blocks = max(len(chunk.blocks) for chunk in chunks) + padding[2]
    ids, positions, slots = (torch.zeros(rows, tokens, dtype=torch.int32) for _ in range(3))
    table = torch.zeros(rows, blocks, dtype=torch.int32)
    for row, chunk in enumerate(chunks):
        count = chunk.end - chunk.start
        position = torch.arange(chunk.start, chunk.end)
        ids[row, :count] = chunk.ids[chunk.start : chunk.end]
        positions[row, :count] = position
        slots[row, :count] = torch.tensor(chunk.blocks)[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        table[row, : len(chunk.blocks)] = torch.tensor(chunk.blocks)
    paged = PagedBatch(cache=cache, slot_mapping=slots.flatten(), block_table=table)
    hidden: Tensor = model(ids, positions, paged)
    assert hidden.isfinite().all()
    return hidden


@torch.inference_mode()
def paged_logits(
    model: CausalLM, cache: KVCache, chunks: Sequence[Chunk], padding: tuple[int, int, int] = (0, 0, 0)
) -> list[Tensor]:
    """Logits (T, V) of each chunk."""
    hidden = paged_hidden(model, cache, chunks, padding)
    return [model.logits(row[: chunk.end - chunk.start]) for row, chunk in zip(hidden, chunks, strict=False)]


def blocks_of(row: int, length: int) -> list[int]:
    """Blocks that belong to one row only, not in order."""
    count = -(-length // BLOCK_SIZE)
    return [NUM_BLOCKS - 1 - row - 3 * index for index in range(count)]


cuts = st.lists(st.integers(1, 30), max_size=5)
paddings = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4))


@given(length=st.integers(1, 32), cuts=cuts, padding=paddings)
@settings(max_examples=100, deadline=None)
def test_chunks_of_any_size_and_padding_equal_the_whole(
    model: CausalLM, length: int, cuts: list[int], padding: tuple[int, int, int]
) -> None:
    """Chunks of one token are decoding steps."""
    ids, cache = random_ids(length), new_cache(model)
    edges = sorted({0, length} | {cut for cut in cuts if cut < length})
    chunks = [Chunk(ids, start, end, blocks_of(0, end)) for start, end in pairwise(edges)]
    logits = torch.cat([paged_logits(model, cache, [chunk], padding)[0] for chunk in chunks])
    torch.testing.assert_close(logits, whole(model, ids), rtol=0, atol=2e-5)


@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3), padding=paddings)
@settings(max_examples=50, deadline=None)
def test_rows_decoded_together_equal_each_alone(
    model: CausalLM, lengths: list[int], padding: tuple[int, int, int]
) -> None:
    cache = new_cache(model)
    sequences = [random_ids(length + 1, seed) for seed, length in enumerate(lengths)]
    blocks = [blocks_of(row, length + 1) for row, length in enumerate(lengths)]
    paged_hidden(model, cache, [Chunk(*row) for row in zip(sequences, [0] * 3, lengths, blocks, strict=False)], padding)
    ends = [length + 1 for length in lengths]
    steps = [Chunk(*row) for row in zip(sequences, lengths, ends, blocks, strict=True)]
    for logits, ids in zip(paged_logits(model, cache, steps, padding), sequences, strict=True):
        torch.testing.assert_close(logits[-1], whole(model, ids)[-1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_forward_writes_its_own_slots_and_the_null_slot_only(model: CausalLM, num_tokens: int) -> None:
    cache = new_cache(model)
    for stored in (*cache.keys, *cache.values):
        stored.normal_()
    before = [stored.clone() for stored in (*cache.keys, *cache.values)]
    paged_hidden(model, cache, [Chunk(random_ids(20), 5, 5 + num_tokens, blocks_of(0, 20))], (3, 2, 1))
    written = {0} | {blocks_of(0, 20)[position // 4] * 4 + position % 4 for position in range(5, 5 + num_tokens)}
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        changed = (old != new).flatten(0, 1).any(-1).any(-1).nonzero().flatten()
        assert set(changed.tolist()) == written


def test_what_other_rows_hold_does_not_reach_a_row(model: CausalLM) -> None:
    ids = random_ids(20)
    clean, dirty = new_cache(model), new_cache(model)
    for stored in (*dirty.keys, *dirty.values):
        stored.normal_(std=1e4)
    chunk = Chunk(ids, 0, 20, blocks_of(0, 20))
    ours, theirs = (paged_logits(model, cache, [chunk], (1, 0, 3))[0] for cache in (clean, dirty))
    assert torch.equal(ours, theirs)


def test_a_pure_bf16_model_decodes_from_a_bf16_cache(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path)
    model, ids = load_tiny_model(folder, dtype=torch.bfloat16), random_ids(24)
    cache = KVCache.allocate(model.config, NUM_BLOCKS, BLOCK_SIZE, CPU, torch.bfloat16)
    edges = [0, 16, *range(17, 25)]
    chunks = [Chunk(ids, start, end, blocks_of(0, end)) for start, end in pairwise(edges)]
    logits = torch.cat([paged_logits(model, cache, [chunk], (1, 0, 1))[0] for chunk in chunks])
    exact = whole(load_tiny_model(folder), ids)
    rounding = (whole(model, ids).float() - exact).abs().mean()
    assert (logits.float() - exact).abs().mean() < 1.2 * rounding


def test_the_reference_ops_decode_to_the_same_logits(tmp_path: Path) -> None:
    model, ids = load_tiny_model(make_tiny_llama(tmp_path), ops=REFERENCE), random_ids(12)
    cache = new_cache(model)
    chunks = [Chunk(ids, 0, 11, blocks_of(0, 11)), Chunk(ids, 11, 12, blocks_of(0, 12))]
    logits = torch.cat([paged_logits(model, cache, [chunk], (1, 1, 1))[0] for chunk in chunks])
    torch.testing.assert_close(logits, whole(model, ids), rtol=0, atol=2e-5)


def test_the_cache_takes_the_memory_that_the_config_says(tmp_path: Path) -> None:
    config = load_config(make_tiny_llama(tmp_path))
    cache = KVCache.allocate(config, 10, 16, CPU, torch.bfloat16)
    assert cache.nbytes == 10 * 16 * config.kv_bytes_per_token(2)
    assert cache.keys[0].shape == (10, 16, config.num_key_value_heads, config.head_dim)
    assert not any(stored.any() for stored in (*cache.keys, *cache.values))
