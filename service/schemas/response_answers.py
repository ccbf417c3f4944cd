"""What /v1/responses answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.schemas.answers import Answer, TokenLogprob
from service.schemas.response_items import ItemStatus

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Answer):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[dict[str, Any]] = Field(default_factory=list)
    logprobs: list[TokenLogprob] = Field(default_factory=list)


class OutputMessage(Answer):
    id: str
    type: Literal["message"] = "message"
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputFunctionCall(Answer):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    """What the item with the result of the call names."""
    name: str
    arguments: str
    """A JSON object, as text."""


OutputItem = OutputMessage | OutputFunctionCall


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ResponseError(Answer):
    code: str
    message: str


class InputTokensDetails(Answer):
    cached_tokens: int
    """Those that were not computed, since the prefix cache had them."""
    cache_write_tokens: int = 0
    """0: nothing is charged for writing to the cache, and it is not counted."""


class OutputTokensDetails(Answer):
    reasoning_tokens: int = 0


class ResponseUsage(Answer):
    input_tokens: int
    """Ids that the model was given."""
    input_tokens_details: InputTokensDetails
    output_tokens: int
    """Ids that it generated, the one that ended the answer included."""
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class NoReasoning(Answer):
    effort: None = None
    summary: None = None


class ResponseAnswer(Answer):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    """`incomplete`: max_output_tokens ended it. `failed`: the service did."""
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    """The model that answered."""
    system_fingerprint: str
    """`ts-` and a hash of the weights that answered."""
    output: list[OutputItem] = Field(default_factory=list)
    usage: ResponseUsage | None = None
    store: Literal[False] = False
    """Nothing is stored: send the whole conversation with each request."""
    background: Literal[False] = False
    previous_response_id: None = None
    truncation: Literal["disabled"] = "disabled"
    reasoning: NoReasoning = NoReasoning()
    service_tier: Literal["default"] = "default"
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
