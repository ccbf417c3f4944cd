from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lm.template import load_template
from lm.tokenizer import Tokenizer
from service.schemas.tokenize import MAX_TEXT_CHARS, MAX_TOKENS
from tests.support.api import BASE, Api, running_api
from tests.support.scripted_engine import CONTEXT, write_model_without_weights
from tests.support.tiny_tokenizers import write_tokenizer

TEXT = "The capital is Zürich, 東京, or 👩‍🚀 <|im_end|>"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A model whose tokenizer begins a text with a token of its own, and knows single bytes."""
    home = tmp_path_factory.mktemp("home")
    write_model_without_weights(home / "models" / BASE)
    write_tokenizer(home / "models" / BASE, "zephyr")
    with running_api(home) as api:
        yield api


def tokenizer(api: Api) -> Tokenizer:
    return api.services.codec.tokenizer


def ids(api: Api, **body: Any) -> list[int]:
    answer = api.post("/tokenize", body)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["tokens"]
    assert answer.json()["count"] == len(tokens)
    return tokens


def test_a_prompt_is_encoded_as_the_model_would_get_it(api: Api) -> None:
    answer = api.post("/tokenize", {"prompt": TEXT, "model": "base"}).json()
    expected = tokenizer(api).encode(TEXT)
    assert answer == {"tokens": expected, "count": len(expected), "max_model_len": CONTEXT, "token_strs": None}
    assert tokenizer(api).eos_token_ids[0] in expected
    usage = api.post("/v1/completions", {"prompt": TEXT, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(expected)


def test_each_form_begins_as_its_makers_say(with_bos: Api) -> None:
    bos = tokenizer(with_bos).bos_token_id
    for body, begins in (
        ({"prompt": "a"}, True),
        ({"prompt": "a", "add_special_tokens": False}, False),
        ({"prompt": "a", "add_special": False}, False),
        ({"content": "a"}, False),
        ({"content": "a", "add_special": True}, True),
        ({"content": "a", "add_special_tokens": True, "add_special": None}, True),
        ({"messages": MESSAGES, "add_special_tokens": True}, True),
    ):
        assert (ids(with_bos, **body)[0] == bos) == begins, body


def test_messages_are_encoded_as_a_chat_would_get_them(api: Api) -> None:
    template = load_template(api.services.settings.model_dir, tokenizer(api))
    assert ids(api, messages=MESSAGES) == template.encode(MESSAGES, add_generation_prompt=True)
    whole = template.encode(MESSAGES, add_generation_prompt=False)
    assert ids(api, messages=MESSAGES, add_generation_prompt=False) == whole
    opened = template.encode(MESSAGES, continue_final_message=True)
    assert ids(api, messages=MESSAGES, continue_final_message=True, add_generation_prompt=False) == opened
    assert len(opened) < len(whole)
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    assert len(ids(api, messages=MESSAGES, tools=tools)) > len(ids(api, messages=MESSAGES))
    usage = api.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(ids(api, messages=MESSAGES))


def test_tokens_are_shown_as_the_vocabulary_has_them(api: Api) -> None:
    answer = api.post("/tokenize", {"prompt": " the é", "return_token_strs": True}).json()
    backend = tokenizer(api).backend
    assert answer["token_strs"] == [backend.id_to_token(token_id) for token_id in answer["tokens"]]
    assert answer["token_strs"][0].startswith("Ġ")


@pytest.mark.parametrize("which", ["api", "with_bos"])
def test_pieces_are_text_or_the_bytes_of_a_part_of_a_character(which: str, request: pytest.FixtureRequest) -> None:
    api = request.getfixturevalue(which)
    text = "Zürich 東京 👩‍🚀"
    answer = api.post("/tokenize", {"content": text, "with_pieces": True}).json()
    pieces = answer["tokens"]
    assert [piece["id"] for piece in pieces] == ids(api, content=text)
    data = b"".join(
        piece["piece"].encode() if isinstance(piece["piece"], str) else bytes(piece["piece"]) for piece in pieces
    )
    assert data.decode().strip() == text
    assert any(isinstance(piece["piece"], list) for piece in pieces)


def test_detokenize_is_the_way_back(api: Api) -> None:
    tokens = ids(api, prompt=TEXT)
    assert api.post("/detokenize", {"model": "base", "tokens": tokens}).json() == {"prompt": TEXT, "content": TEXT}
    assert api.post("/detokenize", {"tokens": []}).json() == {"prompt": "", "content": ""}


def test_they_need_no_engine(own_api: Api) -> None:
    own_api.engine.state, own_api.engine.ready = "dead", None
    answer = own_api.post("/tokenize", {"prompt": "hi"})
    assert (answer.status_code, answer.json()["max_model_len"]) == (200, CONTEXT)  # as it was
    assert own_api.post("/detokenize", {"tokens": [5]}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "none is given"),
        ({"prompt": None}, "prompt", "none is given"),
        ({"prompt": "a", "content": "b"}, "prompt", "prompt and content are given"),
        ({"prompt": ["a"]}, "prompt", "string"),
        ({"prompt": "a\ud800"}, "prompt", "unicode"),
        ({"content": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "goes with messages"),
        ({"prompt": "a", "add_special": True, "add_special_tokens": False}, "add_special", "one of the two"),
        ({"content": "a", "parse_special": False}, "parse_special", "not supported"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"prompt": "a", "returns": 1}, "returns", "unknown field"),
        ({"prompt": "a" * (MAX_TEXT_CHARS + 1)}, "prompt", str(MAX_TEXT_CHARS)),
    ],
)
def test_what_cannot_be_encoded_is_a_400(api: Api, body: dict[str, Any], param: str, message: str) -> None:
    escaped = json.dumps(body).encode()  # httpx's own JSON cannot hold half a character
    answer = api.post("/tokenize", content=escaped, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert message in answer.json()["error"]["message"]
    assert len(answer.text) < 1000


@pytest.mark.parametrize(
    "tokens", [None, "1", [-1], [1.5], [True], ["1"], [10**6], [2**70], [[1]], [0] * (MAX_TOKENS + 1)]
)
def test_what_is_no_token_is_a_400(api: Api, tokens: Any) -> None:
    answer = api.post("/detokenize", {"tokens": tokens})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tokens")
    assert len(answer.text) < 1000


def test_an_unknown_model_is_a_404(api: Api) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        answer = api.post(path, {**body, "model": "nope"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert api.post(path, {**body, "model": "latest"}).status_code == 200


def test_any_model_will_do_where_the_settings_say_so(tmp_path: Path) -> None:
    with running_api(tmp_path, allow_unknown_model=True) as api:
        assert api.post("/tokenize", {"prompt": "a", "model": "gpt-4o"}).status_code == 200


def test_a_client_that_asks_for_the_tokenizer_itself_gets_a_clean_404(api: Api) -> None:
    answer = api.get("/tokenizer_info")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


def test_a_long_text_holds_nobody_else_up(api: Api) -> None:
    async def both() -> tuple[float, float]:
        start = time.monotonic()
        long = asyncio.create_task(api.async_client.post("/tokenize", json={"prompt": "a b c d " * 100_000}))
        await asyncio.sleep(0.05)
        await api.async_client.get("/version")
        other = time.monotonic() - start
        assert (await long).status_code == 200
        return other, time.monotonic() - start

    other, whole = api.run(both())
    assert other < whole / 2
