"""/v1/files as the openai SDK uses it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.jobs.job import Job
from tests.support.api import BASE, Api, running_api
from trainer.config import TrainingOptions
from trainer.data.records import read_records

GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
EVALS = {"purpose": "evals"}
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
ResultT = TypeVar("ResultT")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, max_upload_size=10_000) as api:
        yield api


@pytest.fixture
def client(api: Api) -> openai.AsyncOpenAI:
    http_client: Any = api.async_client
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http_client, max_retries=0)


def upload(api: Api, client: openai.AsyncOpenAI, data: bytes = GOOD, name: str = "train.jsonl", **options: Any) -> Any:
    return api.run(client.files.create(file=(name, data), **({"purpose": "fine-tune"} | options)))


def waiting_job(api: Api, file_id: str) -> Job:
    """Stored only: no trainer starts."""
    return api.services.store.create(
        status="queued",
        model=BASE,
        options=TrainingOptions(),
        data_files=[f"files/{file_id}"],
        suffix="",
        promote="final",
        file_id=file_id,
    )


def test_a_file_goes_in_and_comes_out_through_the_sdk(api: Api, client: openai.AsyncOpenAI) -> None:
    stored = upload(api, client, GOOD * 2)
    assert (stored.object, stored.status, stored.bytes) == ("file", "processed", 2 * len(GOOD))
    assert (stored.filename, stored.purpose) == ("train.jsonl", "fine-tune")
    assert api.run(client.files.retrieve(stored.id)) == stored
    assert api.run(client.files.content(stored.id)).content == GOOD * 2
    assert api.run(client.files.wait_for_processing(stored.id)).status == "processed"
    deleted = api.run(client.files.delete(stored.id))
    assert (deleted.id, deleted.object, deleted.deleted) == (stored.id, "file", True)
    with pytest.raises(openai.NotFoundError):
        api.run(client.files.retrieve(stored.id))


def test_lists_have_pages_an_order_and_a_purpose(api: Api, client: openai.AsyncOpenAI) -> None:
    async def ids(**options: Any) -> list[str]:
        return [file.id async for file in client.files.list(**options)]

    stored = [upload(api, client, purpose=purpose).id for purpose in ("fine-tune", "evals", "fine-tune")]
    assert api.run(ids(limit=2)) == stored[::-1]
    assert api.run(ids(limit=1, order="asc")) == stored
    assert api.run(ids(purpose="evals")) == [stored[1]]
    page = api.get("/v1/files?limit=2").json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (stored[2], stored[1], True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD + b'{"messages": \n', "line 2"),
        (GOOD + GOOD + b'{"prompt": "a"}', "record 3"),
        (b"", "no records"),
        (b'{"input": "\xff", "output": "b"}', "UTF-8"),
    ],
)
def test_bad_training_data_is_refused_and_not_kept(
    api: Api, client: openai.AsyncOpenAI, data: bytes, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        upload(api, client, data)
    assert words in error.value.message
    assert error.value.param == "file"
    assert api.get("/v1/files").json()["data"] == []
    assert list(api.services.files.folder.iterdir()) == []


def parquet(*rows: dict[str, str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "ending"),
    [
        ("My data.CSV", b'input,output\n"a\nb",c\n', ".csv"),
        ("train.parquet", parquet({"input": "a\nb", "output": "c"}), ".parquet"),
        ("train.bin", parquet({"input": "a\nb", "output": "c"}), ""),
        ("train", b'output,input\nc,"a\nb"\n', ""),
    ],
)
def test_csv_and_parquet_are_kept_so_that_a_trainer_reads_them(
    api: Api, client: openai.AsyncOpenAI, name: str, data: bytes, ending: str
) -> None:
    stored = upload(api, client, data, name)
    assert api.run(client.files.content(stored.id)).content == data
    (path,) = api.services.files.folder.iterdir()
    assert path.name == stored.id + ending
    (record,) = read_records(path)
    assert [message["content"] for message in record.messages] == ["a\nb", "c"]
    api.run(client.files.delete(stored.id))
    assert list(api.services.files.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"input,output\na,b\nc\n", "a.csv, record 2 (line 3): 1 fields"),
        ("a.csv", b'input,output\na,"b\n', "record 1 (line 2): broken CSV"),
        ("a.csv", b"question,answer\na,b\nc\n", "record 2 (line 3): 1 fields"),
        ("a.parquet", parquet({"input": "a"}), "record 1 (row 1): a record needs the columns"),
        ("a.parquet", b"PAR1PAR1", "row 1: cannot be read as Parquet"),
        ("a.txt", b" \n", "no records"),
    ],
)
def test_bad_tables_are_refused_with_the_place(
    api: Api, client: openai.AsyncOpenAI, name: str, data: bytes, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        upload(api, client, data, name)
    assert words in error.value.message
    assert list(api.services.files.folder.iterdir()) == []


def test_the_columns_of_a_table_are_checked_by_the_job_that_can_map_them(api: Api, client: openai.AsyncOpenAI) -> None:
    stored = upload(api, client, b"question,answer\na,b\n", "a.csv")
    body = {"model": BASE, "dataset": {"file_id": stored.id}, "column_map": {"input": "question"}}
    for options in (body, {**body, "column_map": None}):
        refusal = api.post("/finetune", options)
        assert refusal.status_code == 400
        error = refusal.json()["error"]
        assert error["param"] == "dataset.file_id"
        assert "a.csv, record 1 (line 2)" in error["message"]
        assert 'is missing, found "question", "answer"' in error["message"]


def test_what_a_form_lacks_or_has_too_much_is_named(api: Api, client: openai.AsyncOpenAI) -> None:
    for body, param in (
        ({"files": {"file": ("a", GOOD)}}, "purpose"),
        ({"files": {"file": ("a", GOOD)}, "data": {"purpose": "fun"}}, "purpose"),
        ({"data": {"purpose": "fine-tune"}}, "file"),
        ({"files": {"file": ("a", GOOD)}, "data": {"purpose": "fine-tune", "name": "x"}}, "name"),
        ({"files": {"file": ("a", GOOD)}, "data": {"purpose": "fine-tune-results"}}, "purpose"),
        ({"files": {"file": ("a", GOOD)}, "data": EVALS | {SECONDS: "3600"}}, "expires_after"),
        ({"files": {"file": ("a", GOOD)}, "data": EVALS | {SECONDS: "3599", ANCHOR: "created_at"}}, SECONDS),
        ({"files": {"file": ("a", GOOD)}, "data": EVALS | {SECONDS: "3600", ANCHOR: "now"}}, ANCHOR),
    ):
        answer = api.post("/v1/files", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert api.get("/v1/files").json()["data"] == []


def test_a_file_that_is_too_large_is_refused(api: Api, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        upload(api, client, GOOD * 200)
    assert error.value.status_code == 413
    assert not api.services.files.folder.exists()


def test_a_strange_file_name_comes_back_and_harms_nothing(api: Api, client: openai.AsyncOpenAI) -> None:
    name = '../訓練 "x".jsonl'
    stored = upload(api, client, name=name)
    assert api.run(client.files.content(stored.id)).content == GOOD
    assert sorted(path.name for path in api.services.files.folder.iterdir()) == [stored.id]


def test_a_file_stays_while_a_job_needs_it(api: Api, client: openai.AsyncOpenAI) -> None:
    stored = upload(api, client)
    job = in_loop(api, lambda: waiting_job(api, stored.id))
    with pytest.raises(openai.ConflictError, match=job.id) as error:
        api.run(client.files.delete(stored.id))
    assert error.value.response.headers["x-should-retry"] == "false"
    in_loop(api, lambda: api.services.store.record(job.id, status="cancelled"))
    assert api.run(client.files.delete(stored.id)).deleted


def test_a_file_expires_when_it_was_told_to(api: Api, client: openai.AsyncOpenAI) -> None:
    stays = upload(api, client)
    stored = upload(api, client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (stays.expires_at, stored.expires_at) == (None, stored.created_at + 3600)
    files = api.services.files
    in_loop(
        api, lambda: files.database.connection.execute("UPDATE files SET expires_at = 1 WHERE id = ?", (stored.id,))
    )
    with pytest.raises(openai.NotFoundError):
        api.run(client.files.retrieve(stored.id))
    assert [file["id"] for file in api.get("/v1/files").json()["data"]] == [stays.id]
    job = in_loop(api, lambda: waiting_job(api, stored.id))
    in_loop(api, files.remove_expired)
    assert len([*files.folder.iterdir()]) == 2  # the job still reads it
    in_loop(api, lambda: api.services.store.record(job.id, status="cancelled"))
    in_loop(api, files.remove_expired)
    assert [path.name for path in files.folder.iterdir()] == [stays.id]


def in_loop(api: Api, work: Callable[[], ResultT]) -> ResultT:
    """The database belongs to the thread of the event loop."""

    async def call() -> ResultT:
        return work()

    return api.run(call())
