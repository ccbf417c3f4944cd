"""POST /generate: an answer with the figures of how it was made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lm.errors import UserError
from service.asking import Prompt, ask
from service.generation import Answer
from service.routes.completions import KIND, whole_choices
from service.routes.conversations import plan_chat
from service.routes.replies import STREAMED, Reply, answered, chunks, new_reply
from service.routes.text_choices import TextChoices
from service.schemas.answers import GenerateAnswer, GenerationMetrics
from service.schemas.requests import Conversation, GenerateRequest
from service.services import Services, ServicesDep
from service.sse import event_stream, unless_gone
from service.tools.plan import ToolPlan

DEFAULT_MAX_TOKENS = 256
GB = 1e9

router = APIRouter(tags=["Generate"])


@router.post("/generate", response_model=GenerateAnswer, responses=STREAMED)
async def generate(body: GenerateRequest, request: Request, services: ServicesDep) -> Response:
    """Answer `messages`, or continue `prompt` as it stands; with the speed, the bandwidth and the memory it took."""
    prompts, param, plan = _prompts(services, body)
    asks = await ask(
        services,
        prompts,
        body,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        param=param,
        plan=plan,
    )
    reply = new_reply(services, request, services.generator.answers_for(asks), model=body.model, prefix="cmpl")
    choices = TextChoices(services.codec, body, plan)
    if body.stream:
        summary = partial(_summary, services, reply)
        return await event_stream(request.receive, chunks(reply, KIND, body.stream_options, choices, summary=summary))
    texts = await unless_gone(request.receive, reply.texts())
    metrics = _metrics(services, reply.answers)

    def whole() -> GenerateAnswer:
        told = whole_choices(choices, reply.answers, texts, body.num_returned)
        return GenerateAnswer(**reply.head(KIND), choices=told, usage=reply.usage(), metrics=metrics)

    return await answered(reply, whole)


def _prompts(services: Services, body: GenerateRequest) -> tuple[Sequence[Prompt], str, ToolPlan | None]:
    """What to answer, the field it stands in, and what its tools mean. Raises UserError unless there is exactly one."""
    if body.prompt is not None and body.messages is None:
        _refuse_beside_prompt(body)
        return body.prompt, "prompt", None
    if body.messages is not None and body.prompt is None:
        chat, plan = plan_chat(services.codec, body)
        return [chat], "messages", plan
    given = "both are given" if body.prompt is not None else "neither is given"
    raise UserError(f"prompt: send either prompt, as raw text, or messages, as a chat; {given}", param="prompt")


def _refuse_beside_prompt(body: GenerateRequest) -> None:
    for name in Conversation.model_fields:
        if getattr(body, name):
            raise UserError(f"{name}: it goes with messages, and the request has a prompt: remove it", param=name)


def _summary(services: Services, reply: Reply) -> dict[str, Any]:
    """What the last chunk of a stream tells beside the usage."""
    return {"metrics": _metrics(services, reply.answers).model_dump()}


def _metrics(services: Services, answers: Sequence[Answer]) -> GenerationMetrics:
    """The first four are torchtune's figures and formulas for one request: the prompt's time counts, too.

    Several answers decode together: their tokens add up, the bytes of a step count once.
    """
    first = answers[0]
    assert first.entry is not None
    stats = services.engine.stats
    total_s = max(answer.last_token or time.monotonic() for answer in answers) - first.started
    tokens_per_second = sum(answer.num_tokens for answer in answers) / total_s
    timings = [answer.timing for answer in answers if answer.timing is not None]
    decode_s = max((timing.decode_s for timing in timings), default=0.0)
    decode_bandwidth = _rate(max((timing.decode_bytes for timing in timings), default=0), decode_s)
    first_tokens = [answer.first_token for answer in answers if answer.first_token is not None]
    return GenerationMetrics(
        time_to_first_token_s=min(first_tokens) - first.started if first_tokens else None,
        total_time_s=total_s,
        tokens_per_second=tokens_per_second,
        bandwidth_gb_s=services.serving.weight_bytes(first.entry.id) * tokens_per_second / GB,
        decode_tokens_per_second=_rate(sum(timing.decode_tokens for timing in timings), decode_s),
        decode_bandwidth_gb_s=decode_bandwidth and decode_bandwidth / GB,
        bandwidth_utilization=decode_bandwidth and decode_bandwidth / first.engine.peak_bandwidth,
        peak_bandwidth_gb_s=first.engine.peak_bandwidth / GB,
        peak_bandwidth_source=first.engine.peak_bandwidth_source,
        memory_used_gb=None if stats is None else stats.device_memory_bytes / GB,
        device=first.engine.device,
        model=first.entry.id,
    )


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if amount > 0 and seconds > 0 else None
