from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any

import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from lm.errors import UserError
from service.database import Database
from service.jobs.job import Job, JobError
from service.jobs.store import JobStore
from service.jobs.webhooks import Delivery, Webhooks
from tests.support.webhook_receiver import webhook_receiver
from trainer.config import TrainingOptions

SECRET = "whsec_" + base64.b64encode(b"a secret of the operator").decode()


def make(database: Database, **options: Any) -> Webhooks:
    chosen: dict[str, Any] = {"secret": SECRET, "allow_private": True, "delays_s": (0.01, 0.02)}
    return Webhooks(database, **chosen | options)


def ended_job(store: JobStore, url: str | None, **columns: Any) -> Job:
    job = store.create(
        status="queued",
        model="tiny",
        options=TrainingOptions(),
        data_files=["data/a.jsonl"],
        suffix="",
        promote="final",
        webhook=url,
        metadata={"team": "a"},
    )
    store.record(job.id, **{"status": "succeeded", "fine_tuned_model": "ft:tiny:x::1"} | columns)
    return store.get(job.id)


async def over(webhooks: Webhooks, job: Job) -> Delivery:
    async with asyncio.timeout(20):
        while True:
            delivery = webhooks.of_job(job.id)
            assert delivery is not None
            if delivery.is_over:
                return delivery
            await asyncio.sleep(0.01)


def deliver(webhooks: Webhooks, job: Job) -> Delivery:
    async def work() -> Delivery:
        webhooks.start()
        await asyncio.sleep(0)
        webhooks.add(job)
        webhooks.wake()
        try:
            return await over(webhooks, job)
        finally:
            await webhooks.stop()

    return asyncio.run(work())


def test_the_openai_sdk_verifies_and_reads_what_a_job_sends_at_its_end(database: Database, store: JobStore) -> None:
    with webhook_receiver() as receiver:
        job = ended_job(store, receiver.url)
        delivery = deliver(make(database), job)
    assert delivery == Delivery(attempts=1, is_delivered=True, is_over=True, problem=None)
    client = OpenAI(api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(receiver.bodies[0], receiver.headers[0])
    assert event.type == "fine_tuning.job.succeeded"
    assert event.data.id == job.id
    assert receiver.headers[0]["webhook-id"] == event.id
    assert receiver.headers[0]["host"] == receiver.url.split("/")[2]
    data = json.loads(receiver.bodies[0])["data"]
    assert (data["fine_tuned_model"], data["metadata"]) == ("ft:tiny:x::1", {"team": "a"})
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(receiver.bodies[0].replace("succeeded", "failed"), receiver.headers[0])
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(
            receiver.bodies[0], receiver.headers[0], secret="whsec_" + base64.b64encode(b"x").decode()
        )


def test_a_failure_says_why(database: Database, store: JobStore) -> None:
    with webhook_receiver() as receiver:
        error = JobError(code="out_of_memory", message="lower batch_size")
        deliver(make(database), ended_job(store, receiver.url, status="failed", error=error, fine_tuned_model=None))
    body = json.loads(receiver.bodies[0])
    assert body["type"] == "fine_tuning.job.failed"
    assert body["data"]["error"] == {"code": "out_of_memory", "message": "lower batch_size"}


def test_it_is_told_again_under_the_same_id_until_it_is_taken(database: Database, store: JobStore) -> None:
    with webhook_receiver(500, 302) as receiver:  # a redirect is not followed
        delivery = deliver(make(database), ended_job(store, receiver.url))
    assert (delivery.attempts, delivery.is_delivered) == (3, True)
    assert len({headers["webhook-id"] for headers in receiver.headers}) == 1
    assert len(receiver.bodies) == 3


@pytest.mark.parametrize(("statuses", "attempts"), [((500,) * 5, 3), ((410,), 1)])
def test_it_is_given_up_after_the_last_attempt_and_where_nobody_wants_it(
    database: Database, store: JobStore, statuses: Sequence[int], attempts: int
) -> None:
    with webhook_receiver(*statuses) as receiver:
        delivery = deliver(make(database), ended_job(store, receiver.url))
    assert delivery == Delivery(
        attempts=attempts, is_delivered=False, is_over=True, problem=f"the answer was {statuses[0]}"
    )


def test_nobody_is_told_of_a_job_without_a_webhook(database: Database, store: JobStore) -> None:
    webhooks = make(database)
    job = ended_job(store, None)
    webhooks.add(job)
    assert webhooks.of_job(job.id) is None


def test_a_name_that_means_this_machine_is_not_called_unless_that_is_allowed(
    database: Database, store: JobStore
) -> None:
    with webhook_receiver() as receiver:
        url = receiver.url.replace("localhost", "127.1")
        delivery = deliver(make(database, allow_private=False, delays_s=()), ended_job(store, url))
        assert not delivery.is_delivered
        assert "not a public address" in (delivery.problem or "")
        assert receiver.bodies == []


def test_what_was_not_delivered_is_delivered_after_a_restart(database: Database, store: JobStore) -> None:
    async def first(job: Job) -> None:
        webhooks = make(database, delays_s=(0.3,))
        webhooks.add(job)
        webhooks.start()
        async with asyncio.timeout(20):
            while (delivery := webhooks.of_job(job.id)) is None or delivery.attempts == 0:
                await asyncio.sleep(0.01)
        await webhooks.stop()

    async def second(job: Job) -> Delivery:
        webhooks = make(database)
        webhooks.start()
        delivery = await over(webhooks, job)
        await webhooks.stop()
        return delivery

    with webhook_receiver(503) as receiver:
        job = ended_job(store, receiver.url)
        asyncio.run(first(job))
        assert len(receiver.bodies) == 1
        assert asyncio.run(second(job)).is_delivered
        assert len(receiver.bodies) == 2


def test_a_receiver_that_is_not_there_is_a_problem_and_not_an_error(database: Database, store: JobStore) -> None:
    with webhook_receiver() as receiver:
        url = receiver.url
    delivery = deliver(make(database, delays_s=()), ended_job(store, url))
    assert (delivery.attempts, delivery.is_delivered) == (1, False)
    assert "ConnectError" in (delivery.problem or "")


def test_a_name_that_cannot_be_looked_up_does_not_end_the_deliveries_of_others(
    database: Database, store: JobStore
) -> None:
    webhooks = make(database, delays_s=())
    webhooks.add(ended_job(store, "http://hooks..example.org/"))
    with webhook_receiver() as receiver:
        assert deliver(webhooks, ended_job(store, receiver.url)).is_delivered


def test_a_webhook_needs_a_secret_and_a_url_that_will_be_called(database: Database) -> None:
    make(database).check("http://localhost/")
    with pytest.raises(UserError, match="webhook_secret"):
        make(database, secret=None).check("https://example.org/")
    with pytest.raises(UserError, match=r"webhook\.url: localhost is not a public address") as error:
        make(database, allow_private=False).check("https://localhost/")
    assert error.value.param == "webhook.url"
