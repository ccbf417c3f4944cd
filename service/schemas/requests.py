"""Bodies of the requests that generate. An unknown field is refused by name; one that cannot be served, by value.

Null means the default, as OpenAI's clients send it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from service.schemas.fields import (
    MAX_BAD_WORDS,
    MAX_MESSAGES,
    MAX_N,
    MAX_STOP_TOKENS,
    BadWord,
    LogitBias,
    MaxTokens,
    NumLogprobs,
    Only,
    Prompts,
    Stop,
    TokenId,
)
from service.schemas.messages import MAX_TOOLS, Message, Tool, ToolChoice
from service.schemas.structured import ResponseFormat, StructuredOutputs
from trainer.strict import Strict

INT64 = 2**63

Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    """Send one more chunk at the end, without choices, with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far with every chunk."""
    include_obfuscation: bool | None = None
    """Accepted, and without effect."""


class BaseSampling(Strict):
    """How an answer is made, in OpenAI's parameters and in those that vLLM has beside them."""

    default_temperature: ClassVar[float] = 1.0

    model: str | None = None
    """Which model answers: an id of GET /v1/models, or `latest`, which is also the default."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """Before so many tokens nothing ends the answer."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token each time. Default: 1 for /v1, 0 for /generate."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample among the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Sample among so many of the likeliest tokens; 0 and -1 switch it off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Leave out tokens less likely than this share of the likeliest one."""
    presence_penalty: Penalty | None = None
    """Subtracted from the logit of each token that the answer has already."""
    frequency_penalty: Penalty | None = None
    """Subtracted once for each time that the answer has the token."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Above 1 it makes tokens of the prompt and the answer less likely; logits are divided by it."""
    logit_bias: LogitBias = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    """Words that are not written. They are compared as tokens: another spelling in tokens is not seen."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    """The only tokens to choose from."""
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    """The same seed gives the same answer."""
    stop: Stop = ()
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    """Tokens that end the answer, and are not part of its text."""
    include_stop_str_in_output: bool | None = None
    """Show what ended the answer, a stop string or a stop token."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; true by default."""
    ignore_eos: bool | None = None
    """Go on behind the token that ends an answer, up to the limit."""
    structured_outputs: StructuredOutputs | None = None
    """Makes the answer JSON of a schema, match a regular expression, be one of some texts, or follow a grammar; as vLLM
    has it."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is made."""

    @property
    def num_returned(self) -> int:
        """Answers to each prompt."""
        return 1

    @property
    def num_made(self) -> int:
        """Of which so many are returned."""
        return self.num_returned

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are wanted beside each token of the answer; None is no log probabilities at all."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt."""
        return None


class Sampling(BaseSampling):
    """What /v1/completions, /v1/chat/completions and /generate share."""

    max_tokens: MaxTokens | None = None
    """Tokens to generate at most, besides those of the prompt. Default: 16 for /v1/completions, 256 for /generate, the
    rest of the context for chats."""
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    """Answers to each prompt. With temperature 0 they are all the same."""
    response_format: ResponseFormat | None = None
    """`json_object` and `json_schema` make the answer JSON, the latter one that follows the schema."""
    guided_json: str | dict[str, Any] | None = None
    """An older name of `structured_outputs.json`, as are the next three."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: NumLogprobs | None = None
    """The log probabilities of the prompt's tokens, with so many alternatives. Not in a stream."""
    return_token_ids: bool | None = None
    """Add the ids of the prompt and of the answer to each choice."""

    use_beam_search: Annotated[Any, Only(None, False)] = None
    length_penalty: Annotated[Any, Only(None, 1)] = None
    priority: Annotated[Any, Only(None, 0)] = None
    truncate_prompt_tokens: Annotated[Any, Only(None, mend="shorten the prompt; POST /tokenize counts")] = None
    spaces_between_special_tokens: Annotated[Any, Only(None, True)] = None
    detokenize: Annotated[Any, Only(None, True)] = None
    return_tokens_as_token_ids: Annotated[Any, Only(None, False, mend="send return_token_ids")] = None

    @field_validator("stream_options")
    @classmethod
    def _only_in_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only allowed with stream: true; remove it or set stream")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _whole(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise ValueError("they do not come in a stream: remove it, or stream")
        return value

    @property
    def num_returned(self) -> int:
        return self.n or 1

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs


