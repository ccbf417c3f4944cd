from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lm.device import memory_figures
from lm.errors import UserError
from service.engine.setup import build_engine
from tests.support.engines import Driver, tiny_engine_config


def test_a_pool_in_host_memory_takes_memory_only_as_it_is_used(tiny: Path) -> None:
    Driver(tiny_engine_config(tiny))  # takes what the first engine of a process takes
    before = memory_figures(torch.device("cpu")).allocated
    driver = Driver(tiny_engine_config(tiny, kv_cache_bytes=1 << 30))
    driver.load(tiny)
    driver.generate([3] * 50)
    ready = driver.engine.ready
    assert ready.num_blocks * ready.block_size * 2 * 2 * 2 * 8 * 4 >= 1 << 30
    assert memory_figures(torch.device("cpu")).allocated - before < 1 << 28


def test_what_was_chosen_is_told(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        ready = build_engine(tiny_engine_config(tiny, max_num_seqs=4)).ready
    assert (ready.device, ready.dtype, ready.max_model_len, ready.max_num_seqs) == ("cpu", "fp32", 256, 4)
    assert (ready.device_reason, ready.dtype_reason) == ("asked for", "asked for")
    assert ready.peak_bandwidth > 0
    for word in ("device cpu", "dtype fp32", "op rms_norm", "KV pool", "peak bandwidth"):
        assert word in caplog.text


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        build_engine(tiny_engine_config(tmp_path))


def test_a_pool_beyond_the_machine_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"kv_cache_memory: 1152921504.61 GB .*; lower it"):
        build_engine(tiny_engine_config(tiny, kv_cache_bytes=1 << 60))
