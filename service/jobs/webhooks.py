"""Telling a job's end to a URL that its client named, as Standard Webhooks have it (standardwebhooks.com).

    webhook-id          the same in every attempt, so that a receiver can drop what it has
    webhook-timestamp   unix seconds of this attempt
    webhook-signature   v1,<base64 of HMAC-SHA256 over "id.timestamp.body">
The body is OpenAI's webhook event, so that `client.webhooks.unwrap` of the openai SDK verifies and reads it.

What is to be told lies in the database from the transaction on that ends the job, and leaves it when an answer of
200 to 299 came or the last attempt failed. Only public addresses are called, unless the settings allow others; see
`service/public_url.py`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from lm.errors import UserError
from service.api_keys import secret_bytes
from service.database import Database
from service.jobs.job import Job, new_id
from service.public_url import ForbiddenAddress, check_url, pinned_request

logger = logging.getLogger(__name__)

DELAYS_S = (5, 30, 300, 1800, 7200, 18_000, 36_000)
"""Between attempts: eight of them in 18 hours."""
TIMEOUT_S = 15.0
GONE = 410
"""The receiver wants no more of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How far the newest webhook of a job has come."""

    attempts: int
    is_delivered: bool
    is_over: bool
    """Nothing more is tried."""
    problem: str | None
    """What the last attempt met."""


class Webhooks:
    def __init__(
        self,
        database: Database,
        *,
        secret: str | None,
        allow_private: bool = False,
        delays_s: Sequence[float] = DELAYS_S,
    ) -> None:
        self._database = database
        self._secret = secret
        self._allow_private = allow_private
        self._delays_s = delays_s
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def check(self, url: str) -> None:
        """Raises UserError for a URL that will not be called, and where nothing could be signed."""
        if self._secret is None:
            message = "webhook: this service signs no webhooks; its operator sets webhook_secret"
            raise UserError(message, param="webhook")
        try:
            check_url(url, allow_private=self._allow_private)
        except ForbiddenAddress as error:
            raise UserError(f"webhook.url: {error}", param="webhook.url") from error

    def add(self, job: Job) -> None:
        """Take up the end of a job. Inside the transaction that ends it; call `wake` after that."""
        if job.webhook is None:
            return
        event_id = new_id("evt_")
        self._database.insert(
            "webhooks",
            id=event_id,
            job_id=job.id,
            url=job.webhook,
            body=json.dumps(_body(event_id, job)),
            next_attempt_at=time.time(),
        )

    def wake(self) -> None:
        self._wake.set()

    def of_job(self, job_id: str) -> Delivery | None:
        row = self._database.row("SELECT * FROM webhooks WHERE job_id = ? ORDER BY rowid DESC LIMIT 1", job_id)
        if row is None:
            return None
        return Delivery(
            attempts=row["attempts"],
            is_delivered=row["delivered_at"] is not None,
            is_over=row["next_attempt_at"] is None,
            problem=row["problem"],
        )

    # ---- the work

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="webhooks")

    async def stop(self) -> None:
        """What was not delivered waits for the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S, limits=limits) as client:
            while True:
                self._wake.clear()
                try:
                    wait_s = await self._deliver_due(client)
                except sqlite3.OperationalError as error:
                    logger.error("no webhook can be delivered now: %s", error)
                    wait_s = 5.0
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()

    async def _deliver_due(self, client: httpx.AsyncClient) -> float | None:
        """Try all that are due. Seconds to the next one; None: there is none."""
        query = "SELECT * FROM webhooks WHERE next_attempt_at <= ? ORDER BY next_attempt_at LIMIT 20"
        due = self._database.rows(query, time.time())
        await asyncio.gather(*(self._attempt(client, row) for row in due))
        row = self._database.row("SELECT min(next_attempt_at) AS next FROM webhooks")
        assert row is not None  # an aggregate always has a row
        return None if row["next"] is None else max(0.0, row["next"] - time.time())

    async def _attempt(self, client: httpx.AsyncClient, row: sqlite3.Row) -> None:
        status, problem = await self._post(client, row)
        attempts, now = row["attempts"] + 1, time.time()
        is_last = problem is None or status == GONE or attempts > len(self._delays_s)
        if problem is not None:
            logger.warning("webhook %s of job %s, attempt %d: %s", row["id"], row["job_id"], attempts, problem)
        self._database.connection.execute(
            "UPDATE webhooks SET attempts = ?, problem = ?, delivered_at = ?, next_attempt_at = ? WHERE id = ?",
            (
                attempts,
                problem,
                now if problem is None else None,
                None if is_last else now + self._delays_s[attempts - 1],
                row["id"],
            ),
        )

    async def _post(self, client: httpx.AsyncClient, row: sqlite3.Row) -> tuple[int | None, str | None]:
        """The status and what is wrong with it, if anything. Of the answer nothing more is read."""
        headers = {**signed(self._secret or "", row["id"], row["body"]), "content-type": "application/json"}
        try:
            async with asyncio.timeout(TIMEOUT_S):
                request = await pinned_request(
                    client, row["url"], content=row["body"], headers=headers, allow_private=self._allow_private
                )
                answer = await client.send(request, stream=True)
                await answer.aclose()
        except (httpx.HTTPError, TimeoutError, OSError, ForbiddenAddress) as error:
            return None, f"{type(error).__name__}: {error}".removesuffix(": ")
        return answer.status_code, None if answer.is_success else f"the answer was {answer.status_code}"


def signed(secret: str, webhook_id: str, body: str) -> dict[str, str]:
    """The three headers."""
    timestamp = str(int(time.time()))
    digest = hmac.new(secret_bytes(secret), f"{webhook_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return {"webhook-id": webhook_id, "webhook-timestamp": timestamp, "webhook-signature": signature}


def _body(event_id: str, job: Job) -> dict[str, Any]:
    return {
        "id": event_id,
        "object": "event",
        "type": f"fine_tuning.job.{job.status}",
        "created_at": int(time.time()),
        "data": {
            "id": job.id,
            "status": job.status,
            "fine_tuned_model": job.fine_tuned_model,
            "error": None if job.error is None else {"code": job.error.code, "message": job.error.message},
            "metadata": dict(job.metadata),
        },
    }
