"""POST /v1/completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from fastapi import APIRouter, Request
from starlette.responses import Response

from lm.errors import UserError
from service.asking import ask
from service.generation import Answer
from service.routes.replies import STREAMED, answered, chunks, new_reply
from service.routes.text_choices import TextChoices
from service.schemas.answers import Completion, CompletionChoice
from service.schemas.requests import CompletionRequest
from service.services import ServicesDep
from service.sse import event_stream, unless_gone

KIND = "text_completion"
DEFAULT_MAX_TOKENS = 16

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def create_completion(body: CompletionRequest, request: Request, services: ServicesDep) -> Response:
    """Continue one or more prompts."""
    if body.max_tokens == 0 and not body.echo:
        raise UserError("max_tokens: 0 makes no answer; it is allowed with echo: true only", param="max_tokens")
    asks = await ask(
        services,
        body.prompt,
        body,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        param="prompt",
        add_special_tokens=body.add_special_tokens is not False,
    )
    reply = new_reply(services, request, services.generator.answers_for(asks), model=body.model, prefix="cmpl")
    choices = TextChoices(services.codec, body)
    if body.stream:
        return await event_stream(request.receive, chunks(reply, KIND, body.stream_options, choices))
    texts = await unless_gone(request.receive, reply.texts())

    def whole() -> Completion:
        told = whole_choices(choices, reply.answers, texts, body.num_returned)
        return Completion(**reply.head(KIND), choices=told, usage=reply.usage())

    return await answered(reply, whole)


def whole_choices(
    choices: TextChoices, answers: Sequence[Answer], texts: Sequence[str], num_returned: int
) -> list[CompletionChoice]:
    """Of each prompt's answers the best `num_returned`."""
    chosen = [
        answer
        for _, to_one_prompt in groupby(answers, key=lambda answer: answer.prompt_index)
        for answer in _best(list(to_one_prompt), num_returned)
    ]
    return [choices.whole(answer, texts[answer.index], index) for index, answer in enumerate(chosen)]


def _best(answers: list[Answer], number: int) -> list[Answer]:
    """Those whose tokens are likeliest on average, the best one first; all as they are where none is too many."""
    return answers if len(answers) <= number else sorted(answers, key=_mean_logprob, reverse=True)[:number]


def _mean_logprob(answer: Answer) -> float:
    return math.fsum(item.logprob for item in answer.logprobs) / max(1, len(answer.logprobs))
