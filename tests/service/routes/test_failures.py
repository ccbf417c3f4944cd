"""What happens when a client leaves, an engine dies, or the service is full or stopping."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support.api import Api

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
COMPLETION = ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 50})
GENERATE = ("/generate", {"prompt": "hi"})
ENDPOINTS = [CHAT, COMPLETION, GENERATE]


class Visit:
    """One request spoken to the application directly, so that the test decides when the client leaves."""

    def __init__(self, api: Api, path: str, body: dict[str, Any]) -> None:
        self.api = api
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self._body: list[bytes] = [json.dumps(body).encode()]
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json")], "server": ("test", 80), "client": ("test", 1),
        }  # fmt: skip

    async def receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def enter(self) -> None:
        """Returns when the engine works on one more request than before, and the application waits for it."""
        before = len(self.api.engine.running)
        self._task = asyncio.create_task(self.api.app(self._scope, self.receive, self.send))  # type: ignore[arg-type]
        async with asyncio.timeout(5):
            while len(self.api.engine.running) == before:
                await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not self._task.done()

    async def leave(self) -> None:
        """Returns when the application has noticed."""
        self.left.set()
        async with asyncio.timeout(5):
            await self._task


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stays_after", [1, 3])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_a_client_that_leaves_frees_the_engine(
    own_api: Api, path: str, body: dict[str, Any], stays_after: int, stream: bool
) -> None:
    own_api.engine.stays_after = stays_after
    visit = Visit(own_api, path, {**body, "stream": stream})
    own_api.run(visit.enter())
    own_api.run(visit.leave())
    assert not own_api.engine.running
    assert own_api.services.admission.active == 0
    assert own_api.metric("tuneserve:requests_aborted_total", cause="client") == len(own_api.engine.received)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_an_engine_that_dies_before_the_first_token_is_a_503(
    own_api: Api, path: str, body: dict[str, Any], stream: bool
) -> None:
    own_api.engine.dies_after = 0
    answer = own_api.post(path, {**body, "stream": stream})
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable_error")
    assert "retry-after" in answer.headers


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_an_engine_that_dies_in_an_answer_is_a_503(own_api: Api, path: str, body: dict[str, Any]) -> None:
    own_api.engine.dies_after = 2
    answer = own_api.post(path, body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable_error")
    assert own_api.metric("tuneserve:requests_aborted_total", cause="engine") >= 1


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_an_engine_that_dies_in_a_stream_is_an_error_event(own_api: Api, path: str, body: dict[str, Any]) -> None:
    own_api.engine.dies_after = 2
    *chunks, last = own_api.events(path, body)
    assert chunks
    assert last.keys() == {"error"}
    assert last["error"]["type"] == "unavailable_error"
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert own_api.services.admission.active == 0


def test_weights_that_leave_before_a_request_is_admitted_fail_nothing(own_api: Api) -> None:
    own_api.engine.weights_leave = 2
    assert own_api.post(*GENERATE).json()["choices"][0]["text"] == "Hello there."
    assert len(own_api.engine.received) == 3
    assert own_api.engine.loaded == ["base"] * 3  # at the start, and each time when it was found to be gone


def test_weights_that_never_stay_are_a_503(own_api: Api) -> None:
    own_api.engine.weights_leave = 1000
    assert own_api.post(*GENERATE).status_code == 503
    assert own_api.services.admission.active == 0


def test_an_unknown_model_is_no_stream(api: Api) -> None:
    answer = api.post("/generate", {"prompt": "a", "model": "nope", "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_full_service_says_try_again(own_api: Api) -> None:
    own_api.engine.stays_after = 1

    visits = [Visit(own_api, *GENERATE) for _ in range(2)]
    for visit in visits:
        own_api.run(visit.enter())
    refused = own_api.post(*GENERATE)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert refused.json()["error"]["code"] == "overloaded"
    assert refused.headers["retry-after"] == "1"
    for visit in visits:
        own_api.run(visit.leave())
    own_api.engine.stays_after = None
    assert own_api.post(*GENERATE).status_code == 200


def test_a_draining_service_takes_nothing_new(own_api: Api) -> None:
    own_api.services.admission.draining = True
    job = {"model": "base", "dataset": {"records": [{"input": "a", "output": "b"}]}}
    for answer in (own_api.post(*GENERATE), own_api.post("/finetune", job), own_api.get("/ready")):
        assert answer.status_code == 503
        assert "stopping" in answer.json()["error"]["message"]
    assert own_api.get("/health").json()["status"] == "draining"


def test_an_unexpected_error_is_a_500_without_details(own_api: Api, caplog: pytest.LogCaptureFixture) -> None:
    own_api.engine.submit = lambda request, receive: 1 / 0  # type: ignore[method-assign,assignment]
    answer = own_api.post(*GENERATE, headers={"X-Request-Id": "abc"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert answer.headers["X-Request-Id"] == "abc"
    assert "zero" not in answer.text
    assert "ZeroDivisionError" in caplog.text
