"""`make bench`: our service beside transformers on the same model, prompts and token counts, in one run.

Each round measures both sides one after the other; the table has medians over the rounds and their ratio. Nothing else
should run on the machine. Writes benchmarks/RESULTS.md.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from lm.device import peak_bandwidth
from lm.device.processor import this_processor
from service.settings import load_settings
from tests.support.server import running_server

ROUNDS = 3
NEW_TOKENS = 64
CONCURRENCY = (1, 4, 8, 16)
PROMPT_TOKENS = 32
RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    """Both return tokens per second of one run."""


def main() -> int:
    folder = load_settings().model_dir
    peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peer.eval()
    with tempfile.TemporaryDirectory() as home, running_server(Path(home), f"model={folder}") as server:
        device = httpx.get(f"{server.url}/health").json()["engine"]
        cases = [decode_case(server.url, peer, n) for n in CONCURRENCY]
        rows = measure(cases)
    write(rows, device)
    return 0


def decode_case(url: str, peer: Any, num_requests: int) -> Case:
    """`num_requests` at once, each with its own prompt, NEW_TOKENS greedy tokens each; prompt processing included."""
    generator = torch.Generator().manual_seed(num_requests)
    prompts = torch.randint(1000, 30_000, (num_requests, PROMPT_TOKENS), generator=generator)

    def ours() -> float:
        def ask(prompt: list[int]) -> None:
            body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
            httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status()

        with ThreadPoolExecutor(num_requests) as pool:
            start = time.perf_counter()
            list(pool.map(ask, prompts.tolist()))
        return num_requests * NEW_TOKENS / (time.perf_counter() - start)

    def theirs() -> float:
        start = time.perf_counter()
        mask = torch.ones_like(prompts)
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        peer.generate(prompts, attention_mask=mask, **options)
        return num_requests * NEW_TOKENS / (time.perf_counter() - start)

    return Case(name=f"decode, {num_requests} at once", ours=ours, theirs=theirs)


def measure(cases: list[Case]) -> list[tuple[str, float, float]]:
    rows = []
    for case in tqdm(cases, desc="cases"):
        case.ours()  # warm both sides up
        case.theirs()
        pairs = [(case.ours(), case.theirs()) for _ in range(ROUNDS)]
        rows.append((case.name, statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)))
    return rows


def write(rows: list[tuple[str, float, float]], engine: dict[str, Any]) -> None:
    read_bandwidth, _ = peak_bandwidth(torch.device("cpu"))
    lines = [
        "# Speed",
        "",
        (
            f"SmolLM2-135M-Instruct on {this_processor().name}, {torch.get_num_threads()} threads, read bandwidth "
            f"{read_bandwidth / 1e9:.1f} GB/s; Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {version('transformers')} (fp32). TuneServe: {engine['dtype']} ({engine['dtype_reason']})."
        ),
        "",
        (
            f"Tokens per second, prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens, greedy, median of {ROUNDS} "
            "alternating rounds; ours over HTTP. Repeat with `make bench`."
        ),
        "",
        "| case | TuneServe | transformers | ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |" for name, ours, theirs in rows),
        "",
    ]
    text = "\n".join(lines)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
