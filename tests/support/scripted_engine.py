"""An engine without a model, for tests of what stands in front of it: it answers what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from service.engine.messages import AddRequest, EngineReady, LoadModel, ModelLoaded, RequestTiming, TokenOutput
from service.engine_client import EngineClient, EngineUnavailable, ModelUnavailable, TokenStream
from service.engine_stream import Outputs
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
    weights_leave: int = 0
    """So many requests find that their weights have just left the engine."""

    async def start(self) -> None:
        self.running: set[str] = set()
        self.received: list[AddRequest] = []
        self.loaded: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.state, self.ready = "ready", READY
        await self._on_ready(READY)

    async def stop(self) -> None:
        self.state = "stopped"
        for task in self._tasks:
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

    def submit(self, request: AddRequest) -> TokenStream:
        if self.ready is None:
            raise EngineUnavailable("the engine is dead")
        outputs: Outputs = asyncio.Queue()
        self.received.append(request)
        self.running.add(request.request_id)
        task = asyncio.create_task(self._play(request, outputs))
        self._tasks.add(task)

        def abort() -> None:
            if task.cancel():
                last = TokenOutput(request_id=request.request_id, token_ids=(), finish_reason="abort", timing=ABORTED)
                outputs.put_nowait(EngineUnavailable("it was killed") if self.dies_at_abort else last)
            self.running.discard(request.request_id)

        return TokenStream(outputs, abort=abort, forget=lambda: None)

    async def _play(self, request: AddRequest, outputs: Outputs) -> None:
        tokens = self.answer if request.sampling.ignore_eos else (*self.answer, self.eos)
        if self.weights_leave:
            self.weights_leave -= 1
            outputs.put_nowait(ModelUnavailable("not loaded"))
            tokens = ()
        for number, token_id in enumerate(tokens[: request.sampling.max_tokens]):
            await asyncio.sleep(0)
            if number == self.stays_after:
                await asyncio.sleep(3600)
            if number == self.dies_after:
                self.state, self.ready = "dead", None
                outputs.put_nowait(EngineUnavailable("it was killed"))
                break
            outputs.put_nowait(self._output(request, token_id, number + 1, len(tokens)))
        self.running.discard(request.request_id)

    def _output(self, request: AddRequest, token_id: int, number: int, num_tokens: int) -> TokenOutput:
        stops = token_id == self.eos and not request.sampling.ignore_eos
        is_last = stops or number == min(num_tokens, request.sampling.max_tokens)
        timing = RequestTiming(queue_s=0.0, prefill_s=0.5, decode_s=2.0, decode_tokens=number - 1, decode_bytes=10**9)
        return TokenOutput(
            request_id=request.request_id,
            token_ids=(token_id,),
            finish_reason=("stop" if stops else "length") if is_last else None,
            stop_token_id=token_id if stops else None,
            timing=timing if is_last else None,
        )


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
