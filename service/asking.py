"""From what a client sends to what the engine is asked, for every endpoint: token ids, room and sampling, or a 400."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from lm.errors import UserError
from lm.messages import Message
from lm.template import RenderOptions
from lm.tokenizer import Tokenizer
from service.codec import Codec
from service.engine.messages import SamplingParams
from service.errors import ApiError
from service.generation import Ask
from service.grammar_checker import GrammarChecker
from service.schemas.fields import MAX_ANSWERS
from service.schemas.requests import BaseSampling
from service.services import Services
from service.structured_output import Constraint, check_constraint, constraint_of
from service.tools.plan import ToolPlan

GREEDY_BELOW = 1e-5  # a smaller temperature overflows what it divides


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation, and how it is rendered."""

    messages: Sequence[Message]
    options: RenderOptions = field(default_factory=RenderOptions)


Prompt = str | tuple[int, ...] | Chat
"""Text, token ids, or a conversation."""


async def ask(
    services: Services,
    prompts: Sequence[Prompt],
    options: BaseSampling,
    *,
    max_tokens: int | None,
    default_max_tokens: int | None = None,
    param: str,
    plan: ToolPlan | None = None,
    constraint: Constraint | None = None,
    add_special_tokens: bool = True,
) -> list[Ask]:
    """One for each prompt. Without a default, `max_tokens` None is the rest of the context.

    `param` is the field that the prompts stand in; `plan` is what the tools of a conversation mean, `constraint` what
    the answer must look like beside what `options` say of it. Raises UserError and ApiError: 400 for what cannot be
    served, 503 while there is no engine.
    """
    engine, codec = services.generator.ready_engine(), services.codec
    if len(prompts) * options.num_made > MAX_ANSWERS:
        message = (
            f"{param}: {len(prompts)} x {options.num_made} answers are more than {MAX_ANSWERS}: send fewer at once"
        )
        raise UserError(message, param=param)
    wanted = [found for found in (constraint, constraint_of(options)) if found is not None]
    grammar = await _grammar(services.grammar_checker, wanted, plan)
    shared = _sampling(codec, options, grammar)
    shows_special = options.skip_special_tokens is False or (plan is not None and not plan.skip_special_tokens)
    asks = []
    for prompt in prompts:
        _check_length(codec, prompt, engine.max_model_len, param)
        prompt_ids = await _encode(codec, prompt, param, add_special_tokens=add_special_tokens)
        limit = _limit(len(prompt_ids), max_tokens, default_max_tokens, engine.max_model_len, param)
        if shared.min_tokens > limit:
            reason = f"min_tokens: {shared.min_tokens} are more than the {limit} that the answer may have at most"
            raise UserError(reason, param="min_tokens")
        asks.append(
            Ask(
                prompt_ids=prompt_ids,
                sampling=msgspec.structs.replace(shared, max_tokens=limit),
                n=options.num_made,
                stop=options.stop,
                stop_token_ids=tuple(options.stop_token_ids or ()),
                include_stop=bool(options.include_stop_str_in_output),
                skip_special_tokens=not shows_special,
                prompt_text=prompt if isinstance(prompt, str) else None,
            )
        )
    return asks


async def _grammar(checker: GrammarChecker, wanted: Sequence[Constraint], plan: ToolPlan | None) -> str | None:
    """One grammar for all that is asked of an answer; where tools may be called, a call is the other way to answer."""
    if len(wanted) > 1:
        first, second = wanted
        reason = f"{first.param} says already what the answer is: send one of them"
        raise UserError(f"{second.param}: {reason}", param=second.param)
    constraint = wanted[0] if wanted else None
    if constraint is not None:
        await check_constraint(constraint, checker)
    if plan is None or not plan.may_call:
        return None if constraint is None else constraint.grammar
    if constraint is None or plan.must_call:
        grammar, param = plan.grammar, "tools"
    else:
        grammar, param = plan.grammar_beside(constraint.grammar), constraint.param
    if grammar is not None:
        await check_constraint(Constraint(grammar=grammar, param=param), checker)
    return grammar


