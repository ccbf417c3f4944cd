"""Answers that are not streamed, for FastAPI to write and to document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "abort"]


class Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Usage(Answer):
    prompt_tokens: int
    """Ids that the model was given."""
    completion_tokens: int
    """Ids that it generated, the one that ended the answer included."""
    total_tokens: int


class Choice(Answer):
    index: int
    finish_reason: FinishReason
    """`stop`: the model or a stop string ended it. `length`: max_tokens. `abort`: the service was stopped."""
    stop_reason: str | int | None
    """The stop string that was found, or the id among the request's stop_token_ids."""
    logprobs: None = None


class CompletionChoice(Choice):
    text: str


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
    content: str
    refusal: None = None


class ChatChoice(Choice):
    message: ChatMessage


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


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[Model]
