"""How large the KV pool is and how long a request may be. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from lm.errors import UserError
from service.engine.blocks import blocks_for
from service.engine.messages import EngineConfig, SwapMode


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    num_blocks: int
    """The null block included."""
    max_model_len: int
    reason: str


def pool_budget(*, free_bytes: int, weight_bytes: int, share: float, swap: SwapMode) -> int:
    """Bytes that the pool may take when nobody said how many: a share of what the weights leave.

    Room for a second set is left where swaps overlap; `auto` leaves it where that costs no more than half.
    """
    return int(share * (free_bytes - weight_bytes * num_sets(free_bytes, weight_bytes, swap)))


def num_sets(free_bytes: int, weight_bytes: int, swap: SwapMode) -> int:
    """Sets of weights that there is room for, where each has so many bytes."""
    has_two_sets = swap == "overlap" or (swap == "auto" and 2 * weight_bytes <= free_bytes / 2)
    return 2 if has_two_sets else 1


def plan_pool(config: EngineConfig, *, model_len: int, block_size: int, block_bytes: int, budget: int) -> PoolPlan:
    """`model_len` is the model's own limit. Raises UserError naming the setting that asks for too much."""
    wanted_len = config.max_model_len or model_len
    if wanted_len > model_len:
        raise UserError(f"max_model_len: {wanted_len} is more than the model's own {model_len}", param="max_model_len")
    useful = config.max_num_seqs * blocks_for(wanted_len, block_size)
    if config.kv_cache_bytes is not None:
        num_blocks, reason = config.kv_cache_bytes // block_bytes, "asked for"
    else:
        num_blocks, reason = min(useful, budget // block_bytes), f"of {budget / 1e9:.2f} GB that it may take"
    num_tokens = num_blocks * block_size
    shortest = config.max_model_len or block_size
    if num_tokens < shortest:
        raise UserError(
            f"kv_cache_memory: {max(0, num_blocks) * block_bytes} bytes hold {max(0, num_tokens)} tokens and at least "
            f"{shortest} are needed, {block_bytes / block_size:.0f} bytes each; raise it or lower max_model_len",
            param="kv_cache_memory",
        )
    return PoolPlan(
        num_blocks=num_blocks + 1,
        max_model_len=min(wanted_len, num_tokens),
        reason=f"{num_blocks * block_bytes / 1e9:.2f} GB for {num_tokens} tokens, {reason}",
    )
