"""/v1/fine_tuning/jobs as the openai SDK calls it, without trainers: what is taken, refused, and told about jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from service.jobs.job import Job, JobError, Progress
from service.schemas.fine_tuning import FineTuningRequest
from tests.support.api import BASE, Api, running_api
from trainer.config import TrainingOptions
from trainer.option_groups import DatasetConfig
from trainer.strict import parse_options

CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
JOBS = "/v1/fine_tuning/jobs"
STEP = {
    "type": "step",
    "time": 100.0,
    "step": 1,
    "total_steps": 4,
    "epoch": 1,
    "loss": 1.5,
    "token_accuracy": 0.25,
    "trained_tokens": 7,
}
ResultT = TypeVar("ResultT")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as api:
        yield api


@pytest.fixture
def client(api: Api) -> openai.AsyncOpenAI:
    http_client: Any = api.async_client
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http_client, max_retries=0)


def in_loop(api: Api, work: Callable[[], ResultT]) -> ResultT:
    """The database belongs to the thread of the event loop."""

    async def call() -> ResultT:
        return work()

    return api.run(call())


def stored(api: Api, **columns: Any) -> Job:
    """A job that no trainer is started for, since it is paused."""
    given: dict[str, Any] = {
        "status": "queued",
        "paused": True,
        "model": BASE,
        "options": TrainingOptions(),
        "data_files": ["data/a.jsonl"],
        "suffix": "",
        "promote": "final",
    }
    return in_loop(api, lambda: api.services.store.create(**(given | columns)))


def record(api: Api, job: Job, *events: dict[str, Any], **columns: Any) -> None:
    in_loop(api, lambda: api.services.store.record(job.id, events, **columns))


def upload(api: Api, client: openai.AsyncOpenAI, data: bytes = CHAT) -> str:
    return api.run(client.files.create(file=("train.jsonl", data), purpose="fine-tune")).id


def request(**fields: Any) -> FineTuningRequest:
    return parse_options(FineTuningRequest, {"model": BASE, "training_file": "file-1", **fields})


def options(**fields: Any) -> TrainingOptions:
    return request(**fields).options(seed=7)


# ---- what a request means


def test_auto_is_what_is_usual_here() -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    usual = TrainingOptions(seed=7)
    assert options() == options(hyperparameters=auto) == options(method={"type": "supervised"}) == usual
    assert options(method={"type": "supervised", "supervised": {"hyperparameters": auto}}) == usual
    assert options(method=None, seed=None, suffix=None, integrations=None, metadata=None) == usual
    usual_dpo = TrainingOptions(recipe="dpo", data_format="preference", seed=7)
    assert options(method={"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto", **auto}}}) == usual_dpo


def test_hyperparameters_become_options() -> None:
    numbers = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 2}
    for way in ({"hyperparameters": numbers}, {"method": supervised(numbers)}):
        chosen = options(**way, seed=3)
        assert (chosen.epochs, chosen.batch_size, chosen.seed, chosen.recipe) == (2, 8, 3, "lora")
        assert chosen.peak_learning_rate == pytest.approx(1e-3)
    dpo = options(method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5, "learning_rate_multiplier": 0.1}}})
    assert (dpo.recipe, dpo.dpo.beta) == ("dpo", 0.5)
    assert dpo.peak_learning_rate == pytest.approx(5e-6)


def supervised(numbers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": numbers}}


def test_the_integration_with_wandb_is_the_tracking_of_the_run() -> None:
    wandb = {"project": "p", "entity": None, "name": "n", "tags": ["a"]}
    tracking = options(integrations=[{"type": "wandb", "wandb": wandb}]).tracking
    assert tracking.wandb is not None
    assert (tracking.wandb.project, tracking.wandb.name, tracking.wandb.tags) == ("p", "n", ("a",))


def test_a_suffix_is_brought_into_the_form_of_a_name() -> None:
    assert request(suffix="my bot: v1!").suffix == "my-bot-v1"
    assert request(suffix="a.b_c-d").suffix == "a.b_c-d"


# ---- refusals


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"training_file": "file-none"}, "training_file", "there is no file 'file-none'"),
        ({"validation_file": "file-none"}, "validation_file", "there is no file"),
        ({"model": "gpt-4o-mini"}, "model", "there is no base model 'gpt-4o-mini'"),
        ({"model": "ft:none"}, "model", "there is no model"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater than or equal to 1 (got 0)"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "valid integer"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size", "less than or equal to 256"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier", "greater"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", "unknown field"),
        ({"method": {"type": "reinforcement"}}, "method.type", "'supervised' or 'dpo'"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "belongs to another type"),
        ({"method": {"type": "dpo"}, "hyperparameters": {}}, None, "put them into method"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"suffix": "x" * 65}, "suffix", "at most 64"),
        ({"suffix": "!!"}, "suffix", "a letter or a digit"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "512"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations.0.wandb.project", "required"),
        ({"n_epochs": 3}, "n_epochs", "unknown field"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_words(
    api: Api, client: openai.AsyncOpenAI, change: dict[str, Any], param: str | None, words: str
) -> None:
    body = {"model": BASE, "training_file": upload(api, client)} | change
    answer = api.post(JOBS, body)
    error = answer.json()["error"]
    assert (answer.status_code in (400, 404), error["param"]) == (True, param)
    assert words in error["message"]
    assert api.get(JOBS).json()["data"] == []


def test_a_file_of_another_kind_or_purpose_is_refused_with_the_place(api: Api, client: openai.AsyncOpenAI) -> None:
    chat = upload(api, client)
    dpo: Any = {"type": "dpo"}
    with pytest.raises(openai.BadRequestError, match=r"training_file: train\.jsonl, record 1 \(line 1\)") as error:
        api.run(client.fine_tuning.jobs.create(model=BASE, training_file=chat, method=dpo))
    assert error.value.param == "training_file"
    other = api.run(client.files.create(file=("a", b"x"), purpose="evals")).id
    with pytest.raises(openai.BadRequestError, match="purpose evals, not fine-tune") as error:
        api.run(client.fine_tuning.jobs.create(model=BASE, training_file=chat, validation_file=other))
    assert error.value.param == "validation_file"


def test_unknown_jobs_events_and_checkpoints_are_not_found(api: Api) -> None:
    for call in (api.get, api.post):
        assert call(f"{JOBS}/ftjob-x/{'cancel' if call == api.post else 'events'}").status_code == 404
    job, other = stored(api), stored(api)
    for after in ("ftevent-1", f"ftevent-{job.id[6:]}-x", f"ftevent-{other.id[6:]}-1"):
        answer = api.get(f"{JOBS}/{job.id}/events", params={"after": after})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "after")
    assert api.get(f"{JOBS}/{job.id}/checkpoints?after=ftckpt_x_1").status_code == 404
    assert api.get(f"{JOBS}?limit=0").status_code == 400


# ---- what is told


def test_a_job_is_told_in_openais_words(api: Api, client: openai.AsyncOpenAI) -> None:
    chosen = options(hyperparameters={"learning_rate_multiplier": 0.1, "batch_size": 2}, seed=5)
    job = stored(
        api, options=chosen, file_id="file-1", validation_file_id="file-2", metadata={"team": "a"}, start_from="ft:x"
    )
    told = api.run(client.fine_tuning.jobs.retrieve(job.id))
    assert isinstance(told, FineTuningJob)
    assert (told.object, told.status, told.model, told.seed) == ("fine_tuning.job", "queued", "ft:x", 5)
    assert (told.training_file, told.validation_file, told.metadata) == ("file-1", "file-2", {"team": "a"})
    assert (told.error, told.fine_tuned_model, told.finished_at, told.trained_tokens) == (None, None, None, None)
    assert (told.result_files, told.organization_id) == ([], "tuneserve")
    numbers = {"n_epochs": "auto", "batch_size": 2, "learning_rate_multiplier": 0.1}
    assert told.hyperparameters.to_dict() == numbers
    assert told.method is not None
    assert told.method.to_dict() == supervised(numbers)


def test_the_figures_of_a_running_job_are_told_while_it_runs_and_its_tokens_at_the_end(
    api: Api, client: openai.AsyncOpenAI
) -> None:
    job = stored(api, options=options(method={"type": "dpo"}))
    second = STEP | {"step": 2, "time": 110.0, "trained_tokens": 20}
    progress = Progress(started={"epochs": 3}, first_step=STEP, step=second)
    record(api, job, status="running", paused=False, progress=progress)
    told = api.run(client.fine_tuning.jobs.retrieve(job.id))
    assert (told.estimated_finish, told.trained_tokens, told.hyperparameters.n_epochs) == (130, None, 3)
    assert told.method is not None
    assert told.method.type == "dpo"
    assert told.method.dpo is not None
    assert told.method.dpo.hyperparameters is not None
    assert told.method.dpo.hyperparameters.beta == 0.1
    mistake = JobError(
        code="invalid_training_file", message="dataset.data_files: a, record 2", param="dataset.data_files"
    )
    record(api, job, status="failed", finished_at=120.0, error=mistake, progress=progress)
    told = api.run(client.fine_tuning.jobs.retrieve(job.id))
    assert (told.estimated_finish, told.trained_tokens, told.finished_at) == (None, 20, 120)
    assert told.error is not None
    assert (told.error.code, told.error.param) == ("invalid_training_file", "training_file")
    assert told.error.message == "training_file: a, record 2"


def test_a_mistake_in_the_data_names_the_file_that_has_it(api: Api, client: openai.AsyncOpenAI) -> None:
    job = stored(api, file_id="file-1", validation_file_id="file-2")
    for file, param in (("file-1", "training_file"), ("file-2", "validation_file")):
        mistake = JobError(code="invalid_training_file", message=f"{file}, record 2 (line 2): broken JSON")
        record(api, job, status="failed", finished_at=1.0, error=mistake)
        told = api.run(client.fine_tuning.jobs.retrieve(job.id)).error
        assert told is not None
        assert (told.param, told.message) == (param, mistake.message)


def test_both_apis_list_the_same_jobs_and_metadata_filters_them(api: Api, client: openai.AsyncOpenAI) -> None:
    async def ids(**query: Any) -> list[str]:
        return [job.id async for job in client.fine_tuning.jobs.list(**query)]

    jobs = [stored(api, metadata=pairs).id for pairs in ({"team": "a"}, {}, {"team": "a", "x": ""}, {"team": "b"})]
    assert [job["id"] for job in api.get("/finetune").json()["data"]] == jobs[::-1]
    assert api.run(ids(limit=2)) == api.run(ids(limit=1)) == api.run(ids(metadata={})) == jobs[::-1]
    assert api.run(ids(metadata={"team": "a"}, limit=1)) == [jobs[2], jobs[0]]
    assert api.run(ids(metadata={"team": "a", "x": ""})) == [jobs[2]]
    assert api.run(ids(extra_query={"metadata": "null"})) == [jobs[1]]
    page = api.get(f"{JOBS}?limit=3").json()
    assert (page["object"], page["has_more"]) == ("list", True)
    for query in ("metadata=x", "metadata=null&metadata[team]=a"):
        assert api.get(f"{JOBS}?{query}").json()["error"]["param"] == "metadata"


def test_a_job_of_the_other_api_names_where_its_data_came_from(api: Api) -> None:
    hub = stored(api, data_files=[], datasets=(DatasetConfig(hub_id="tatsu-lab/alpaca"),))
    assert api.get(f"{JOBS}/{hub.id}").json()["training_file"] == "tatsu-lab/alpaca"
    assert api.get(f"{JOBS}/{stored(api).id}").json()["training_file"] == "data/a.jsonl"


def test_events_come_newest_first_as_messages_and_metrics(api: Api, client: openai.AsyncOpenAI) -> None:
    async def listed(**query: Any) -> list[FineTuningJobEvent]:
        return [event async for event in client.fine_tuning.jobs.list_events(job.id, **query)]

    job = stored(api)
    validation = {"type": "validation", "time": 101.0, "step": 1, "loss": 2.0, "perplexity": 7.4, "token_accuracy": 0.5}
    record(
        api,
        job,
        STEP,
        validation,
        {"type": "warning", "message": "3 records have no trained token"},
        {"type": "never heard of"},
        {"type": "failed", "message": "no memory", "code": "out_of_memory"},
        progress=Progress(step=STEP),
    )
    failed, unknown, warning, measured, step, queued = told = api.run(listed())
    assert {event.object for event in told} == {"fine_tuning.job.event"}
    assert (failed.level, failed.type, failed.message) == ("error", "message", "no memory")
    assert (warning.level, warning.message) == ("warn", "3 records have no trained token")
    assert (unknown.message, queued.message) == ("never heard of", "The job waits for its device")
    assert (step.type, step.message, step.created_at) == ("metrics", "Step 1/4: training loss=1.5000", 100)
    assert step.data == {"step": 1, "total_steps": 4, "train_loss": 1.5, "train_mean_token_accuracy": 0.25}
    assert measured.data == {
        "step": 1,
        "total_steps": 4,
        "valid_loss": 2.0,
        "valid_mean_token_accuracy": 0.5,
        "full_valid_loss": 2.0,
        "full_valid_mean_token_accuracy": 0.5,
    }
    assert api.run(listed(limit=2)) == told
    assert api.run(listed(after=step.id)) == [queued]


def test_a_waiting_job_is_paused_resumed_and_cancelled(api: Api, client: openai.AsyncOpenAI) -> None:
    jobs = client.fine_tuning.jobs
    job = stored(api, paused=False)
    assert api.run(jobs.pause(job.id)).status == "queued"
    assert api.get(f"/finetune/{job.id}").json()["paused"] is True
    assert api.run(jobs.cancel(job.id)).status == "cancelled"
    for call in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.ConflictError):
            api.run(call(job.id))


def test_checkpoints_come_newest_first_with_their_figures(api: Api, client: openai.AsyncOpenAI) -> None:
    async def listed(**query: Any) -> list[Any]:
        return [one async for one in client.fine_tuning.jobs.checkpoints.list(job.id, **query)]

    job = stored(api)
    events = [
        {"kind": "adapter", "path": f"adapters/step_{step}", "step": step, "final": step == 9, "loss": 1.0 / step}
        for step in (3, 6, 9)
    ]
    events[1] |= {"validation_loss": 0.5, "token_accuracy": 0.75, "validation_token_accuracy": 0.25}
    folder = api.services.settings.runs_dir / job.id
    for event in events:
        in_loop(api, partial(api.services.registry.add_checkpoint, job, folder, event))
    last, middle, first = told = api.run(listed())
    name = f"ft:{BASE}:tuneserve::{job.id[-8:]}"
    assert [one.fine_tuned_model_checkpoint for one in told] == [
        name,
        f"{name}:ckpt-step-6",
        f"{name}:ckpt-step-3",
    ]
    assert [one.step_number for one in told] == [9, 6, 3]
    assert {one.fine_tuning_job_id for one in told} == {job.id}
    assert middle.metrics.to_dict() == {
        "step": 6,
        "train_loss": 1.0 / 6,
        "train_mean_token_accuracy": 0.75,
        "valid_loss": 0.5,
        "valid_mean_token_accuracy": 0.25,
        "full_valid_loss": 0.5,
        "full_valid_mean_token_accuracy": 0.25,
    }
    assert (first.metrics.valid_loss, last.object) == (None, "fine_tuning.job.checkpoint")
    assert api.run(listed(limit=1)) == told
    page = api.get(f"{JOBS}/{job.id}/checkpoints?limit=2").json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (last.id, middle.id, True)


def test_the_result_file_goes_with_its_job(api: Api, client: openai.AsyncOpenAI) -> None:
    kept = api.services.files.keep(b"step\n", file_id="file-r", filename="a.csv", purpose="fine-tune-results")
    job = stored(api, result_files=(api.run(kept).id, "file-gone"), status="succeeded", paused=False)
    assert api.run(client.files.content("file-r")).content == b"step\n"
    assert [file["id"] for file in api.get("/v1/files?purpose=fine-tune-results").json()["data"]] == ["file-r"]
    assert api.run(api.async_client.delete(f"/finetune/{job.id}")).status_code == 200
    assert api.get("/v1/files").json()["data"] == []
    assert api.get(f"{JOBS}/{job.id}").status_code == 404


def test_a_request_with_a_key_makes_one_job(api: Api, client: openai.AsyncOpenAI) -> None:
    body = {"model": BASE, "training_file": upload(api, client)}
    headers = {"Idempotency-Key": "k"}
    first, again = (api.post(JOBS, body, headers=headers).json()["id"] for _ in range(2))
    assert first == again
    assert api.post(JOBS, body | {"seed": 1}, headers=headers).status_code == 409
