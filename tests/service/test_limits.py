"""How many answers may be under way, whatever they are asked with; and the request id that every answer has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.api import Api, running_api

KEY = {"X-Api-Key": "k"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Four answers may be under way; bodies have at most 2000 bytes; a key is needed."""
    home = tmp_path_factory.mktemp("home")
    with running_api(home, max_num_seqs=2, max_queued_requests=2, max_body_size=2000, api_keys=["k"]) as api:
        yield api


@pytest.mark.parametrize(
    ("num", "body"),
    [
        (1, {"prompt": "a"}),
        (3, {"prompt": "a", "n": 3}),
        (3, {"prompt": ["a", "b", "c"]}),
        (4, {"prompt": [[5], [6]], "n": 2}),
        (3, {"prompt": "a", "best_of": 3}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_answer_takes_a_place(small: Api, num: int, body: dict[str, Any], stream: bool) -> None:
    if stream and "best_of" in body:
        body = {"prompt": "a", "n": num}

    def ask() -> int:
        return small.post("/v1/completions", {**body, "stream": stream}, headers=KEY).status_code

    with small.services.admission.enter(4 - num):
        assert ask() == 200
    with small.services.admission.enter(5 - num):
        refused = small.post("/v1/completions", {**body, "stream": stream}, headers=KEY)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "overloaded"
    assert small.services.admission.active == 0
    assert ask() == 200


def test_every_answer_has_the_id_of_its_request(small: Api) -> None:
    answers = {
        200: ("/v1/completions", {"prompt": "a"}, KEY),
        400: ("/v1/completions", {"prompt": "a", "n": 0}, KEY),
        401: ("/v1/completions", {"prompt": "a"}, {}),
        404: ("/nope", {}, KEY),
        405: ("/v1/models", {}, KEY),
        413: ("/v1/completions", {"prompt": "a" * 3000}, KEY),
    }
    for status, (path, body, headers) in answers.items():
        answer = small.post(path, body, headers={**headers, "X-Request-Id": f"mine-{status}"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, f"mine-{status}")
        assert len(small.post(path, body, headers=headers).headers["x-request-id"]) == 32
    streamed = small.post(
        "/v1/completions", {"prompt": "a", "stream": True}, headers={**KEY, "X-Request-Id": "mine-sse"}
    )
    assert streamed.headers["x-request-id"] == "mine-sse"
    assert '"id":"cmpl-mine-sse"' in streamed.text


def test_an_answer_that_is_refused_for_want_of_an_engine_has_it_too(tmp_path: Path) -> None:
    with running_api(tmp_path) as api:
        api.engine.state, api.engine.ready = "dead", None
        answer = api.post("/generate", {"prompt": "a"}, headers={"X-Request-Id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (503, "mine")
