"""A real engine process without a model: `python -m tests.support.echo_engine FD` speaks the engine's protocol.

Each step gives every running request the next token of its own prompt, again and again up to max_tokens, and is sent
as fast as the other side reads. Nothing but the standard library and msgspec is loaded, so it starts at once. SIGUSR1
lets it close its socket and stay, as a process whose driver hangs at the end.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from types import FrameType

import msgspec

from service.engine.channel import Channel
from service.engine.messages import (
    AbortRequest,
    AddRequest,
    Command,
    EngineConfig,
    EngineReady,
    Event,
    FinishReason,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    RequestTiming,
    Shutdown,
    StepOutput,
    StepStats,
    TokenOutput,
    UnloadModel,
)

CORE = "ECHO_ENGINE_CORE"
"""Environment variable: the core that it runs on."""
LOCKSTEP = "ECHO_ENGINE_LOCKSTEP"
"""Environment variable: if set, a step is made when the one before has been read, as a slow model would."""
STEP_S = "ECHO_ENGINE_STEP_S"
"""Environment variable: what each step takes."""
CONTEXT = 1 << 20
READY = EngineReady(
    device="cpu",
    device_name="none",
    device_reason="it computes nothing",
    dtype="fp32",
    dtype_reason="it computes nothing",
    ops={},
    max_model_len=CONTEXT,
    max_num_seqs=1,
    block_size=16,
    num_blocks=1 << 20,
    peak_bandwidth=1e9,
    peak_bandwidth_source="assumed",
    torch_version="none",
)


@dataclass(slots=True)
class Running:
    request: AddRequest
    num_tokens: int = 0

    def next_output(self) -> TokenOutput:
        prompt = self.request.prompt_ids
        token_id = prompt[self.num_tokens % len(prompt)]
        self.num_tokens += 1
        is_last = self.num_tokens == self.request.sampling.max_tokens
        return self.output((token_id,), "length" if is_last else None)

    def output(self, token_ids: tuple[int, ...], finish_reason: FinishReason | None) -> TokenOutput:
        return TokenOutput(
            request_id=self.request.request_id,
            token_ids=token_ids,
            finish_reason=finish_reason,
            timing=None if finish_reason is None else self._timing(),
        )

    def _timing(self) -> RequestTiming:
        return RequestTiming(
            queue_s=0.0, prefill_s=0.0, decode_s=1.0, decode_tokens=max(0, self.num_tokens - 1), decode_bytes=1
        )


class EchoEngine:
    def __init__(self, max_num_seqs: int) -> None:
        self.running: dict[str, Running] = {}
        """Those that wait stand behind the others."""
        self._max_num_seqs = max_num_seqs

    def handle(self, command: Command) -> list[Event]:
        match command:
            case AddRequest():
                self.running[command.request_id] = Running(command)
            case AbortRequest():
                if (aborted := self.running.pop(command.request_id, None)) is not None:
                    return [self._step([aborted.output((), "abort")])]
            case LoadModel():
                return [_loaded(command)]
            case UnloadModel():
                return [ModelUnloaded(model_id=command.model_id)]
        return []

    def step(self) -> StepOutput:
        outputs = [running.next_output() for running in islice(self.running.values(), self._max_num_seqs)]
        for output in outputs:
            if output.finish_reason is not None:
                del self.running[output.request_id]
        return self._step(outputs)

    def abort_all(self) -> StepOutput:
        outputs = [running.output((), "abort") for running in self.running.values()]
        self.running.clear()
        return self._step(outputs)

    def _step(self, outputs: list[TokenOutput]) -> StepOutput:
        num_running = min(len(self.running), self._max_num_seqs)
        return StepOutput(
            outputs=outputs,
            stats=StepStats(
                num_running=num_running,
                num_waiting=len(self.running) - num_running,
                used_blocks=num_running,
                prefill_tokens=0,
                prefill_s=0.0,
                decode_tokens=len(outputs),
                decode_s=0.001,
                decode_bytes=1,
                device_memory_bytes=1,
                num_sampled=len(outputs),
            ),
        )


def _loaded(command: LoadModel) -> ModelLoaded:
    return ModelLoaded(model_id=command.model_id, weights_hash="0" * 16, weight_bytes=1, seconds=0.0, mode="overlap")


def main() -> None:
    if CORE in os.environ:
        os.sched_setaffinity(0, {int(os.environ[CORE])})
    sock = socket.socket(fileno=int(sys.argv[1]))
    if LOCKSTEP in os.environ:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes it the least it has
    with closing(Channel(sock)) as channel:

        def linger(number: int, frame: FrameType | None) -> None:
            sock.shutdown(socket.SHUT_RDWR)
            time.sleep(3600)

        signal.signal(signal.SIGUSR1, linger)
        commands = channel.receive(wait=True)
        assert commands
        config = commands[0]
        assert isinstance(config, EngineConfig)
        channel.send([msgspec.structs.replace(READY, max_num_seqs=config.max_num_seqs)])
        _serve(EchoEngine(config.max_num_seqs), channel)


def _serve(engine: EchoEngine, channel: Channel) -> None:
    step_s = float(os.environ.get(STEP_S, "0"))
    is_open = True
    while is_open and (commands := channel.receive(wait=not engine.running)) is not None:
        for command in commands:
            if isinstance(command, Shutdown):
                channel.send([engine.abort_all()])
                return
            if events := engine.handle(command):
                channel.send(events)
        if engine.running:
            if step_s:  # sleeping for nothing takes time, too
                time.sleep(step_s)
            is_open = channel.send([engine.step()])


if __name__ == "__main__":
    main()