def _check_length(codec: Codec, prompt: Prompt, context: int, param: str) -> None:
    """Refuse what cannot fit before it is encoded, which takes seconds for each megabyte. Raises ApiError."""
    if isinstance(prompt, tuple):
        return
    texts = [prompt] if isinstance(prompt, str) else [message.get("content") or "" for message in prompt.messages]
    if (num_chars := sum(map(len, texts))) > context * codec.longest_token:
        raise ApiError(
            400,
            f"{param}: its {num_chars} characters cannot fit into the context of {context} tokens: shorten it",
            param=param,
            code="context_length_exceeded",
        )


async def _encode(codec: Codec, prompt: Prompt, param: str, *, add_special_tokens: bool) -> list[int]:
    try:
        if isinstance(prompt, str):
            ids = await codec.encode(prompt, add_special_tokens=add_special_tokens)
        elif isinstance(prompt, tuple):
            ids = codec.check_ids(prompt)
        else:
            ids = await codec.encode_chat(prompt.messages, **prompt.options)
    except UserError as error:
        if error.param is not None:
            raise
        raise UserError(f"{param}: {error}", param=param) from error
    if not ids:
        raise UserError(f"{param}: it is empty, and the model needs a token to start from", param=param)
    return ids


def _limit(num_prompt: int, max_tokens: int | None, default: int | None, context: int, param: str) -> int:
    """How many tokens are generated at most. Raises ApiError when prompt and answer do not fit into the context."""
    room = context - num_prompt
    if room < (0 if max_tokens == 0 else 1):
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
    return min(room, default or room) if max_tokens is None else max_tokens


def _sampling(codec: Codec, options: BaseSampling, grammar: str | None) -> SamplingParams:
    """All but `max_tokens`. The tokenizer's end tokens end an answer beside those of the checkpoint's config: training
    teaches the former."""
    temperature = _or(options.temperature, options.default_temperature)
    top_p = _or(options.top_p, 1.0)
    greedy = temperature < GREEDY_BELOW or top_p == 0
    ends = () if options.ignore_eos else codec.tokenizer.eos_token_ids
    stops = _known(codec, "stop_token_ids", options.stop_token_ids or ())
    allowed = options.allowed_token_ids
    biases = options.logit_bias or {}
    _known(codec, "logit_bias", biases)
    is_ranked = options.num_made > options.num_returned
    return SamplingParams(
        max_tokens=0,
        min_tokens=options.min_tokens or 0,
        temperature=0.0 if greedy else temperature,
        top_p=top_p or 1.0,
        top_k=max(0, options.top_k or 0),
        min_p=options.min_p or 0.0,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        repetition_penalty=_or(options.repetition_penalty, 1.0),
        logit_bias=biases,
        seed=options.seed,
        ignore_eos=bool(options.ignore_eos),
        stop_token_ids=tuple(dict.fromkeys((*ends, *stops))),
        bad_words=_bad_words(codec.tokenizer, options.bad_words or ()),
        allowed_token_ids=None if allowed is None else _known(codec, "allowed_token_ids", allowed),
        logprobs=0 if is_ranked and options.num_logprobs is None else options.num_logprobs,
        prompt_logprobs=options.num_prompt_logprobs,
        grammar=grammar,
    )


def _known(codec: Codec, param: str, ids: Iterable[int]) -> tuple[int, ...]:
    """The token ids in the field `param`, each once. Raises UserError for one that the model does not have."""
    try:
        return tuple(codec.check_ids(list(dict.fromkeys(ids))))
    except UserError as error:
        raise UserError(f"{param}: {error}", param=param) from error


def _bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written at the start of a text and behind a space, as vLLM takes them."""
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        try:
            alone, behind = (tokenizer.encode(space + word, add_special_tokens=False) for space in ("", " "))
        except UserError as error:
            raise UserError(f"bad_words.{index}: {error}", param="bad_words") from error
        found[tuple(alone)] = None
        if behind[-len(alone) :] != alone:  # else it is found already
            found[tuple(behind)] = None
    return tuple(found)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
