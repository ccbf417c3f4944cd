"""lm_eval asks our server and transformers the same questions, about the same checkpoint, and finds the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.proof.conftest import MODEL
from tests.support.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MAX_DIFFERENCE = 1e-3
BATCH = 8
QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "What is the capital of {}?": [
        ("France", "Paris"),
        ("Japan", "Tokyo"),
        ("Italy", "Rome"),
        ("Australia", "Canberra"),
        ("Egypt", "Cairo"),
        ("Brazil", "Brasília"),
        ("中国", "北京"),
        ("Canada", "Ottawa"),
        ("Kenya", "Nairobi"),
        ("Norway", "Oslo"),
    ],
    "What is the opposite of {}?": [
        ("hot", "cold"),
        ("early", "late"),
        ("cheap", "expensive"),
        ("full", "empty"),
        ("rough", "smooth"),
        ("brave", "cowardly"),
        ("ancient", "modern"),
        ("scarce", "abundant"),
        ("rigid", "flexible"),
        ("to arrive", "to leave"),
    ],
    "How much is {}?": [
        ("2 + 2", "4"),
        ("9 - 4", "5"),
        ("3 * 7", "21"),
        ("100 / 4", "25"),
        ("17 + 15", "32"),
        ("12 * 12", "144"),
        ("81 / 9", "9"),
        ("50 - 33", "17"),
        ("6 * 8", "48"),
        ("1000 - 1", "999"),
    ],
    "Which animal says {}?": [
        ("woof", "the dog"),
        ("meow", "the cat"),
        ("moo", "the cow"),
        ("quack", "the duck"),
        ("oink", "the pig"),
        ("baa", "the sheep"),
        ("neigh", "the horse"),
        ("hoot", "the owl"),
        ("ribbit", "the frog 🐸"),
        ("buzz", "the bee 🐝"),
    ],
}
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "Question: What is the colour of snow?\\nAnswer: white\\nQuestion: {{{{question}}}}\\nAnswer:"
"""
CHOOSE = """
task: choose
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITE = """
task: write
output_type: generate_until
doc_to_target: " {{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
WAYS = {
    "ids, several batches at once": {"tokenized_requests": True, "num_concurrent": 3, "batch_size": BATCH},
    "text, one by one": {"tokenized_requests": False, "num_concurrent": 1, "batch_size": 1},
}


@dataclass(frozen=True)
class Found:
    scores: dict[str, float]
    logprobs: list[tuple[float, bool]]
    """Of each choice of each question, and whether a greedy answer would have been it."""
    texts: list[str]


def questions() -> Iterator[dict[str, Any]]:
    """With two to four choices, the right one at any place among them."""
    for question, facts in QUESTIONS.items():
        for number, (subject, answer) in enumerate(facts):
            choices = [facts[(number + step) % len(facts)][1] for step in (3, 5, 8)][: 1 + number % 3]
            choices.insert(number % (len(choices) + 1), answer)
            yield {"question": question.format(subject), "choices": choices, "gold": choices.index(answer)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks and their data; what lm_eval caches goes there, too."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = list(questions())
    for name, task, data in (("choose", CHOOSE, rows), ("write", WRITE, rows[::4])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, data)))
        (folder / f"{name}.yaml").write_text(TASK.format(data=folder / f"{name}.jsonl") + task)
    return folder


def run_lm_eval(tasks: Path, model: str, arguments: dict[str, Any], *, batch_size: int) -> Found:
    """The command, in a process of its own and without a network."""
    out = tasks / f"out-{len(list(tasks.glob('out-*')))}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--tasks", "choose", "write"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--batch_size", str(batch_size), "--device", "cpu"]
    command += ["--include_path", str(tasks), "--log_samples", "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache")}
    offline |= {"OMP_NUM_THREADS": "1"}  # the server has the other core
    env = os.environ | offline
    done = subprocess.run(command, check=False, env=env, cwd=tasks, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_found(out)


def read_found(out: Path) -> Found:
    (results,) = out.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    samples = {task: read_samples(out, task) for task in ("choose", "write")}
    return Found(
        scores={
            "acc": scores["choose"]["acc,none"],
            "acc_norm": scores["choose"]["acc_norm,none"],
            "exact_match": scores["write"]["exact_match,none"],
        },
        logprobs=[(float(value), greedy == "True") for sample in samples["choose"] for [[value, greedy]] in sample],
        texts=[text for [[text]] in samples["write"]],
    )


def read_samples(out: Path, task: str) -> list[Any]:
    (path,) = out.rglob(f"samples_{task}_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


@pytest.fixture(scope="module")
def theirs(tasks: Path, smollm2: Path) -> Found:
    return run_lm_eval(tasks, "hf", {"pretrained": smollm2, "dtype": "float32"}, batch_size=BATCH)


@pytest.mark.parametrize("way", WAYS)
def test_lm_eval_finds_what_it_finds_with_transformers(
    server: Server, tasks: Path, smollm2: Path, theirs: Found, way: str, figure: Callable[[str, object], None]
) -> None:
    how = dict(WAYS[way])
    batch_size = how.pop("batch_size")
    asked = {"model": MODEL, "base_url": f"{server.url}/v1/completions", "tokenizer": smollm2, **how}
    ours = run_lm_eval(tasks, "local-completions", asked, batch_size=batch_size)
    differences = [abs(mine - other) for (mine, _), (other, _) in zip(ours.logprobs, theirs.logprobs, strict=True)]
    score = ", ".join(f"{name} {value:.3f}" for name, value in ours.scores.items())
    figure(f"lm_eval, {way}", f"{score}; {len(differences)} log likelihoods, largest difference {max(differences):.1e}")
    assert ours.scores == theirs.scores
    assert 0.3 < ours.scores["acc"] < 1
    assert max(differences) < MAX_DIFFERENCE
    assert [greedy for _, greedy in ours.logprobs] == [greedy for _, greedy in theirs.logprobs]
    assert {greedy for _, greedy in ours.logprobs} == {True, False}
    assert ours.texts == theirs.texts
