"""What a step of the engine costs the host: with a model that computes nothing, all that is left is ours.

Times whole steps (schedule, write, upload, sample, download, commit, tell, encode) of requests that decode, and in one
run what 10,000 waiting requests add. Fails above the bound of 0.3 ms + 10 us for each request, which is meant for greedy
requests: of the others the arithmetic of choosing a token, which is the device's part, takes a share here.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from lm.cache import PagedBatch
from lm.device.processor import this_processor
from lm.model import CausalLM
from service.engine.messages import encode
from tests.support.engines import Driver, request, tiny_engine_config
from tests.support.tiny import make_tiny_model

NUM_REQUESTS = (1, 16, 64, 256)
NUM_WAITING = 10_000
PROMPT_TOKENS = 32
STEPS = 300
ROUNDS = 5
MODEL_LEN = PROMPT_TOKENS + ROUNDS * STEPS + 100
KINDS: dict[str, dict[str, object]] = {
    "greedy": {},
    "temperature, seed": {"temperature": 0.8, "seed": 1},
    "greedy, frequency penalty": {"frequency_penalty": 0.5},
    "greedy, 5 log probabilities": {"logprobs": 5},
}


def no_hidden_states(model: CausalLM, ids: Tensor, positions: Tensor, paged: PagedBatch) -> Tensor:
    return ids.unsqueeze(-1)


def no_logits(model: CausalLM, hidden: Tensor) -> Tensor:
    """The same for all, without a computation."""
    return torch.zeros((), dtype=torch.float32).expand(len(hidden), model.config.vocab_size)


class Side:
    """An engine whose requests all decode, and the times of its steps."""

    def __init__(self, folder: Path, num_requests: int, num_waiting: int, **sampling: object) -> None:
        config = tiny_engine_config(
            folder, max_num_seqs=num_requests, max_num_batched_tokens=PROMPT_TOKENS * num_requests
        )
        self.engine = (driver := Driver(config)).engine
        driver.load(folder)
        for index in range(num_requests + num_waiting):
            prompt = [3 + (index + place) % 200 for place in range(PROMPT_TOKENS)]
            options = {"max_tokens": MODEL_LEN - PROMPT_TOKENS, **sampling}
            self.engine.handle(request(str(index), prompt, **options))
        self.run(20)

    def run(self, num_steps: int) -> float:
        """The median of the steps, in seconds."""
        seconds = []
        for _ in range(num_steps):
            begin = time.perf_counter()
            self.engine.step()
            for event in self.engine.take_events():
                encode(event)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)


def measure(*sides: Side) -> list[float]:
    """Seconds of a step of each side, in the round that the rest of the machine disturbed least; rounds in turns."""
    medians: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, rounds in zip(sides, medians, strict=True):
            gc.collect()
            rounds.append(side.run(STEPS))
    return [min(rounds) for rounds in medians]


def bound(num_requests: int) -> float:
    return 0.3e-3 + 10e-6 * num_requests


def main() -> int:
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as home,
        patch.object(CausalLM, "forward", no_hidden_states),
        patch.object(CausalLM, "logits", no_logits),
    ):
        folder = make_tiny_model(Path(home) / "tiny", "llama", max_position_embeddings=MODEL_LEN)
        return report(folder)


def report(folder: Path) -> int:
    print(f"{this_processor().name}; torch {torch.__version__}; least of {ROUNDS} medians of {STEPS} steps")
    print(f"{'requests':>8}  {'':30} {'us a step':>9}  {'bound':>6}  {'share':>5}")
    worst = 0.0
    for kind, sampling in KINDS.items():
        for num_requests in NUM_REQUESTS:
            (seconds,) = measure(Side(folder, num_requests, 0, **sampling))
            share = seconds / bound(num_requests)
            worst = max(worst, share) if kind == "greedy" else worst
            print(f"{num_requests:>8}  {kind:30} {seconds * 1e6:9.0f}  {bound(num_requests) * 1e6:6.0f}  {share:5.2f}")
    alone, crowded = measure(Side(folder, 64, 0), Side(folder, 64, NUM_WAITING))
    print(f"64 requests beside {NUM_WAITING} waiting ones: {crowded / alone:.2f} times as long as beside none")
    print(f"worst share of the bound, greedy: {worst:.2f}")
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
