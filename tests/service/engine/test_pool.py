from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from service.engine.messages import SwapMode
from service.engine.pool import PoolPlan, plan_pool, pool_budget
from tests.support.engines import tiny_engine_config

GB = 10**9


def plan(budget: int = 10 * GB, **fields: Any) -> PoolPlan:
    config = tiny_engine_config(Path("anywhere"), **fields)
    return plan_pool(config, model_len=1000, block_size=10, block_bytes=500, budget=budget)


def test_the_pool_is_no_larger_than_all_requests_together_can_use() -> None:
    assert plan(max_num_seqs=4).num_blocks == 4 * 100 + 1
    assert plan(max_num_seqs=4, max_model_len=55).num_blocks == 4 * 6 + 1


def test_a_small_pool_shortens_the_requests_instead_of_failing_them_later() -> None:
    assert plan(budget=30 * 500).max_model_len == 300
    assert plan(kv_cache_bytes=30 * 500).max_model_len == 300
    assert plan(kv_cache_bytes=30 * 500).num_blocks == 31


def test_the_models_own_limit_holds() -> None:
    assert plan().max_model_len == 1000
    assert plan(max_model_len=999).max_model_len == 999
    with pytest.raises(UserError, match="max_model_len: 1001 is more than the model's own 1000"):
        plan(max_model_len=1001)


@pytest.mark.parametrize("fields", [{"kv_cache_bytes": 499}, {"kv_cache_bytes": 9 * 500, "max_model_len": 100}])
def test_a_pool_that_holds_no_request_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"kv_cache_memory: \d+ bytes hold \d+ tokens") as caught:
        plan(**fields)
    assert caught.value.param == "kv_cache_memory"


def test_a_machine_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="kv_cache_memory: 0 bytes hold 0 tokens"):
        plan(budget=-5 * GB)


@pytest.mark.parametrize(
    ("swap", "weights", "left"),
    [("auto", 2, 16), ("auto", 8, 12), ("overlap", 8, 4), ("drain", 2, 18)],
)
def test_room_is_left_for_a_second_set_where_it_costs_little(swap: SwapMode, weights: int, left: int) -> None:
    budget = pool_budget(free_bytes=20 * GB, weight_bytes=weights * GB, share=0.5, swap=swap)
    assert budget == left * GB // 2
