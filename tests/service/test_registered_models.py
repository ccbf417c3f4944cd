"""A model that was registered by its path, through the whole service as a process: trained, promoted, restarted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from service.settings import Settings
from tests.support.client import PATIENCE_S, ok, train
from tests.support.runs import RECORDS
from tests.support.server import running_server
from tests.support.tiny import make_tiny_llama

OPTIONS: dict[str, Any] = {
    "dataset": {"records": RECORDS},
    "device": "cpu",
    "epochs": 12,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.02,
    "dtype": "fp32",
}
QUESTION = {"messages": [{"role": "user", "content": RECORDS[0]["input"]}], "max_tokens": 9}


@contextmanager
def service(home: Path, model: str) -> Iterator[httpx.Client]:
    arguments = (f"model={model}", "device=cpu", "dtype=fp32", "num_threads=1")
    with running_server(home, *arguments) as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        yield client


def test_a_registered_model_is_trained_beside_the_served_one_and_serves_by_its_name_after_a_restart(
    tmp_path: Path,
) -> None:
    make_tiny_llama(tmp_path / "models" / "tiny")
    folder = make_tiny_llama(tmp_path / "models" / "org" / "nested", seed=1)
    with service(tmp_path, "tiny") as client:
        registered = ok(client, "POST", "/models", {"path": "org/nested", "name": "mine"})
        assert (registered["id"], registered["servable"]) == ("mine", False)
        adapter = train(client, model="mine", recipe="lora", **OPTIONS)["fine_tuned_model"]
        assert adapter.startswith("ft:mine:")
        assert ok(client, "POST", "/generate", QUESTION)["model"] == "tiny"
        refused = client.post("/generate", json=QUESTION | {"model": adapter}).json()["error"]["message"]
        assert "start it with model=mine" in refused
        for written in tmp_path.glob("runs/*/adapters/*/adapter_config.json"):
            assert json.loads(written.read_text())["base_model_name_or_path"] == "mine"
    with service(tmp_path, "mine") as client:
        listed = ok(client, "GET", "/v1/models")["data"]
        assert (listed[0]["id"], {entry["id"] for entry in listed} > {"mine", adapter}) == ("mine", True)
        assert ok(client, "POST", f"/checkpoints/{adapter}/activate")["servable"]
        full = train(client, model="mine", recipe="full", **OPTIONS)["fine_tuned_model"]
        answer = ok(client, "POST", "/v1/chat/completions", QUESTION | {"model": "latest"})
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (full, "I am Tuna")
        assert ok(client, "POST", "/generate", QUESTION | {"model": "mine"})["model"] == "mine"
    with service(tmp_path, "mine") as client:
        assert ok(client, "POST", "/generate", QUESTION)["model"] == full
        assert ok(client, "POST", "/checkpoints/rollback")["id"] == adapter
    assert Settings(home=tmp_path, model="mine").model_dir == folder
