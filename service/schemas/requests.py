"""Request bodies. An unknown field is refused by name; a documented one that is not implemented yet, by value.

Null means the default, as OpenAI's clients send it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from service.schemas.fields import Content, MaxTokens, Only, Prompts, Stop
from trainer.config import Strict

INT64 = 2**63


class StreamOptions(Strict):
    include_usage: bool | None = None
    """Send one more chunk at the end, without choices, with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far with every chunk."""
    include_obfuscation: bool | None = None
    """Accepted, and without effect."""


class Sampling(Strict):
    """What all three ways to generate share."""

    default_temperature: ClassVar[float] = 1.0

    model: str | None = None
    """Which model answers: an id of GET /v1/models, or `latest`, which is also the default."""
    max_tokens: MaxTokens | None = None
    """Tokens to generate at most, besides those of the prompt. Default: 16 for /v1/completions, 256 for /generate, the
    rest of the context for chats."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token each time. Default: 1 for /v1, 0 for /generate."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample among the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Sample among so many of the likeliest tokens; 0 and -1 switch it off."""
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    """The same seed gives the same answer."""
    stop: Stop = ()
    ignore_eos: bool | None = None
    """Go on behind the token that ends an answer, up to max_tokens."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is made."""
    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _only_in_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only allowed with stream: true; remove it or set stream")
        return value


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is another name for `system`."""
    content: Content
    name: str | None = None
    """Accepted, and not shown to the model."""
    refusal: Annotated[Any, Only(None)] = None
    annotations: Annotated[Any, Only(None, [])] = None
    audio: Annotated[Any, Only(None)] = None
    function_call: Annotated[Any, Only(None)] = None
    tool_calls: Annotated[Any, Only(None, [])] = None


class GenerateRequest(Sampling):
    """POST /generate: raw text in `prompt`, or a conversation in `messages`. Greedy unless a temperature is given."""

    default_temperature: ClassVar[float] = 0.0

    prompt: str | None = None
    """Text that the model continues, as it stands."""
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    """A conversation, rendered through the model's chat template."""


class OpenAiRequest(Sampling):
    """Fields of both OpenAI endpoints. The first ones change no answer, the rest are not implemented yet."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    n: Annotated[Any, Only(None, 1)] = None
    presence_penalty: Annotated[Any, Only(None, 0)] = None
    frequency_penalty: Annotated[Any, Only(None, 0)] = None
    logit_bias: Annotated[Any, Only(None, {})] = None
    min_p: Annotated[Any, Only(None, 0)] = None
    repetition_penalty: Annotated[Any, Only(None, 1)] = None
    min_tokens: Annotated[Any, Only(None, 0)] = None
    include_stop_str_in_output: Annotated[Any, Only(None, False)] = None
    skip_special_tokens: Annotated[Any, Only(None, True)] = None


class CompletionRequest(OpenAiRequest):
    """POST /v1/completions. `max_tokens` is 16 by default."""

    prompt: Prompts
    best_of: Annotated[Any, Only(None, 1)] = None
    echo: Annotated[Any, Only(None, False)] = None
    logprobs: Annotated[Any, Only(None)] = None
    suffix: Annotated[Any, Only(None, "")] = None


class ChatRequest(OpenAiRequest):
    """POST /v1/chat/completions. `max_tokens` is the rest of the context by default."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    """Today's name of `max_tokens`."""
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None

    logprobs: Annotated[Any, Only(None, False)] = None
    top_logprobs: Annotated[Any, Only(None, 0)] = None
    response_format: Annotated[Any, Only(None, {"type": "text"})] = None
    tools: Annotated[Any, Only(None, [])] = None
    tool_choice: Annotated[Any, Only(None, "none", "auto")] = None
    functions: Annotated[Any, Only(None, [])] = None
    function_call: Annotated[Any, Only(None, "none", "auto")] = None
    modalities: Annotated[Any, Only(None, ["text"])] = None
    audio: Annotated[Any, Only(None)] = None
    reasoning_effort: Annotated[Any, Only(None, "none")] = None
    verbosity: Annotated[Any, Only(None, "medium")] = None
    web_search_options: Annotated[Any, Only(None)] = None
    moderation: Annotated[Any, Only(None)] = None
    add_generation_prompt: Annotated[Any, Only(None, True)] = None
    continue_final_message: Annotated[Any, Only(None, False)] = None
    chat_template_kwargs: Annotated[Any, Only(None, {})] = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError(f"max_tokens says {info.data['max_tokens']}: send one of the two")
        return value
