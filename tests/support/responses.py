"""What tests of /v1/responses share."""

from __future__ import annotations

import json
from typing import Any

from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.support.api import Api

PATH = "/v1/responses"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "What the weather is",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
SDK_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events(api: Api, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; each is numbered, named by its type, and one that the SDK knows."""
    answer = api.post(PATH, {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = answer.text.split("\n\n")
    assert rest == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        assert SDK_EVENT.validate_python(found[-1]).type == found[-1]["type"]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def prompt_text(api: Api) -> str:
    return api.services.codec.tokenizer.decode(api.engine.received[-1].prompt_ids, skip_special_tokens=False)
