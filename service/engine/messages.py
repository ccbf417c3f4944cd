"""What the API process and the engine process say to each other. Torch-free, since both sides import it.

The engine is started as `python -m service.engine FD`, where FD is its end of a Unix socket pair. Each frame is a
4-byte big-endian length and a msgpack map. The first frame to the engine is `EngineConfig`; it answers with
`EngineReady` (or dies, with the reason in its log). A closed socket means that the other side is gone.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort"]
SwapMode = Literal["auto", "overlap", "drain"]

MAX_FRAME_BYTES = 256 << 20


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of every message; the class name is the tag on the wire."""


# ---- API process -> engine


class EngineConfig(Message, frozen=True):
    device: str
    """`auto`, `cpu`, `cuda`, `cuda:N`, `npu`, `npu:N`."""
    dtype: str
    """`auto`, `fp32`, `bf16`, `fp16`."""
    base_dir: str
    """The HF folder of the base model: fixes the architecture that this engine serves."""
    max_num_seqs: int
    """Requests that decode in one batch."""
    max_model_len: int | None = None
    """Longest prompt plus answer, in tokens; None takes the model's own limit."""
    kv_cache_bytes: int | None = None
    """Size of the KV pool; None lets the engine choose from the device's free memory."""
    max_num_batched_tokens: int = 256
    """Tokens that one step computes at most: one for each decoding request, and what is left for prompts, of which at
    least one block goes on. Decoding requests never wait longer than this."""
    swap: SwapMode = "auto"
    num_threads: int | None = None
    """CPU threads; None takes all cores."""
    memory_fraction: float | None = None
    """Share of the device's memory that the engine may take, where a trainer uses it too; None is all. Not on a CPU."""
    seed: int = 0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one answer is made. The engine takes every combination; what users may ask is checked before."""

    max_tokens: int
    """0 computes the prompt and samples nothing."""
    min_tokens: int = 0
    """Before so many tokens no token that ends the answer is chosen."""
    temperature: float = 1.0
    """0 is greedy: argmax of the logits after penalties, bias and masks."""
    top_p: float = 1.0
    top_k: int = 0
    """0 switches it off."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are left out; 0 switches it off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer has already."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the answer has the token."""
    repetition_penalty: float = 1.0
    """Of each token in prompt or answer a positive logit is divided by it, a negative one multiplied (CTRL, 2019)."""
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """Random numbers are keyed by (seed, choice, position), so a batch does not change them. None draws a seed."""
    choice: int = 0
    """Which of the answers to one prompt this is."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token is not chosen where the others stand before it."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens to choose from; None is all."""
    logprobs: int | None = None
    """With each token its log probability, and those of so many of the likeliest tokens. None is none of it."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    grammar: str | None = None
    """A grammar of llguidance that the answer follows."""


class AddRequest(Message, frozen=True):
    request_id: str
    model_id: str
    prompt_ids: list[int]
    sampling: SamplingParams


class AbortRequest(Message, frozen=True):
    request_id: str


class LoadModel(Message, frozen=True):
    """Load weights under a new name. Requests that name `model_id` may follow at once: they wait for the load.

    `replaces` names weights that make room: where memory does not hold two sets, the new ones are loaded into their
    place once their last request has finished (drain); requests for the old name that come meanwhile are answered as
    `unavailable` then, or served after all if the load fails. Otherwise (overlap) the old ones stay until UnloadModel.
    """

    model_id: str
    base_dir: str
    adapter_dir: str | None = None
    """A PEFT folder, merged into the base in fp32 while loading."""
    replaces: str | None = None


class UnloadModel(Message, frozen=True):
    """Drop weights once the last request that uses them has finished."""

    model_id: str


class Shutdown(Message, frozen=True):
    """Stop at once; requests still running are answered with `abort`."""


Command = EngineConfig | AddRequest | AbortRequest | LoadModel | UnloadModel | Shutdown


# ---- engine -> API process


class EngineReady(Message, frozen=True):
    device: str
    device_name: str
    device_reason: str
    dtype: str
    dtype_reason: str
    ops: dict[str, str]
    """Op name -> chosen variant and its reason."""
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    peak_bandwidth: float
    """Bytes per second that the device can read."""
    peak_bandwidth_source: Literal["measured", "assumed"]
    torch_version: str
    memory_total: int = 0
    """Bytes that the device has; 0 is not known."""
    memory_needed: int = 0
    """Those that the engine takes at most: the KV pool, and as many sets of weights as it makes room for."""


class ModelLoaded(Message, frozen=True):
    model_id: str
    weights_hash: str
    """First 16 hex digits of a SHA-256 over the served tensors."""
    weight_bytes: int
    seconds: float
    mode: Literal["overlap", "drain"]


class ModelLoadFailed(Message, frozen=True):
    """The old weights still serve."""

    model_id: str
    message: str


class ModelUnloaded(Message, frozen=True):
    model_id: str


class Logprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Natural logarithms of the model's own distribution, before penalties, bias, masks and temperature."""

    logprob: float
    """Of the token itself."""
    top_ids: tuple[int, ...]
    """The likeliest tokens, the first one first. The token itself need not be among them."""
    top_logprobs: tuple[float, ...]
    rank: int
    """Of the token itself; 1 is the likeliest."""


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    request_id: str
    token_ids: tuple[int, ...]
    """New tokens of this step, an end-of-sequence token included. Empty while only prompt log probabilities come."""
    logprobs: tuple[Logprobs, ...] = ()
    """One for each of `token_ids`, if asked for."""
    prompt_logprobs: tuple[Logprobs, ...] = ()
    """Of the prompt's tokens that this step computed, in order from the prompt's second token on; if asked for."""
    num_cached_tokens: int | None = None
    """Prompt tokens that were not computed, since the cache had them; with the first output only."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that ended the request: the last of `token_ids`, not part of the text."""
    timing: RequestTiming | None = None
    """With the finish reason only."""


class RequestTiming(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds on the engine's clock, and what the device moved for the batch while this request was decoding."""

    queue_s: float
    prefill_s: float
    decode_s: float
    decode_tokens: int
    """Tokens after the first one."""
    num_preempted: int = 0
    """How often its blocks were taken and it was computed again."""
    decode_bytes: int
    """Bytes read by the decode steps this request took part in: weights once a step, plus the KV really read."""


class StepStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    num_running: int
    num_waiting: int
    """Those that wait for weights or for a grammar included."""
    used_blocks: int
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    decode_bytes: int
    device_memory_bytes: int
    num_preempted: int = 0
    num_deferred: int = 0
    """Those that wait for something else than a place in the batch: weights, a grammar."""
    num_sampled: int = 0
    """Tokens generated in this step: one for each decoding request, and one where a prefill ended."""
    num_prefix_queries: int = 0
    """Prompt tokens of the requests that began in this step, for which the prefix cache was asked."""
    num_prefix_hits: int = 0
    """Those among them that the cache had."""


class StepOutput(Message, frozen=True, gc=False):
    """One message per engine step."""

    outputs: list[TokenOutput]
    stats: StepStats


class RequestFailed(Message, frozen=True):
    """This request could not be served (unknown model, refused at admission, error in its step)."""

    request_id: str
    message: str
    kind: Literal["invalid", "unavailable", "internal"]


Event = EngineReady | ModelLoaded | ModelLoadFailed | ModelUnloaded | StepOutput | RequestFailed

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """One frame: length and body."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def decode_command(body: bytes | bytearray) -> Command:
    return _command_decoder.decode(body)


def decode_event(body: bytes | bytearray | memoryview) -> Event:
    return _event_decoder.decode(body)
