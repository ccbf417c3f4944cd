from __future__ import annotations

from typing import Any

import pytest

from lm.template import ChatTemplate
from trainer.data.dataset import Dataset, load_dataset
from trainer.data.errors import DataError
from trainer.data.examples import Example
from trainer.data.records import Record


def record(prompt: str, answer: str, number: int = 1, unused: tuple[str, ...] = ()) -> Record:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record(messages=messages, where=f"train.jsonl, record {number}", unused_columns=unused)


def load(records: list[Record], template: ChatTemplate, **options: Any) -> Dataset:
    defaults: dict[str, Any] = {"max_seq_len": 256, "train_on_input": False, "validation_split": 0.0, "seed": 0}
    return load_dataset(records, template, **(defaults | options))


def trained_text(example: Example, template: ChatTemplate) -> str:
    ids = [example.ids[position] for position in example.trained]
    return template.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_answer_and_its_end_are_trained(template: ChatTemplate) -> None:
    (example,) = load([record("Who?", "Tuna.")], template).training
    assert trained_text(example, template) == "Tuna.<|im_end|>"


def test_with_train_on_input_everything_behind_the_first_token_is_trained(template: ChatTemplate) -> None:
    (example,) = load([record("Who?", "Tuna.")], template, train_on_input=True).training
    assert list(example.trained) == list(range(1, len(example.ids)))


def test_every_answer_of_a_conversation_is_trained(template: ChatTemplate) -> None:
    turns = record("Who?", "Tuna.").messages + record("Sure?", "Yes.").messages
    (example,) = load([Record(messages=turns, where="here", unused_columns=())], template).training
    assert trained_text(example, template) == "Tuna.<|im_end|>Yes.<|im_end|>"


def test_a_long_record_is_cut_and_counted(template: ChatTemplate) -> None:
    whole = load([record("Who?", "Tuna." * 9), record("Who?", "a")], template)
    length = len(whole.training[0].ids)
    dataset = load([record("Who?", "Tuna." * 9), record("Who?", "a")], template, max_seq_len=length - 10)
    assert dataset.training[0].ids == whole.training[0].ids[: length - 10]
    assert not trained_text(dataset.training[0], template).endswith("<|im_end|>")
    assert (dataset.truncated, dataset.longest) == (1, length)


def test_a_record_whose_answer_was_cut_off_is_left_out_with_a_warning(template: ChatTemplate) -> None:
    dataset = load([record("Who?", "a", 1), record("Who?" * 30, "a", 2)], template, max_seq_len=60)
    assert len(dataset.training) == 1
    (warning,) = dataset.warnings
    assert "left out 1 of 2 records" in warning
    assert "max_seq_len=60" in warning
    assert "train.jsonl, record 2" in warning


def test_a_dataset_without_any_trained_token_is_refused(template: ChatTemplate) -> None:
    with pytest.raises(DataError, match="no record has a token to train on: within max_seq_len=8") as caught:
        load([record("Who are you?", "a")], template, max_seq_len=8)
    assert caught.value.param == "max_seq_len"


def test_what_the_template_refuses_is_named_with_its_record(template: ChatTemplate) -> None:
    empty = Record(messages=[], where="train.jsonl, record 7", unused_columns=())
    with pytest.raises(DataError, match=r"^train\.jsonl, record 7: messages"):
        load([record("Who?", "a"), empty], template)


def test_unused_columns_are_warned_about_once(template: ChatTemplate) -> None:
    dataset = load([record("a", "b", unused=("id", "note")), record("a", "b", unused=("id",))], template)
    assert dataset.warnings == ["columns that are not used: id, note"]


def test_validation_holds_out_a_share_drawn_by_the_seed(template: ChatTemplate) -> None:
    records = [record(f"Question {number}", "a") for number in range(10)]
    everything = {tuple(example.ids) for example in load(records, template).training}
    held_out = []
    for seed in (0, 0, 1):
        dataset = load(records, template, validation_split=0.3, seed=seed)
        training, validation = ({tuple(e.ids) for e in part} for part in (dataset.training, dataset.validation))
        assert (len(training), len(validation)) == (7, 3)
        assert training | validation == everything
        held_out.append(validation)
    assert held_out[0] == held_out[1] != held_out[2]


def test_validation_holds_out_at_least_one_and_leaves_at_least_one(template: ChatTemplate) -> None:
    records = [record("a", "b"), record("c", "d")]
    assert len(load(records, template, validation_split=0.01).validation) == 1
    with pytest.raises(DataError, match=r"validation_split=0\.5 leaves nothing to train on"):
        load(records[:1], template, validation_split=0.5)


def test_the_report_counts_what_is_trained(template: ChatTemplate) -> None:
    dataset = load([record("Who?", "ab"), record("Who?", "abcd")], template)
    assert dataset.report() == {
        "records": 2,
        "tokens": sum(len(example.ids) for example in dataset.training),
        "trained_tokens": 3 + 5,
        "truncated": 0,
        "longest": len(dataset.training[1].ids),
        "validation_records": 0,
    }
