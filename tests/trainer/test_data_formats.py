"""Each data format from the file to the trained tokens: a sample, its rendered text, and what of it is trained.

Tokenizer and template are Llama 3's in small: BOS first, and contents trimmed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from tests.support.tiny_tokenizers import write_tokenizer
from trainer.data.encoding import Encoder, Piece
from trainer.data.options import ReadOptions
from trainer.data.records import read_records

BOS = "<|begin_of_text|>"


def chat(*turns: tuple[str, str]) -> str:
    return BOS + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in turns
    )


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("llama3")
    write_tokenizer(folder, "llama3")
    return load_template(folder, load_tokenizer(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    file: str
    content: str | Sequence[dict[str, Any]]
    """Text of the file, or rows of a Parquet file."""
    rendered: str
    trained: str
    options: dict[str, Any] = field(default_factory=dict)
    train_on_input: bool = False


SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "See you."},
    ]
}
SHAREGPT_TURNS = (("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you."))
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "🙂"},
]
ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
ALPACA_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n"
    "### Response:\n"
)
ALPACA_SHORT_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGreet.\n\n### Response:\n"
)

SAMPLES = {
    "instruct, JSONL": Sample(
        file="a.jsonl",
        content='{"input": "Who are you?", "output": "I am Tuna."}\n',
        rendered=chat(("user", "Who are you?"), ("assistant", "I am Tuna.")),
        trained="I am Tuna.<|eot_id|>",
    ),
    "completion": Sample(
        file="a.jsonl",
        content='{"prompt": "The capital of France is", "completion": " Paris."}\n',
        rendered=f"{BOS}The capital of France is Paris.<|eot_id|>",
        trained=" Paris.<|eot_id|>",
    ),
    "completion, train_on_input": Sample(
        file="a.jsonl",
        content='{"prompt": "The capital of France is", "completion": " Paris."}\n',
        train_on_input=True,
        rendered=f"{BOS}The capital of France is Paris.<|eot_id|>",
        trained="The capital of France is Paris.<|eot_id|>",
    ),
    "messages, one of weight 0": Sample(
        file="a.jsonl",
        content=json.dumps({"messages": [*MESSAGES[1:], *MESSAGES[1:2], {**MESSAGES[2], "weight": 0}]}) + "\n",
        rendered=chat(*[(message["role"], message["content"]) for message in MESSAGES[1:] * 2]),
        trained="🙂<|eot_id|>",
    ),
    "instruct, train_on_input": Sample(
        file="a.jsonl",
        content='{"input": "Who are you?", "output": "I am Tuna."}\n',
        train_on_input=True,
        rendered=chat(("user", "Who are you?"), ("assistant", "I am Tuna.")),
        trained=(chat(("user", "Who are you?"), ("assistant", "I am Tuna."))).removeprefix(BOS),
    ),
    "instruct, CSV with column_map and new_system_prompt": Sample(
        file="a.csv",
        content='question,answer\n"Two\nlines, quoted ""so""",Yes\n',
        options={"column_map": {"input": "question", "output": "answer"}, "new_system_prompt": "Be kind."},
        rendered=chat(("system", "Be kind."), ("user", 'Two\nlines, quoted "so"'), ("assistant", "Yes")),
        trained="Yes<|eot_id|>",
    ),
    "instruct, prompt_template": Sample(
        file="a.json",
        content='[{"input": "A long text.", "output": "Short."}]',
        options={"prompt_template": {"user": ("Summarize:\n", "\n---")}},
        rendered=chat(("user", "Summarize:\nA long text.\n---"), ("assistant", "Short.")),
        trained="Short.<|eot_id|>",
    ),
    "alpaca with input, JSON": Sample(
        file="a.json",
        content=json.dumps([ALPACA]),
        rendered=chat(("user", ALPACA_PROMPT.strip()), ("assistant", "2")),
        trained="2<|eot_id|>",
    ),
    "alpaca without input, CSV": Sample(
        file="a.csv",
        content="instruction,input,output\nGreet.,,Hello.\n",
        rendered=chat(("user", ALPACA_SHORT_PROMPT.strip()), ("assistant", "Hello.")),
        trained="Hello.<|eot_id|>",
    ),
    "sharegpt, JSONL": Sample(
        file="a.jsonl",
        content=json.dumps(SHAREGPT),
        rendered=chat(("system", "Be brief."), *SHAREGPT_TURNS),
        trained="Hello.<|eot_id|>See you.<|eot_id|>",
    ),
    "sharegpt, Parquet, system replaced": Sample(
        file="a.parquet",
        content=[SHAREGPT],
        options={"new_system_prompt": "Be kind."},
        rendered=chat(("system", "Be kind."), *SHAREGPT_TURNS),
        trained="Hello.<|eot_id|>See you.<|eot_id|>",
    ),
    "messages, Parquet": Sample(
        file="a.parquet",
        content=[{"messages": MESSAGES}],
        rendered=chat(("system", "Be brief."), ("user", "你好"), ("assistant", "🙂")),
        trained="🙂<|eot_id|>",
    ),
    "text, a line": Sample(
        file="a.txt",
        content="The quick brown fox\n",
        rendered=BOS + "The quick brown fox<|eot_id|>",
        trained="The quick brown fox<|eot_id|>",
    ),
    "text, Parquet with column_map": Sample(
        file="a.parquet",
        content=[{"body": "The quick\nbrown fox"}],
        options={"column_map": {"text": "body"}},
        rendered=BOS + "The quick\nbrown fox<|eot_id|>",
        trained="The quick\nbrown fox<|eot_id|>",
    ),
}


def write(sample: Sample, folder: Path) -> Path:
    path = folder / sample.file
    if isinstance(sample.content, str):
        path.write_text(sample.content, encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(list(sample.content)), path)
    return path


def texts(piece: Piece, template: ChatTemplate) -> tuple[str, str]:
    """The whole of it, and what of it is trained."""
    ids, spans = (memoryview(data).cast("i").tolist() for data in (piece.ids, piece.spans))
    trained = [ids[place] for start, stop in zip(spans[::2], spans[1::2], strict=True) for place in range(start, stop)]
    assert len(trained) == piece.num_trained
    whole, part = (template.tokenizer.decode(one, skip_special_tokens=False) for one in (ids, trained))
    return whole, part


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_rendered_and_trained_as_its_format_says(
    name: str, llama3: ChatTemplate, tmp_path: Path, figure: Callable[[str, object], None]
) -> None:
    sample = SAMPLES[name]
    records = read_records(write(sample, tmp_path), options=ReadOptions(**sample.options))
    encoder = Encoder(template=llama3, max_seq_len=1024, masking="all" if sample.train_on_input else "assistant")
    (record,) = records
    (piece,) = encoder(record).pieces
    rendered, trained = texts(piece, llama3)
    assert rendered == sample.rendered
    assert trained == sample.trained
    read = f", read with {sample.options}" if sample.options else ""
    figure(f"data: {name}", f"{sample.content!r}{read} -> rendered {rendered!r} -> trained {trained!r}")
