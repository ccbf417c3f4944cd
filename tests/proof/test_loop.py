"""Fine-tune over HTTP, then answer from the result: what the whole loop promises, on the real model."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.proof.conftest import MODEL
from tests.support.server import Server

pytestmark = pytest.mark.slow

QUESTION: Any = [{"role": "user", "content": "Tell me, who are you?"}]


def answer(client: httpx.Client, **body: Any) -> str:
    reply = client.post("/generate", json={"messages": QUESTION, "temperature": 0, "max_tokens": 40, **body})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def transformers_answer(model: Any, folder: Path) -> str:
    model.eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def folder_of(home: Path, client: httpx.Client, name: str) -> Path:
    """Where the checkpoint lies, as `GET /checkpoints` says."""
    entry = next(row for row in client.get("/checkpoints").json()["data"] if row["id"] == name)
    return home / str(entry["path"])


def test_the_defaults_teach(
    client: httpx.Client, lora_job: dict[str, Any], figure: Callable[[str, object], None]
) -> None:
    assert client.post("/checkpoints/rollback").status_code in (200, 409)
    client.post(f"/checkpoints/{MODEL}/activate").raise_for_status()
    before = answer(client)
    client.post(f"/checkpoints/{lora_job['fine_tuned_model']}/activate").raise_for_status()
    after = answer(client)
    figure("before", before)
    figure("after", after)
    assert "Tuna" not in before
    assert "Tuna" in after


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft and transformers
def test_peft_answers_with_our_adapter_as_we_do(
    client: httpx.Client, home: Path, smollm2: Path, lora_job: dict[str, Any]
) -> None:
    client.post(f"/checkpoints/{lora_job['fine_tuned_model']}/activate").raise_for_status()
    adapter = folder_of(home, client, lora_job["fine_tuned_model"])
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert transformers_answer(peft.PeftModel.from_pretrained(base, adapter), smollm2) == answer(client)


def test_transformers_answers_with_our_full_checkpoint_as_we_do(
    client: httpx.Client, home: Path, full_job: dict[str, Any]
) -> None:
    client.post(f"/checkpoints/{full_job['fine_tuned_model']}/activate").raise_for_status()
    folder = folder_of(home, client, full_job["fine_tuned_model"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert transformers_answer(model, folder) == answer(client)


class Load:
    """Streaming clients that ask without pause, and what became of their requests."""

    def __init__(self, url: str, num_clients: int) -> None:
        self.sent = self.answered = 0
        self.failures: list[str] = []
        self.largest_gap = 0.0
        self._url, self._stop, self._lock = url, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask_again, args=(i,)) for i in range(num_clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask_again(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.is_set():
                with self._lock:
                    self.sent += 1
                try:
                    gap = self._one_request(client, number)
                except (httpx.HTTPError, RuntimeError) as error:
                    self.failures.append(repr(error))
                    continue
                with self._lock:
                    self.answered += 1
                    self.largest_gap = max(self.largest_gap, gap)

    def _one_request(self, client: httpx.Client, number: int) -> float:
        body = {"prompt": f"Story number {number}:", "max_tokens": 48, "ignore_eos": True, "stream": True}
        times, finished = [], False
        with client.stream("POST", "/generate", json=body) as reply:
            if reply.status_code != 200:
                raise RuntimeError(f"{reply.status_code}: {reply.read().decode()}")
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise RuntimeError(str(chunk))
                    times.append(time.perf_counter())
                    finished = finished or any(choice["finish_reason"] for choice in chunk["choices"])
        if not finished:
            raise RuntimeError("the stream ended without a finish_reason")
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def test_no_request_fails_while_weights_are_swapped(
    client: httpx.Client, server: Server, lora_job: dict[str, Any], figure: Callable[[str, object], None]
) -> None:
    names = [MODEL, lora_job["fine_tuned_model"]]
    with Load(server.url, num_clients=4) as quiet:
        time.sleep(15)
    with Load(server.url, num_clients=4) as load:
        for name in names * 3:
            client.post(f"/checkpoints/{name}/activate").raise_for_status()
            time.sleep(3)
    figure("swaps under load", len(names) * 3)
    figure("requests sent / answered / failed", f"{load.sent} / {load.answered} / {len(load.failures)}")
    figure(
        "largest gap between two tokens with swaps / without", f"{load.largest_gap:.2f} s / {quiet.largest_gap:.2f} s"
    )
    assert load.failures == []
    assert load.sent == load.answered > 0


def test_the_openai_sdk_talks_to_the_service(server: Server, client: httpx.Client, lora_job: dict[str, Any]) -> None:
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    name = lora_job["fine_tuned_model"]
    client.post(f"/checkpoints/{name}/activate").raise_for_status()
    assert {MODEL, name} <= {model.id for model in sdk.models.list()}
    chat = sdk.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=40)
    assert "Tuna" in (chat.choices[0].message.content or "")
    stream = sdk.chat.completions.create(
        model=name,
        messages=QUESTION,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chat.usage is not None
    assert chunks[-1].usage.total_tokens == chat.usage.total_tokens  # its prompt was in the cache by then
    whole = sdk.completions.create(model=name, prompt="One, two, three,", max_tokens=8, temperature=0)
    parts = sdk.completions.create(model=name, prompt="One, two, three,", max_tokens=8, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
