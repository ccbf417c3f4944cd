"""The loss that the trainer reports is what the service itself says of the same tokens: one template, one model, two paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from lm.template import load_template
from lm.tokenizer import load_tokenizer
from tests.support.client import PATIENCE_S, ok, train
from tests.support.runs import RECORDS
from tests.support.server import running_server
from tests.support.tiny import make_tiny_model

TOLERANCE = 1e-5


def test_the_first_loss_of_a_job_is_the_mean_of_the_echoed_log_probabilities(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "models" / "base", "llama")
    arguments = ("model=base", "device=cpu", "dtype=fp32", "num_threads=1")
    options = {"batch_size": len(RECORDS), "max_steps": 1, "dtype": "fp32", "device": "cpu", "promote": "manual"}
    with (
        running_server(tmp_path, *arguments) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        for train_on_input in (False, True):
            dataset = {"records": RECORDS}
            job = train(client, model="base", dataset=dataset, train_on_input=train_on_input, recipe="full", **options)
            [step] = ok(client, "GET", f"/finetune/{job['id']}/metrics")["steps"]
            told = [item for record in RECORDS for item in trained_logprobs(client, folder, record, train_on_input)]
            assert step["loss"] == pytest.approx(-sum(told) / len(told), rel=TOLERANCE)


def trained_logprobs(client: httpx.Client, folder: Path, record: dict[str, Any], train_on_input: bool) -> list[float]:
    """What /v1/completions says of the trained tokens of a record."""
    template = load_template(folder, load_tokenizer(folder))
    messages = [
        {"role": "user", "content": record["input"]},
        {"role": "assistant", "content": record["output"]},
    ]
    ids, is_trained = template.encode_with_mask(messages, train_on_input=train_on_input)
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    told = ok(client, "POST", "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    assert len(told) == len(ids)
    assert told[0] is None
    return [value for value, trained in zip(told[1:], is_trained[1:], strict=True) if trained]
