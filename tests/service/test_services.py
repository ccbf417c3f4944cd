from __future__ import annotations

from pathlib import Path

import msgspec

from tests.support.api import running_api


def test_the_engine_is_configured_as_the_settings_say(tmp_path: Path) -> None:
    asked = {"max_num_seqs": 3, "max_model_len": 64, "max_num_batched_tokens": 77, "num_threads": 2, "seed": 5}
    chosen = {"device": "cpu", "dtype": "bf16", "swap": "drain"}
    sharing = {"serving_while_training": "share", "training_memory_share": 0.25}
    with running_api(tmp_path, **asked, **chosen, **sharing, kv_cache_memory="2GiB") as api:
        config = msgspec.structs.asdict(api.engine.config)
        base_dir = str(api.services.settings.model_dir)
    assert config == {**asked, **chosen, "kv_cache_bytes": 2 << 30, "memory_fraction": 0.75, "base_dir": base_dir}
