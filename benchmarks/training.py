"""`make proof-training`: our trainer beside torchtune 0.6.1 and transformers + peft on SmolLM2, same records, one run.

Trained tokens per second and peak resident memory, full and LoRA, each library as it trains by default (padded batches),
and ours and torchtune's packed. All in fp32, batches of the same number of records, one pass, without the first step.
benchmarks/data/instruct.jsonl is made from templates; what its lengths are is printed. Nothing else should run.

    python benchmarks/training.py TORCHTUNE_PYTHON [--records 64] [--batch-size 4] [--rounds 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lm.device.processor import this_processor
from lm.template import load_template
from lm.tokenizer import load_tokenizer
from service.settings import load_settings
from trainer.run_folder import RunFolder

HERE = Path(__file__).parent
DATA = HERE / "data" / "instruct.jsonl"
PEERS = {"torchtune": "torchtune_peer.py", "transformers": "transformers_peer.py"}
MAX_SEQ_LEN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    trained_tokens_per_second: float
    peak_memory_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    model: Path
    torchtune_python: str
    folder: Path
    batch_size: int

    def ours(self, recipe: str, packed: bool) -> Figures:
        run = RunFolder(Path(tempfile.mkdtemp(dir=self.folder)))
        config = {
            "model": str(self.model),
            "data_files": [str(self.folder / "records.jsonl")],
            "recipe": recipe,
            "packed": packed,
            "batch_size": 1 if packed else self.batch_size,
            "epochs": 1,
            "learning_rate": 1e-5,
            "max_seq_len": MAX_SEQ_LEN,
            "device": "cpu",
            "dtype": "fp32",
        }
        run.config.write_text(yaml.safe_dump(config))
        peak = _peak_of([sys.executable, "-m", "trainer", str(run.path)], run.log)
        steps = [event for event in run.read_events()[0] if event["type"] == "step"]
        tokens = steps[-1]["trained_tokens"] - steps[0]["trained_tokens"]
        return Figures(
            trained_tokens_per_second=tokens / (steps[-1]["time"] - steps[0]["time"]), peak_memory_bytes=peak
        )

    def theirs(self, peer: str, recipe: str, packed: bool) -> Figures:
        output = Path(tempfile.mkdtemp(dir=self.folder))
        job = {
            "model": str(self.model),
            "records": str(self.folder / "tokenized.jsonl"),
            "recipe": recipe,
            "packed": packed,
            "batch_size": 1 if packed else self.batch_size,
            "max_seq_len": MAX_SEQ_LEN,
            "output_dir": str(output),
        }
        (output / "job.json").write_text(json.dumps(job))
        python = self.torchtune_python if peer == "torchtune" else sys.executable
        command = [python, str(HERE / "peers" / PEERS[peer]), str(output / "job.json")]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        return Figures(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("torchtune_python", help="of an environment with benchmarks/peers/requirements.txt")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            model=load_settings().model_dir,
            torchtune_python=arguments.torchtune_python,
            folder=Path(folder),
            batch_size=arguments.batch_size,
        )
        print(_describe(_tokenize(plan, arguments.records)), flush=True)
        for recipe in ("full", "lora"):
            _compare(plan, recipe, arguments.rounds)
    return 0


def _compare(plan: Plan, recipe: str, rounds: int) -> None:
    sides = {
        "ours": lambda: plan.ours(recipe, False),
        "ours, packed": lambda: plan.ours(recipe, True),
        "torchtune": lambda: plan.theirs("torchtune", recipe, False),
        "torchtune, packed": lambda: plan.theirs("torchtune", recipe, True),
        "transformers": lambda: plan.theirs("transformers", recipe, False),
    }
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(run())
    medians = {name: _median(figures) for name, figures in found.items()}
    print(f"\n{recipe}: trained tokens/s, peak memory; ours and ours packed as a ratio of each")
    for name, figures in medians.items():
        ratios = [medians[o].trained_tokens_per_second / figures.trained_tokens_per_second for o in list(sides)[:2]]
        speed, memory = figures.trained_tokens_per_second, figures.peak_memory_bytes / 1e9
        print(f"  {name:18} {speed:8.1f} {memory:6.2f} GB   {ratios[0]:.2f} {ratios[1]:.2f}", flush=True)


def _median(figures: list[Figures]) -> Figures:
    return Figures(
        trained_tokens_per_second=statistics.median(f.trained_tokens_per_second for f in figures),
        peak_memory_bytes=statistics.median(f.peak_memory_bytes for f in figures),
    )


def _tokenize(plan: Plan, num_records: int) -> list[dict[str, Any]]:
    """The records as text for us, and as the same ids and masks for the peers."""
    lines = DATA.read_text(encoding="utf-8").splitlines()[:num_records]
    (plan.folder / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    template = load_template(plan.model, load_tokenizer(plan.model))
    tokenized = []
    for record in map(json.loads, lines):
        messages = [{"role": "user", "content": record["input"]}, {"role": "assistant", "content": record["output"]}]
        ids, mask = template.encode_with_mask(messages, train_on_input=False)
        tokenized.append({"ids": ids, "mask": mask})
    (plan.folder / "tokenized.jsonl").write_text("".join(json.dumps(record) + "\n" for record in tokenized))
    return tokenized


def _describe(records: list[dict[str, Any]]) -> str:
    lengths = sorted(len(record["ids"]) for record in records)
    trained = sum(sum(record["mask"]) for record in records)
    return (
        f"{this_processor().name}, {os.cpu_count()} cores. {len(records)} records of {lengths[0]} to {lengths[-1]} tokens, "
        f"median {statistics.median(lengths):.0f}, mean {statistics.mean(lengths):.0f}; {trained / sum(lengths):.0%} of "
        f"the tokens are trained"
    )


def _peak_of(command: list[str], log: Path) -> float:
    """Run to the end. Returns the peak resident memory in bytes."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=HERE.parent)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-4000:]}")
    return usage.ru_maxrss * 1024.0


if __name__ == "__main__":
    sys.exit(main())
