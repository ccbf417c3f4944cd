"""Answers that are not streamed, for FastAPI to write and to document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


def _is_none(value: object) -> bool:
    return value is None


IfAsked = Field(exclude_if=_is_none)
"""Of a field that is not there unless the request asks for it."""


class PromptTokensDetails(Answer):
    cached_tokens: int
    """Ids that were not computed again, since an earlier request began with them."""


class CompletionTokensDetails(Answer):
    reasoning_tokens: int = 0


class Usage(Answer):
    prompt_tokens: int
    """Ids that the model was given; each prompt counts once, however many answers it gets."""
    completion_tokens: int
    """Ids that it generated, those that ended the answers included."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class Choice(Answer):
    index: int
    finish_reason: FinishReason
    """`stop`: the model or a stop string ended it. `length`: max_tokens. `tool_calls`: it ends with calls. `abort`: the
    service was stopped."""
    stop_reason: str | int | None
    """The stop string that was found, or the id among the request's stop_token_ids."""
    prompt_logprobs: Annotated[list[dict[str, dict[str, Any]] | None] | None, IfAsked] = None
    """For each token of the prompt but the first: id -> logprob, rank and decoded_token."""
    prompt_token_ids: Annotated[list[int] | None, IfAsked] = None
    token_ids: Annotated[list[int] | None, IfAsked] = None


class FunctionCall(Answer):
    name: str
    arguments: str
    """A JSON object, as text."""


class ToolCall(Answer):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextLogprobs(Answer):
    """For each token. With `echo` the prompt's tokens come first, and the first of them has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens and the token itself, by their text."""
    text_offset: list[int]
    """Where in the text the token begins."""


class CompletionChoice(Choice):
    text: str
    logprobs: TextLogprobs | None = None
    tool_calls: Annotated[list[ToolCall] | None, IfAsked] = None


class Completion(Answer):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    """The model that answered."""
    system_fingerprint: str
    """`ts-` and a hash of the weights that answered."""
    choices: list[CompletionChoice]
    usage: Usage


class GenerationMetrics(Answer):
    """How fast one answer was. GB is 1e9 bytes."""

    time_to_first_token_s: float | None
    """From the request to its first token, waiting included."""
    total_time_s: float
    """From the request to its last token."""
    tokens_per_second: float
    """Generated tokens / total time, as torchtune counts them: prompt processing included."""
    bandwidth_gb_s: float
    """Bytes of the weights x tokens per second, as torchtune counts them."""
    decode_tokens_per_second: float | None
    """Tokens after the first one / the time they took."""
    decode_bandwidth_gb_s: float | None
    """Bytes that the device really read for them, weights once a step and the cache, / the time they took."""
    bandwidth_utilization: float | None
    """Share of the device's peak that the decode bandwidth reaches."""
    peak_bandwidth_gb_s: float
    peak_bandwidth_source: Literal["measured", "assumed"]
    """Whether the peak was measured on this device or is the maker's figure."""
    memory_used_gb: float | None
    """Device memory that the engine held."""
    device: str
    model: str


class GenerateAnswer(Completion):
    metrics: GenerationMetrics


class ChatMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str | None
    """Null where the answer is nothing but calls."""
    refusal: None = None
    tool_calls: Annotated[list[ToolCall] | None, IfAsked] = None


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]
    """Of the token in UTF-8; several tokens together may make a character."""


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    """The model that answered."""
    system_fingerprint: str
    """`ts-` and a hash of the weights that answered."""
    choices: list[ChatChoice]
    usage: Usage


class Model(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    """The base model."""
    parent: str | None
    """The base model that this one was fine-tuned from; null for a base model."""
    max_model_len: int | None
    """Longest prompt plus answer, in tokens; null while the engine is not ready."""


class ModelDeleted(Answer):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[Model]
