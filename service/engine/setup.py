"""What an engine is made of, chosen once from its config and the machine, and said with reasons in its log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from lm.cache import KVCache
from lm.config import load_config
from lm.device import (
    DeviceChoice,
    DtypeChoice,
    MemoryFigures,
    choose_dtype,
    limit_memory,
    memory_figures,
    peak_bandwidth,
    resolve_device,
)
from lm.errors import UserError
from lm.ops import choose_ops
from service.engine.blocks import BlockPool
from service.engine.core import Engine, Parts
from service.engine.grammar import GrammarCompiler
from service.engine.loader import Target
from service.engine.messages import EngineConfig, EngineReady
from service.engine.pool import PoolPlan, num_sets, plan_pool, pool_budget
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from service.engine.weights import WeightStore

logger = logging.getLogger(__name__)

BLOCK_SIZE = 128
"""What the fused attention of NPUs takes in every form."""
HOST_BLOCK_SIZE = 32
"""Less padding to read; a processor gains nothing from larger blocks."""
MEMORY_SHARE = 0.9
HOST_MEMORY_SHARE = 0.25
"""A machine's memory is also for training, and for files."""


def build_engine(config: EngineConfig, *, wake: Callable[[], None] = lambda: None) -> Engine:
    """An engine without weights. `wake` is called from another thread when `step` has something to do.

    Raises UserError for what the config asks and the machine does not have.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    if config.memory_fraction is not None:
        limit_memory(device.device, config.memory_fraction)
    dtype = choose_dtype(config.dtype, device.device)
    ops, variants = choose_ops(device.device, dtype.dtype)
    target = Target(config=load_config(Path(config.base_dir)), device=device.device, dtype=dtype.dtype, ops=ops)
    block_size = HOST_BLOCK_SIZE if device.device.type == "cpu" else BLOCK_SIZE
    figures = memory_figures(device.device)
    plan = _plan_pool(config, target, block_size, free_bytes := _free_bytes(config, target, figures))
    cache = _allocate(target, plan, block_size)
    limits = {"max_num_seqs": config.max_num_seqs, "max_num_batched_tokens": config.max_num_batched_tokens}
    parts = Parts(
        ready=msgspec.structs.replace(
            _describe(config, device, dtype, variants, plan, block_size),
            memory_total=figures.total,
            memory_needed=_needed_bytes(config, target, plan, block_size, free_bytes),
        ),
        scheduler=Scheduler(BlockPool(plan.num_blocks), block_size=block_size, **limits),
        runner=Runner(
            cache,
            device.device,
            max_model_len=plan.max_model_len,
            vocab_size=target.config.vocab_size,
            **limits,
        ),
        weights=WeightStore(target, swap=config.swap, wake=wake),
        target=target,
        compile_grammar=GrammarCompiler(Path(config.base_dir), target.config.vocab_size).compile,
        wake=wake,
        used_memory=lambda: memory_figures(device.device).allocated,
        seed=config.seed,
    )
    return Engine(parts)


def _free_bytes(config: EngineConfig, target: Target, figures: MemoryFigures) -> int:
    """What the engine may take of the device, before it has taken anything."""
    if config.memory_fraction is None or target.device.type == "cpu":
        return figures.free
    return min(figures.free, int(config.memory_fraction * figures.total))


def _needed_bytes(config: EngineConfig, target: Target, plan: PoolPlan, block_size: int, free_bytes: int) -> int:
    pool = plan.num_blocks * block_size * target.kv_token_bytes
    return pool + target.num_bytes * num_sets(free_bytes, target.num_bytes, config.swap)


def _plan_pool(config: EngineConfig, target: Target, block_size: int, free_bytes: int) -> PoolPlan:
    budget = pool_budget(
        free_bytes=free_bytes,
        weight_bytes=target.num_bytes,
        share=HOST_MEMORY_SHARE if target.device.type == "cpu" else MEMORY_SHARE,
        swap=config.swap,
    )
    return plan_pool(
        config,
        model_len=target.config.max_position_embeddings,
        block_size=block_size,
        block_bytes=block_size * target.kv_token_bytes,
        budget=budget,
    )


def _allocate(target: Target, plan: PoolPlan, block_size: int) -> KVCache:
    try:
        return KVCache.allocate(target.config, plan.num_blocks, block_size, target.device, target.dtype)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"kv_cache_memory: {plan.reason}: {error}; lower it", param="kv_cache_memory") from error


def _describe(
    config: EngineConfig,
    device: DeviceChoice,
    dtype: DtypeChoice,
    variants: dict[str, str],
    plan: PoolPlan,
    block_size: int,
) -> EngineReady:
    bandwidth, source = peak_bandwidth(device.device)
    logger.info("device %s, %s (%s)", device.device, device.name, device.reason)
    logger.info("dtype %s (%s)", dtype.name, dtype.reason)
    for op, variant in variants.items():
        logger.info("op %s: %s", op, variant)
    logger.info("KV pool %s; requests up to %d tokens", plan.reason, plan.max_model_len)
    logger.info("peak bandwidth %.1f GB/s (%s)", bandwidth / 1e9, source)
    return EngineReady(
        device=str(device.device),
        device_name=device.name,
        device_reason=device.reason,
        dtype=dtype.name,
        dtype_reason=dtype.reason,
        ops=variants,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        block_size=block_size,
        num_blocks=plan.num_blocks,
        peak_bandwidth=bandwidth,
        peak_bandwidth_source=source,
        torch_version=str(torch.__version__),
    )
