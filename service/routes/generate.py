"""POST /generate: an answer with the figures of how it was made."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from starlette.responses import Response

from lm.errors import UserError
from service.asking import Prompt, ask
from service.generation import Answer
from service.routes.chat import plain
from service.routes.completions import KIND, chunk_choices, whole_choices
from service.routes.replies import STREAMED, Reply, chunks, last_chunk, new_reply
from service.schemas.answers import GenerateAnswer, GenerationMetrics
from service.schemas.requests import GenerateRequest, StreamOptions
from service.services import Services, ServicesDep
from service.sse import DONE, event, event_stream, unless_gone

DEFAULT_MAX_TOKENS = 256
GB = 1e9

router = APIRouter(tags=["Generate"])


@router.post("/generate", response_model=GenerateAnswer, responses=STREAMED)
async def generate(body: GenerateRequest, request: Request, services: ServicesDep) -> GenerateAnswer | Response:
    """Answer `messages`, or continue `prompt` as it stands; with the speed, the bandwidth and the memory it took."""
    prompt, param = _prompt(body)
    asks = await ask(
        services.codec,
        services.generator.ready_engine(),
        [prompt],
        body,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        param=param,
    )
    answers = services.generator.answers_for(asks)
    reply = new_reply(services, request, answers, model=body.model, prefix="cmpl")
    if body.stream:
        return await event_stream(request.receive, _events(reply, body))
    texts = await unless_gone(request.receive, reply.texts())
    return GenerateAnswer(
        **reply.head(KIND),
        choices=whole_choices(reply, texts),
        usage=reply.usage(),
        metrics=_metrics(services, answers[0]),
    )


def _prompt(body: GenerateRequest) -> tuple[Prompt, str]:
    """What to answer, and the field it stands in. Raises UserError unless there is exactly one."""
    if body.prompt is not None and body.messages is None:
        return body.prompt, "prompt"
    if body.messages is not None and body.prompt is None:
        return plain(body.messages), "messages"
    given = "both are given" if body.prompt is not None else "neither is given"
    raise UserError(f"prompt: send either prompt, as raw text, or messages, as a chat; {given}", param="prompt")


async def _events(reply: Reply, body: GenerateRequest) -> AsyncGenerator[bytes]:
    """As /v1/completions has them; the chunk with the usage always comes, and brings the metrics."""
    options = (body.stream_options or StreamOptions()).model_copy(update={"include_usage": False})
    async for item in chunks(reply, KIND, options, chunk_choices):
        yield item
    metrics = _metrics(reply.services, reply.answers[0])
    yield event({**last_chunk(reply, KIND), "metrics": metrics.model_dump()})
    yield DONE


def _metrics(services: Services, answer: Answer) -> GenerationMetrics:
    """The first four are torchtune's figures and formulas for one request: the prompt's time counts, too."""
    assert answer.entry is not None
    stats = services.engine.stats
    total_s = (answer.last_token or time.monotonic()) - answer.started
    tokens_per_second = answer.num_tokens / total_s
    timing = answer.timing
    decode_bandwidth = None if timing is None else _rate(timing.decode_bytes, timing.decode_s)
    return GenerationMetrics(
        time_to_first_token_s=None if answer.first_token is None else answer.first_token - answer.started,
        total_time_s=total_s,
        tokens_per_second=tokens_per_second,
        bandwidth_gb_s=services.serving.weight_bytes(answer.entry.id) * tokens_per_second / GB,
        decode_tokens_per_second=None if timing is None else _rate(timing.decode_tokens, timing.decode_s),
        decode_bandwidth_gb_s=decode_bandwidth and decode_bandwidth / GB,
        bandwidth_utilization=decode_bandwidth and decode_bandwidth / answer.engine.peak_bandwidth,
        peak_bandwidth_gb_s=answer.engine.peak_bandwidth / GB,
        peak_bandwidth_source=answer.engine.peak_bandwidth_source,
        memory_used_gb=None if stats is None else stats.device_memory_bytes / GB,
        device=answer.engine.device,
        model=answer.entry.id,
    )


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if amount > 0 and seconds > 0 else None