class Conversation(Strict):
    """How messages become a prompt, and what may be called in the answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    """A conversation, rendered through the model's chat template."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    """Functions that the answer may call."""
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    """Whether one answer may call several times; true by default."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, beside its own."""
    add_generation_prompt: bool | None = None
    """End the prompt where the assistant's turn begins; true by default."""
    continue_final_message: bool | None = None
    """Let the answer go on where the last message ends, instead of beginning a new one."""

    @field_validator("continue_final_message")
    @classmethod
    def _no_new_turn(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("add_generation_prompt is true, and begins a new message: send one of the two")
        return value


class TextAnswer(Sampling):
    """What /v1/completions and /generate share."""

    logprobs: NumLogprobs | None = None
    """The log probability of each token, and of so many of the likeliest ones."""
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    """Make so many answers, and return the `n` whose tokens are likeliest on average. Not in a stream."""
    echo: bool | None = None
    """Begin the text with the prompt; log probabilities are those of its tokens, too."""
    suffix: Annotated[Any, Only(None, "", mend="the models served here do not fill in")] = None

    @field_validator("best_of")
    @classmethod
    def _enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n") or 1
        if value is not None and value < n:
            raise ValueError(f"must be at least n, which is {n}")
        if value is not None and value > n and info.data.get("stream"):
            raise ValueError("the best answers are known at the end only: remove it or stream")
        return value

    @property
    def num_made(self) -> int:
        return self.best_of or self.num_returned

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)


class GenerateRequest(Conversation, TextAnswer):
    """POST /generate: raw text in `prompt`, or a conversation in `messages`. Greedy unless a temperature is given."""

    default_temperature: ClassVar[float] = 0.0

    prompt: Prompts | None = None


class OpenAiRequest(Sampling):
    """Fields of both OpenAI endpoints that change no answer."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


class CompletionRequest(TextAnswer, OpenAiRequest):
    """POST /v1/completions. `max_tokens` is 16 by default."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens to generate at most, besides those of the prompt. 0 only with `echo`, for the prompt's log probabilities."""
    add_special_tokens: bool | None = None
    """Begin a prompt that is text as the model wants it, such as with a BOS token; true by default."""


class ChatRequest(Conversation, OpenAiRequest):
    """POST /v1/chat/completions. `max_tokens` is the rest of the context by default."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    """Today's name of `max_tokens`."""
    logprobs: bool | None = None
    """Return the log probability of each token."""
    top_logprobs: NumLogprobs | None = None
    """And those of so many of the likeliest ones."""
    prediction: dict[str, Any] | None = None
    """Accepted, and without effect."""

    functions: Annotated[Any, Only(None, [], mend="send tools, which came after it")] = None
    function_call: Annotated[Any, Only(None, "none", "auto", mend="send tool_choice, which came after it")] = None
    modalities: Annotated[Any, Only(None, ["text"])] = None
    audio: Annotated[Any, Only(None)] = None
    reasoning_effort: Annotated[Any, Only(None, "none")] = None
    verbosity: Annotated[Any, Only(None, "medium")] = None
    web_search_options: Annotated[Any, Only(None)] = None
    moderation: Annotated[Any, Only(None)] = None
    echo: Annotated[Any, Only(None, False)] = None
    add_special_tokens: Annotated[Any, Only(None, False, mend="the chat template writes them")] = None
    documents: Annotated[Any, Only(None, [])] = None
    chat_template: Annotated[Any, Only(None, mend="the model's own is used")] = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError(f"max_tokens says {info.data['max_tokens']}: send one of the two")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs: true")
        return value

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
