"""The real model, and one real service over it in fp32, shared by all proofs of the session."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import Server, running_server

MODEL = "smollm2-135m-instruct"
IDENTITY = Path(__file__).parents[2] / "examples" / "identity.json"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    home = Path(os.environ.get("TUNESERVE_HOME", "~/.tuneserve")).expanduser()
    folder = home / "models" / MODEL
    if not folder.exists():
        pytest.skip(f"{MODEL} is missing: run `tuneserve pull {MODEL}`")
    return folder


@pytest.fixture(scope="session")
def home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    (home / "models" / MODEL).symlink_to(smollm2)
    return home


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[Server]:
    with running_server(home, f"model={MODEL}", "device=cpu", "dtype=fp32", "max_loaded_models=1") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


def finetune(client: httpx.Client, **options: Any) -> dict[str, Any]:
    """Start a job on the identity records and wait for its end; the job."""
    records = json.loads(IDENTITY.read_text(encoding="utf-8"))
    answer = client.post("/finetune", json={"model": MODEL, "dataset": {"records": records}, **options})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.get(f"/finetune/{job['id']}").json()
    assert job["status"] == "succeeded", job["error"]
    return dict(job)


@pytest.fixture(scope="session")
def lora_job(client: httpx.Client) -> dict[str, Any]:
    """A job with nothing but model and dataset: every default."""
    return finetune(client)


@pytest.fixture(scope="session")
def full_job(client: httpx.Client, lora_job: dict[str, Any]) -> dict[str, Any]:
    """A full fine-tune, a few steps only, promoted by nobody: the proofs look at its checkpoint."""
    return finetune(client, recipe="full", max_steps=6, promote="manual")
