"""From what a client sends to what the engine is asked, for every endpoint: token ids, room and sampling, or a 400."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lm.errors import UserError
from service.codec import Codec
from service.engine.messages import EngineReady, SamplingParams
from service.errors import ApiError
from service.generation import Ask
from service.schemas.requests import Sampling

GREEDY_BELOW = 1e-5  # a smaller temperature overflows what it divides

Prompt = str | tuple[int, ...] | list[Mapping[str, str]]
"""Text, token ids, or the messages of a conversation."""


async def ask(
    codec: Codec,
    engine: EngineReady,
    prompts: Sequence[Prompt],
    options: Sampling,
    *,
    max_tokens: int | None,
    default_max_tokens: int | None = None,
    param: str,
) -> list[Ask]:
    """One for each prompt. Without a default, `max_tokens` None is the rest of the context.

    `param` is the field that the prompts stand in. Raises UserError and ApiError: 400 for what cannot be served.
    """
    asks = []
    for prompt in prompts:
        prompt_ids = await _encode(codec, prompt, param)
        room = _room(len(prompt_ids), max_tokens, engine.max_model_len, param)
        limit = max_tokens or min(room, default_max_tokens or room)
        sampling = _sampling(options, limit, codec.tokenizer.eos_token_ids)
        asks.append(Ask(prompt_ids=prompt_ids, sampling=sampling, stop=options.stop))
    return asks


async def _encode(codec: Codec, prompt: Prompt, param: str) -> list[int]:
    try:
        if isinstance(prompt, str):
            ids = await codec.encode(prompt)
        elif isinstance(prompt, tuple):
            ids = codec.check_ids(prompt)
        else:
            ids = await codec.encode_chat(prompt)
    except UserError as error:
        message = str(error)
        message = message if message.startswith(param) else f"{param}: {message}"
        raise UserError(message, param=error.param or param) from error
    if not ids:
        raise UserError(f"{param}: it is empty, and the model needs a token to start from", param=param)
    return ids


def _room(num_prompt: int, max_tokens: int | None, context: int, param: str) -> int:
    """How many tokens could be generated. Raises ApiError when prompt and answer do not fit into the context."""
    room = context - num_prompt
    if room < 1:
        raise ApiError(
            400,
            f"{param}: it has {num_prompt} tokens, and prompt and answer together may have {context}: shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise ApiError(
            400,
            f"max_tokens: {num_prompt} tokens in {param} and {max_tokens} for the answer exceed the context of "
            f"{context} tokens: lower max_tokens to {room}, or shorten {param}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room


def _sampling(options: Sampling, max_tokens: int, eos_token_ids: tuple[int, ...]) -> SamplingParams:
    """The tokenizer's end tokens end an answer beside those of the checkpoint's config: training teaches the former."""
    temperature = options.default_temperature if options.temperature is None else options.temperature
    top_p = 1.0 if options.top_p is None else options.top_p
    greedy = temperature < GREEDY_BELOW or top_p == 0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        top_p=top_p or 1.0,
        top_k=max(0, options.top_k or 0),
        seed=options.seed,
        ignore_eos=bool(options.ignore_eos),
        stop_token_ids=() if options.ignore_eos else eos_token_ids,
    )
