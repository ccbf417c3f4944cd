"""What an answer of /v1/responses says of its request, and what it cost."""

from __future__ import annotations

from typing import Any

from service.schemas.messages import Function
from service.schemas.response_answers import InputTokensDetails, OutputTokensDetails, ResponseAnswer, ResponseUsage
from service.schemas.responses import ResponseRequest

ECHOED_TOOL_FIELDS = {"type", *Function.model_fields}


def begun_answer(
    body: ResponseRequest, *, id: str, created: int, model: str, system_fingerprint: str
) -> ResponseAnswer:
    """In progress, with the request's options as they are in effect."""
    choice = body.tool_choice
    return ResponseAnswer(
        id=id,
        created_at=created,
        status="in_progress",
        model=model,
        system_fingerprint=system_fingerprint,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        temperature=body.default_temperature if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_logprobs=body.top_logprobs or 0,
        text=_text(body),
        tools=[tool.model_dump(include=ECHOED_TOOL_FIELDS) for tool in body.tools or ()],
        tool_choice="auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        metadata=body.metadata or {},
        user=body.user,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
    )


def response_usage(*, num_input: int, num_cached: int, num_output: int) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=num_input,
        input_tokens_details=InputTokensDetails(cached_tokens=num_cached),
        output_tokens=num_output,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=num_input + num_output,
    )


def _text(body: ResponseRequest) -> dict[str, Any]:
    chosen = None if body.text is None else body.text.format
    told = {"type": "text"} if chosen is None else chosen.model_dump(by_alias=True, exclude_none=True)
    return {"format": told, "verbosity": "medium"}
