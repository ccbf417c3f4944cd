"""The answer of /v1/responses as it grows, told in typed events.

Text, calls and their arguments go in; events come out, and at the end the whole answer. An answer that is not streamed
is made in the same way, so both are the same. Knows no HTTP and no engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from service.schemas.response_answers import (
    IncompleteDetails,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseAnswer,
    ResponseError,
    ResponseUsage,
)
from service.schemas.response_items import ItemStatus

Event = dict[str, Any]
Ending = Literal["completed", "incomplete", "failed"]

STOPPED = ResponseError(code="server_error", message="the service was stopped before the answer was complete")


@dataclass(slots=True)
class _OpenMessage:
    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def item(self, status: ItemStatus) -> OutputMessage:
        return OutputMessage(id=self.id, status=status, content=[self.part()])

    def part(self) -> OutputText:
        return OutputText.model_validate({"text": "".join(self.texts), "logprobs": self.logprobs})


@dataclass(slots=True)
class _OpenCall:
    id: str
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def item(self, status: ItemStatus) -> OutputFunctionCall:
        return OutputFunctionCall(
            id=self.id, status=status, call_id=self.call_id, name=self.name, arguments="".join(self.arguments)
        )


@dataclass(slots=True)
class ResponseEvents:
    """One answer. Each method adds to what `take` hands over."""

    response: ResponseAnswer
    """As it was told of last; in progress and without output until it has ended."""
    _output: list[OutputItem] = field(default_factory=list)
    _open: _OpenMessage | _OpenCall | None = None
    _events: list[Event] = field(default_factory=list)
    _num_events: int = 0

    @property
    def is_in_call(self) -> bool:
        return isinstance(self._open, _OpenCall)

    def take(self) -> list[Event]:
        """The events since the last time, in order."""
        events, self._events = self._events, []
        return events

    def begin(self) -> None:
        for kind in ("response.created", "response.in_progress"):
            self._tell(kind, response=_dump(self.response))

    def add_text(self, text: str, logprobs: list[dict[str, Any]]) -> None:
        message = self._open if isinstance(self._open, _OpenMessage) else self._open_message()
        message.texts.append(text)
        message.logprobs += logprobs
        self._tell_of("response.output_text.delta", message, content_index=0, delta=text, logprobs=logprobs)

    def start_call(self, call_id: str, name: str) -> None:
        self._close("completed")
        self._open = call = _OpenCall(f"fc_{uuid4().hex}", call_id, name)
        self._tell("response.output_item.added", output_index=len(self._output), item=_dump(call.item("in_progress")))

    def add_arguments(self, text: str) -> None:
        call = self._open
        assert isinstance(call, _OpenCall)
        call.arguments.append(text)
        self._tell_of("response.function_call_arguments.delta", call, delta=text)

    def end(self, finish_reason: str, usage: ResponseUsage) -> None:
        """`finish_reason` is that of the generation: `stop`, `tool_calls`, `length` or `abort`."""
        if self._open is None and not self._output:
            self._open_message()
        match finish_reason:
            case "length":
                self._end("incomplete", usage, incomplete=IncompleteDetails(reason="max_output_tokens"))
            case "abort":
                self._end("failed", usage, error=STOPPED)
            case _:
                self._end("completed", usage)

    def fail(self, error: dict[str, Any]) -> None:
        """`error` is our error object. It stands in the event twice: OpenAI's clients look for `error`, or for its
        members beside the type."""
        told = {name: error[name] for name in ("code", "message", "param")}
        self._tell("error", **told, error=error)
        if self._open is not None:
            self._output.append(self._open.item("incomplete"))
            self._open = None
        self._end("failed", None, error=ResponseError(code="server_error", message=error["message"]))

    def _open_message(self) -> _OpenMessage:
        self._close("completed")
        self._open = message = _OpenMessage(f"msg_{uuid4().hex}")
        item = message.item("in_progress").model_copy(update={"content": []})
        self._tell("response.output_item.added", output_index=len(self._output), item=_dump(item))
        self._tell_of("response.content_part.added", message, content_index=0, part=_dump(message.part()))
        return message

    def _close(self, status: ItemStatus) -> None:
        if self._open is None:
            return
        item = self._open.item(status)
        if isinstance(self._open, _OpenMessage):
            part = _dump(self._open.part())
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            self._tell_of("response.output_text.done", self._open, content_index=0, **told)
            self._tell_of("response.content_part.done", self._open, content_index=0, part=part)
        else:
            assert isinstance(item, OutputFunctionCall)
            told = {"name": item.name, "arguments": item.arguments}
            self._tell_of("response.function_call_arguments.done", self._open, **told)
        self._tell("response.output_item.done", output_index=len(self._output), item=_dump(item))
        self._output.append(item)
        self._open = None

    def _end(
        self,
        ending: Ending,
        usage: ResponseUsage | None,
        *,
        error: ResponseError | None = None,
        incomplete: IncompleteDetails | None = None,
    ) -> None:
        self._close("completed" if ending == "completed" else "incomplete")
        self.response = self.response.model_copy(
            update={
                "status": ending,
                "completed_at": int(time.time()) if ending == "completed" else None,
                "error": error,
                "incomplete_details": incomplete,
                "output": self._output,
                "usage": usage,
            }
        )
        self._tell(f"response.{ending}", response=_dump(self.response))

    def _tell_of(self, kind: str, item: _OpenMessage | _OpenCall, /, **fields: Any) -> None:
        self._tell(kind, item_id=item.id, output_index=len(self._output), **fields)

    def _tell(self, kind: str, /, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1


def _dump(part: ResponseAnswer | OutputItem | OutputText) -> dict[str, Any]:
    return part.model_dump(mode="json")
