"""An engine without a model, for tests of what stands in front of it: it answers what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from service.engine.messages import (
    AddRequest,
    EngineReady,
    LoadModel,
    Logprobs,
    ModelLoaded,
    RequestTiming,
    TokenOutput,
)
from service.engine_client import EngineClient, EngineUnavailable, ModelUnavailable
from service.engine_stream import Receive
from tests.support.tiny_tokenizers import write_tokenizer

CONTEXT = 128
READY = EngineReady(
    device="cpu",
    device_name="a processor",
    device_reason="asked for",
    dtype="fp32",
    dtype_reason="asked for",
    ops={},
    max_model_len=CONTEXT,
    max_num_seqs=4,
    block_size=16,
    num_blocks=64,
    peak_bandwidth=10e9,
    peak_bandwidth_source="measured",
    torch_version="2.13.0",
)
WEIGHT_BYTES = 1_000_000
ABORTED = RequestTiming(queue_s=0.0, prefill_s=0.5, decode_s=4.0, decode_tokens=8, decode_bytes=10**9)


class ScriptedEngine(EngineClient):
    """Answers each request with the tokens in `answer`, then the end-of-sequence token."""

    answer: tuple[int, ...] = ()
    eos: int = 0
    stays_after: int | None = None
    """After so many tokens a request goes on forever, without a further token."""
    dies_after: int | None = None
    dies_at_abort: bool = False
    num_cached_tokens: int = 0
    weights_leave: int = 0
    """So many requests find that their weights have just left the engine."""

    async def start(self) -> None:
        self.running: dict[str, Receive] = {}
        self.received: list[AddRequest] = []
        self.loaded: list[str] = []
        self._plays: dict[str, asyncio.Task[None]] = {}
        self.state, self.ready, self.known = "ready", READY, READY
        await self._on_ready(READY)

    @property
    def num_open(self) -> int:
        return len(self.running)

    async def sleep(self) -> None:
        for request_id in list(self.running):
            self.abort(request_id)
        self.state, self.ready = "asleep", None

    async def stop(self) -> None:
        self.state = "stopped"
        for task in self._plays.values():
            task.cancel()

    async def load_model(self, command: LoadModel, /) -> ModelLoaded:
        self.loaded.append(command.model_id)
        return ModelLoaded(
            model_id=command.model_id,
            weights_hash=f"hash-of-{command.model_id}",
            weight_bytes=WEIGHT_BYTES,
            seconds=0.0,
            mode="overlap",
        )

    def submit(self, request: AddRequest, receive: Receive) -> None:
        if self.ready is None:
            raise EngineUnavailable("the engine is dead")
        self.received.append(request)
        self.running[request.request_id] = receive
        self._plays[request.request_id] = asyncio.create_task(self._play(request, receive))

    def abort(self, request_id: str) -> None:
        receive = self.running.pop(request_id, None)
        self._plays[request_id].cancel()
        if receive is not None:
            last = TokenOutput(request_id=request_id, token_ids=(), finish_reason="abort", timing=ABORTED)
            receive(EngineUnavailable("it was killed") if self.dies_at_abort else last)

    def abandon(self, request_id: str) -> None:
        self._plays[request_id].cancel()
        self.running.pop(request_id, None)

    async def _play(self, request: AddRequest, receive: Receive) -> None:
        tokens = self.answer if request.sampling.ignore_eos else (*self.answer, self.eos)
        tokens = _until_stopped(tokens, request.sampling.stop_token_ids)
        if self.weights_leave:
            self.weights_leave -= 1
            receive(ModelUnavailable("not loaded"))
            tokens = ()
        elif request.sampling.max_tokens == 0:
            receive(_only_the_prompt(request))
        for number, token_id in enumerate(tokens[: request.sampling.max_tokens]):
            await asyncio.sleep(0)
            if number == self.stays_after:
                await asyncio.sleep(3600)
            if number == self.dies_after:
                self.state, self.ready = "dead", None
                receive(EngineUnavailable("it was killed"))
                break
            receive(self._output(request, token_id, number + 1, len(tokens)))
        self.running.pop(request.request_id, None)

    def _output(self, request: AddRequest, token_id: int, number: int, num_tokens: int) -> TokenOutput:
        sampling = request.sampling
        stops = token_id in sampling.stop_token_ids
        is_last = stops or number == min(num_tokens, sampling.max_tokens)
        timing = RequestTiming(queue_s=0.0, prefill_s=0.5, decode_s=2.0, decode_tokens=number - 1, decode_bytes=10**9)
        return TokenOutput(
            request_id=request.request_id,
            token_ids=(token_id,),
            logprobs=() if sampling.logprobs is None else (logprobs_of(token_id, sampling.logprobs),),
            prompt_logprobs=_of_the_prompt(request) if number == 1 else (),
            num_cached_tokens=self.num_cached_tokens if number == 1 else None,
            finish_reason=("stop" if stops else "length") if is_last else None,
            stop_token_id=token_id if stops else None,
            timing=timing if is_last else None,
        )


def logprobs_of(token_id: int, num_top: int) -> Logprobs:
    """A token is the second likeliest, behind the one before it; further ones follow."""
    top_ids = (token_id - 1, *range(token_id, token_id + num_top))[:num_top]
    top = tuple(-0.5 * rank for rank in range(1, num_top + 1))
    return Logprobs(logprob=-1.0, top_ids=top_ids, top_logprobs=top, rank=2)


def _of_the_prompt(request: AddRequest) -> tuple[Logprobs, ...]:
    if (num_top := request.sampling.prompt_logprobs) is None:
        return ()
    return tuple(logprobs_of(token_id, num_top) for token_id in request.prompt_ids[1:])


def _only_the_prompt(request: AddRequest) -> TokenOutput:
    timing = RequestTiming(queue_s=0.0, prefill_s=0.5, decode_s=0.0, decode_tokens=0, decode_bytes=0)
    return TokenOutput(
        request_id=request.request_id,
        token_ids=(),
        prompt_logprobs=_of_the_prompt(request),
        num_cached_tokens=0,
        finish_reason="length",
        timing=timing,
    )


def _until_stopped(tokens: tuple[int, ...], stop_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    stops = (place for place, token_id in enumerate(tokens, start=1) if token_id in stop_token_ids)
    return tokens[: next(stops, len(tokens))]


def write_model_without_weights(folder: Path) -> None:
    """What the API reads of a model: config, tokenizer (byte-level, ChatML) and template."""
    write_tokenizer(folder, "smollm2")
    config = {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": CONTEXT,
    }
    (folder / "config.json").write_text(json.dumps(config))
