"""Does memory grow with the data set? A JSONL file of 1,000,000 records beside one of 10,000, trained for a few steps.

    python benchmarks/large_dataset.py MODEL_DIR [--records 10000 1000000] [--steps 3] [--packed]

Prints for each file its size, the time until its tokens are stored and until the first step, the time to the first step of
a run that finds the tokens stored, and the peak resident memory of the trainer and of one process that tokenizes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.run_folder import RunFolder

WORDS = ("the", "a", "of", "to", "and", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "at", "one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Seconds since the start, and bytes."""

    stored: float
    first_step: float
    peak_memory: int
    peak_worker_memory: int
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--packed", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for count in arguments.records:
            folder = Path(name) / str(count)
            data = write_records(folder / "train.jsonl", count)
            options = {"max_steps": arguments.steps, "packed": arguments.packed, "max_seq_len": 512}
            first = train(folder / "first", arguments.model, data, options, keep=folder / "stored")
            again = train(folder / "again", arguments.model, data, options, stored=folder / "stored")
            print(
                f"{count:>9,} records, {data.stat().st_size / 1e6:.0f} MB, {first.tokens / 1e6:.1f} M tokens: "
                f"tokens stored after {first.stored:.1f} s, first step after {first.first_step:.1f} s "
                f"(tokens found stored: {again.first_step:.1f} s); peak memory {first.peak_memory / 2**20:.0f} MiB "
                f"(again {again.peak_memory / 2**20:.0f}), of a tokenizing process {first.peak_worker_memory / 2**20:.0f}",
                flush=True,
            )
            shutil.rmtree(folder)


def write_records(path: Path, count: int) -> Path:
    """Questions and answers of 5 to 60 words; the same ones each time."""
    path.parent.mkdir(parents=True)
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = (" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) for _ in range(2))
            file.write(json.dumps({"input": f"{number}: {question}?", "output": f"{answer}."}) + "\n")
    return path


def train(
    folder: Path,
    model: Path,
    data: Path,
    options: dict[str, object],
    *,
    keep: Path | None = None,
    stored: Path | None = None,
) -> Run:
    """`keep` is where the tokens shall stand when the run is over, `stored` where those of another run do."""
    folder.mkdir()
    run = RunFolder(folder)
    if stored is not None:
        shutil.copytree(stored, folder / "state" / "data", copy_function=os.link)
    config = {"model": str(model), "data_files": [str(data)], "epochs": 1, "device": "cpu", **options}
    run.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    start = time.time()
    with run.log.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "trainer", str(folder)], stderr=log, stdout=log)
        peak, peak_worker = watch(process, folder / "state" / "data", keep)
    if process.returncode:
        raise SystemExit(run.log_tail())
    events = run.read_events()[0]
    times = {event["type"]: event["time"] - start for event in reversed(events)}
    tokens = next(event["tokens"] for event in events if event["type"] == "dataset")
    return Run(
        stored=times["dataset"],
        first_step=times["step"],
        peak_memory=peak,
        peak_worker_memory=peak_worker,
        tokens=tokens,
    )


def watch(process: subprocess.Popen[bytes], store: Path, keep: Path | None) -> tuple[int, int]:
    """Peak resident bytes of a process until it ends, and of the largest of its children. A run that has ended takes its
    store away, so it is linked to `keep` before.
    """
    peak = peak_child = 0
    while process.poll() is None:
        peak = max(peak, peak_bytes(process.pid))
        peak_child = max([peak_child, *(peak_bytes(child) for child in children(process.pid))])
        if keep is not None and store.exists() and not keep.exists():
            shutil.copytree(store, keep, copy_function=os.link)
        time.sleep(0.05)
    return peak, peak_child


def peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0][1]) << 10 if lines else 0


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
