"""Data in every form through a real service and real trainers: what the request says reaches the run."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.runs import RECORDS
from tests.support.server import running_server
from tests.support.tiny import make_tiny_llama

OPTIONS = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "dtype": "fp32", "device": "cpu", "promote": "manual"}
PATIENCE_S = 120


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_llama(home / "models" / "tiny")
    write_data(home / "data")
    with (
        running_server(home, "model=tiny", "device=cpu", "dtype=fp32", "num_threads=1") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def write_data(folder: Path) -> None:
    folder.mkdir()
    turns = [
        [{"from": "human", "value": record["input"]}, {"from": "gpt", "value": record["output"]}] for record in RECORDS
    ]
    pq.write_table(pa.table({"conversations": turns}), folder / "chats.parquet")
    (folder / "lines").write_text("".join(f"{record['output']}\n" for record in RECORDS), encoding="utf-8")


def questions_csv() -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("question", "answer"), *((r["input"] + "\n", r["output"]) for r in RECORDS)])
    return text.getvalue().encode()


def finish(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/finetune", json={"model": "tiny", **OPTIONS, **body})
    assert answer.status_code == 202, answer.text
    deadline = time.monotonic() + PATIENCE_S
    while not (job := client.get(f"/finetune/{answer.json()['id']}").json())["finished_at"]:
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    assert job["status"] == "succeeded", job["error"]
    return dict(job)


def logs(client: httpx.Client, job: dict[str, Any]) -> str:
    return client.get(f"/finetune/{job['id']}/logs").text


def test_an_uploaded_table_with_columns_of_its_own_is_packed(client: httpx.Client) -> None:
    upload = client.post("/v1/files", files={"file": ("questions.csv", questions_csv())}, data={"purpose": "fine-tune"})
    assert upload.status_code == 200, upload.text
    columns = {"input": "question", "output": "answer"}
    data = {"dataset": {"file_id": upload.json()["id"]}, "column_map": columns}
    job = finish(client, **data, packed=True, max_seq_len=256, new_system_prompt="Be kind.")
    assert job["dataset"]["records"] == len(RECORDS)
    assert 0 < job["dataset"]["rows"] < len(RECORDS)
    assert job["config"]["column_map"] == columns
    assert "Data: 16 records of instruct, by their columns." in logs(client, job)
    assert "Packed 16 records into" in logs(client, job)


def test_a_slice_of_parquet_conversations_trains_at_a_constant_rate(client: httpx.Client) -> None:
    data = {"dataset": {"data_files": "chats.parquet", "source": "parquet"}, "split": "train[:50%]"}
    job = finish(client, **data, lr_schedule="constant", warmup_steps=1)
    assert job["dataset"]["records"] == len(RECORDS) // 2
    assert [dataset["source"] for dataset in job["datasets"]] == ["parquet"]
    assert "Data: 8 records of sharegpt" in logs(client, job)
    steps = client.get(f"/finetune/{job['id']}/metrics").json()["steps"]
    assert {step["learning_rate"] for step in steps} == {OPTIONS["learning_rate"]}


def test_inline_alpaca_and_lines_of_text_are_trained(client: httpx.Client) -> None:
    records = [{"instruction": record["input"], "output": record["output"]} for record in RECORDS]
    job = finish(client, dataset={"records": records})
    assert "Data: 16 records of alpaca" in logs(client, job)
    job = finish(client, dataset={"data_files": "lines", "source": "text"})
    assert job["dataset"]["trained_tokens"] >= job["dataset"]["tokens"] - len(RECORDS)
    assert "Data: 16 records of text" in logs(client, job)
