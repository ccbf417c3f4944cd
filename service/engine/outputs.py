"""What a step says of its requests, made from what the runner computed."""

from __future__ import annotations

import msgspec

from service.engine.messages import Logprobs, RequestFailed, StepStats, TokenOutput
from service.engine.runner import Output
from service.engine.sequence import Chunk, Sequence, Step


def tell_step(step: Step, output: Output, now: float) -> tuple[list[TokenOutput], list[RequestFailed]]:
    """Each request that has something new, and those that failed by themselves. The step is committed already."""
    outputs: list[TokenOutput] = []
    failures: list[RequestFailed] = []
    logprobs = iter(output.logprobs)
    for index, chunk in enumerate(step.chunks):
        sequence = chunk.sequence
        logprob = next(logprobs) if chunk.samples else None
        of_prompt = output.prompt_logprobs.get(index)
        is_plain = sequence.finish_reason is None and logprob is None and of_prompt is None and sequence.is_told
        if is_plain and chunk.samples:
            outputs.append(TokenOutput(request_id=sequence.request_id, token_ids=(sequence.token_ids[-1],)))
        elif sequence.error is not None:
            failures.append(RequestFailed(request_id=sequence.request_id, message=sequence.error, kind="invalid"))
        else:
            untold = _untold(chunk, of_prompt or ())
            if chunk.samples or untold or sequence.finish_reason is not None:
                outputs.append(_tell(sequence, chunk.samples, logprob, untold, now))
    return outputs, failures


def step_stats(state: StepStats, step: Step, output: Output, started: list[Chunk], decode_bytes: int) -> StepStats:
    """`state` with what the step did. `started` are the chunks that are the first of their requests."""
    asked = [chunk for chunk in started if chunk.sequence.sampling.prompt_logprobs is None]
    decode_s = sum(forward.seconds for forward in output.forwards if forward.is_decode)
    return msgspec.structs.replace(
        state,
        prefill_tokens=sum(chunk.end - chunk.start for chunk in step.chunks[step.num_decoding :]),
        prefill_s=sum(forward.seconds for forward in output.forwards) - decode_s,
        decode_tokens=step.num_decoding,
        decode_s=decode_s,
        decode_bytes=decode_bytes,
        num_preempted=step.num_preempted,
        num_sampled=len(output.token_ids),
        num_prefix_queries=sum(chunk.sequence.num_prompt_tokens for chunk in asked),
        num_prefix_hits=sum(chunk.start for chunk in asked),
    )


def _tell(
    sequence: Sequence, samples: bool, logprob: Logprobs | None, prompt_logprobs: tuple[Logprobs, ...], now: float
) -> TokenOutput:
    num_cached = None if sequence.is_told else sequence.num_cached_tokens
    sequence.is_told = True
    is_over = sequence.finish_reason is not None
    last = sequence.token_ids[-1]
    return TokenOutput(
        request_id=sequence.request_id,
        token_ids=(last,) if samples else (),
        logprobs=() if logprob is None else (logprob,),
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=num_cached,
        finish_reason=sequence.finish_reason,
        stop_token_id=last if is_over and samples and last in sequence.stop_token_ids else None,
        timing=sequence.timing(now) if is_over else None,
    )


def _untold(chunk: Chunk, logprobs: tuple[Logprobs, ...]) -> tuple[Logprobs, ...]:
    """Of the tokens from `chunk.start + 1` on, those that were not told before a preemption."""
    if not logprobs:
        return logprobs
    sequence = chunk.sequence
    untold = logprobs[max(0, sequence.num_told_logprobs - chunk.start) :]
    sequence.num_told_logprobs += len(untold)
    return untold
