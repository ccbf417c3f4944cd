from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from service.responses.answer import begun_answer, response_usage
from service.responses.events import Event, ResponseEvents
from service.schemas.responses import ResponseRequest

USAGE = response_usage(num_input=7, num_cached=4, num_output=3)
SDK_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
LOGPROB = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}


def begun() -> ResponseEvents:
    body = ResponseRequest(input="hi")  # type: ignore[arg-type]
    events = ResponseEvents(begun_answer(body, id="resp_1", created=1, model="base", system_fingerprint="ts-1"))
    events.begin()
    return events


def kinds(events: list[Event]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def text_and_two_calls() -> list[Event]:
    events = begun()
    events.add_text("Let me ", [LOGPROB])
    events.add_text("look.", [])
    events.start_call("call_a", "weather")
    events.add_arguments('{"city":')
    events.add_arguments('"Oslo"}')
    events.start_call("call_b", "time")
    events.add_arguments("{}")
    events.end("tool_calls", USAGE)
    return events.take()


def test_events_come_in_the_order_that_openai_sends() -> None:
    assert kinds(text_and_two_calls()) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_each_event_is_what_the_sdk_knows_under_its_type_and_has_its_number() -> None:
    events = text_and_two_calls()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        known = SDK_EVENT.validate_python(event)
        assert known.type == event["type"]


def test_events_name_their_item_and_its_place() -> None:
    events = text_and_two_calls()
    added = [event for event in events if event["type"] == "response.output_item.added"]
    ids = [event["item"]["id"] for event in added]
    assert [event["output_index"] for event in added] == [0, 1, 2]
    assert [item.partition("_")[0] for item in ids] == ["msg", "fc", "fc"]
    assert len(set(ids)) == 3
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == ids[event["output_index"]]


def test_the_end_has_what_the_deltas_told() -> None:
    events = text_and_two_calls()
    last = events[-1]["response"]
    message, weather, time = last["output"]
    assert message["content"] == [
        {"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": [LOGPROB]}
    ]
    assert (weather["name"], weather["call_id"], weather["arguments"]) == ("weather", "call_a", '{"city":"Oslo"}')
    assert (time["name"], time["call_id"], time["arguments"]) == ("time", "call_b", "{}")
    assert {item["status"] for item in last["output"]} == {"completed"}
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == last["output"]
    assert (last["status"], last["error"], last["incomplete_details"]) == ("completed", None, None)
    assert last["usage"] == USAGE.model_dump()


def test_what_begins_is_in_progress_and_empty() -> None:
    events = text_and_two_calls()
    assert events[0]["response"] == events[1]["response"]
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    message, call, _ = (event["item"] for event in events if event["type"] == "response.output_item.added")
    assert (message["status"], message["content"]) == ("in_progress", [])
    assert (call["status"], call["arguments"]) == ("in_progress", "")


def test_an_answer_without_text_is_an_empty_message() -> None:
    events = begun()
    events.end("stop", USAGE)
    (message,) = events.take()[-1]["response"]["output"]
    assert message["content"][0]["text"] == ""


def test_an_answer_of_calls_has_no_message() -> None:
    events = begun()
    events.start_call("call_a", "weather")
    events.end("tool_calls", USAGE)
    (call,) = events.response.output
    assert call.type == "function_call"


@pytest.mark.parametrize("call", [False, True])
def test_a_limit_leaves_the_last_item_incomplete(call: bool) -> None:
    events = begun()
    events.add_text("once", [])
    if call:
        events.start_call("call_a", "weather")
        events.add_arguments('{"ci')
    events.end("length", USAGE)
    last = events.take()[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in last["response"]["output"]] == (["completed"] if call else []) + ["incomplete"]
    assert last["response"]["completed_at"] is None


def test_an_answer_that_the_service_stopped_has_failed() -> None:
    events = begun()
    events.add_text("once", [])
    events.end("abort", USAGE)
    last = events.take()[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"


def test_an_error_is_an_event_and_then_a_failed_response_with_what_had_come() -> None:
    events = begun()
    events.add_text("once", [])
    events.take()
    error = {"message": "the engine died", "type": "unavailable_error", "param": None, "code": None}
    events.fail(error)
    told, failed = events.take()
    assert told == {"type": "error", "sequence_number": 5, "error": error, "message": "the engine died"} | {
        "param": None,
        "code": None,
    }
    SDK_EVENT.validate_python(told)
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the engine died"}
    (item,) = failed["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "once")
