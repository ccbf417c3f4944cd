"""From records to stored tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from lm.template import ChatTemplate
from service.schemas.messages import Tool
from service.tools.plan import plan_tools
from tests.support.runs import events, make_run
from trainer.config import load_run_config
from trainer.data.errors import DataError
from trainer.data.examples import Example, Pair
from trainer.data.store import META
from trainer.prepare import RunData, prepare_data
from trainer.progress import Progress
from trainer.run_folder import RunFolder


def prepare(run: RunFolder, **options: Any) -> RunData:
    config = load_run_config(run.config)
    with Progress(run) as progress:
        return prepare_data(
            config,
            **{
                "max_seq_len": config.max_seq_len,
                "folder": run,
                "progress": progress,
                "check_cancelled": lambda: None,
                **options,
            },
        )


@pytest.fixture
def load(tiny_llama: Path, tmp_path: Path) -> Any:
    def load(records: list[dict[str, Any]], name: str = "run", **options: Any) -> RunData:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return prepare(make_run(tmp_path / name, tiny_llama, records=records, **options))

    return load


def record(prompt: str, answer: str) -> dict[str, Any]:
    return {"input": prompt, "output": answer}


def trained_text(example: Any, template: ChatTemplate) -> str:
    assert isinstance(example, Example)
    ids = [example.ids[position] for position in example.trained]
    return template.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_answer_and_its_end_are_trained(load: Any, template: ChatTemplate) -> None:
    (example,) = load([record("Who?", "Tuna.")]).training
    assert trained_text(example, template) == "Tuna.<|im_end|>"


@pytest.mark.parametrize("options", [{"train_on_input": True}, {"masking": "all"}])
def test_with_masking_all_everything_behind_the_first_token_is_trained(load: Any, options: dict[str, Any]) -> None:
    (example,) = load([record("Who?", "Tuna.")], **options).training
    assert list(example.trained) == list(range(1, len(example.ids)))


TURNS = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Tuna."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def test_every_answer_of_a_conversation_is_trained_or_the_last_one(load: Any, template: ChatTemplate) -> None:
    (example,) = load([{"messages": TURNS}]).training
    assert trained_text(example, template) == "Tuna.<|im_end|>Yes.<|im_end|>"
    (example,) = load([{"messages": TURNS}], masking="last").training
    assert trained_text(example, template) == "Yes.<|im_end|>"


def test_an_answer_of_weight_0_is_not_trained_whatever_is(load: Any, template: ChatTemplate) -> None:
    messages = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 1}]
    (example,) = load([{"messages": messages}]).training
    assert trained_text(example, template) == "Yes.<|im_end|>"
    (whole,) = load([{"messages": TURNS}], masking="all").training
    (example,) = load([{"messages": messages}], masking="all").training
    assert example.ids == whole.ids
    taken_out = "Tuna.<|im_end|>"
    assert trained_text(example, template) == trained_text(whole, template).replace(taken_out, "")


def test_a_record_without_a_trained_answer_is_left_out_with_a_warning(load: Any, tmp_path: Path) -> None:
    unweighted = [TURNS[0], {**TURNS[1], "weight": 0}]
    data = load([{"messages": unweighted}, record("Who?", "a"), {"messages": unweighted}])
    assert len(data.training) == 1
    assert data.report["skipped"] == 2
    (warning,) = events(RunFolder(tmp_path / "run"), "warning")
    assert "left out 2 of 3 records" in warning["message"]
    assert "data.json, record 1 (line 1)" in warning["message"]


def test_a_long_record_is_cut_and_counted(load: Any, template: ChatTemplate) -> None:
    records = [record("Who?", "Tuna." * 9), record("Who?", "a")]
    whole = load(records)
    length = len(whole.training[0].ids)
    data = load(records, max_seq_len=length - 10)
    assert data.training[0].ids == whole.training[0].ids[: length - 10]
    assert not trained_text(data.training[0], template).endswith("<|im_end|>")
    assert (data.report["truncated"], data.report["longest"]) == (1, length)


def test_truncation_left_keeps_the_end(load: Any, template: ChatTemplate) -> None:
    (whole,) = load([record("Who?" * 9, "Tuna.")]).training
    (example,) = load([record("Who?" * 9, "Tuna.")], max_seq_len=20, truncation="left").training
    assert example.ids == whole.ids[:1] + whole.ids[-19:]  # with the token that every text begins with
    assert trained_text(example, template) == "Tuna.<|im_end|>"


def test_truncation_split_predicts_every_token_of_a_text_once(load: Any) -> None:
    text = {"text": "abcdefghij klmnopqrst uvwxyz"}
    (whole,) = load([text]).training
    data = load([text], max_seq_len=8, truncation="split")
    assert len(data.training) > 1
    assert data.report["records"] == len(data.training)
    trained = [part.ids[position] for part in data.training for position in part.trained]
    assert trained == list(whole.ids[1:])
    assert all(len(part.ids) <= 8 for part in data.training)


def test_truncation_split_of_a_chat_is_refused_where_it_is_too_long(load: Any) -> None:
    load([record("a", "b"), {"text": "abc" * 30}], max_seq_len=64, truncation="split")
    with pytest.raises(DataError, match=r"record 2 \(line 1\): \d+ tokens, more than max_seq_len=64") as caught:
        load([record("a", "b"), record("a", "b" * 90)], max_seq_len=64, truncation="split")
    assert caught.value.param == "truncation"


def test_a_record_whose_answer_was_cut_off_is_left_out_with_a_warning(load: Any, tmp_path: Path) -> None:
    assert len(load([record("Who?", "a"), record("Who?" * 30, "a")], max_seq_len=60).training) == 1
    (warning,) = events(RunFolder(tmp_path / "run"), "warning")
    assert "left out 1 of 2 records: within max_seq_len=60" in warning["message"]
    assert "data.json, record 2" in warning["message"]


def test_a_dataset_without_any_trained_token_is_refused(load: Any) -> None:
    with pytest.raises(DataError, match="no record has a token to train on: within max_seq_len=8") as caught:
        load([record("Who are you?", "a")], max_seq_len=8)
    assert caught.value.param == "max_seq_len"


def test_unused_columns_are_warned_about_once(load: Any, tmp_path: Path) -> None:
    load([{**record("a", "b"), "id": 1, "note": 2}, {**record("a", "b"), "id": 1}])
    (warning,) = events(RunFolder(tmp_path / "run"), "warning")
    assert warning["message"] == "columns that are not used: id, note"


def test_validation_holds_out_a_share_drawn_by_the_seed(load: Any) -> None:
    records = [record(f"Question {number}", "a") for number in range(10)]
    everything = {tuple(example.ids) for example in load(records).training}
    held_out = []
    for seed in (0, 0, 1):
        data = load(records, validation_split=0.3, seed=seed)
        training, validation = ({tuple(e.ids) for e in part} for part in (data.training, data.validation))
        assert (len(training), len(validation)) == (7, 3)
        assert training | validation == everything
        held_out.append(validation)
    assert held_out[0] == held_out[1] != held_out[2]


def test_validation_holds_out_at_least_one_and_leaves_at_least_one(load: Any) -> None:
    records = [record("a", "b"), record("c", "d")]
    assert len(load(records, validation_split=0.01).validation) == 1
    with pytest.raises(DataError, match=r"validation_split=0\.5 leaves nothing to train on"):
        load(records[:1], validation_split=0.5)


def test_held_out_records_may_have_a_file_of_their_own(load: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"q": f"{n}", "output": "b"}) + "\n" for n in range(4)), encoding="utf-8")
    validation = {"data_files": [str(other)], "column_map": {"input": "q"}, "split": "train[:3]"}
    data = load([record("a", "b")], validation=validation)
    assert (len(data.training), len(data.validation)) == (1, 3)
    assert data.report["validation_records"] == 3


TOOL = {"type": "function", "function": {"name": "now", "description": "The time"}}
CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "now", "arguments": '{"zone": "北京"}'}}],
}


def test_tools_and_calls_are_written_as_they_are_when_served(load: Any, template: ChatTemplate) -> None:
    """This template knows no tools: they stand in the system message, and calls in the text."""
    messages: list[dict[str, Any]] = [TURNS[0], CALL, {"role": "tool", "content": "12:00"}, TURNS[1]]
    (example,) = load([{"messages": messages, "tools": [TOOL]}]).training
    call = '<tool_call>\n{"name": "now", "arguments": {"zone": "北京"}}\n</tool_call>'
    assert trained_text(example, template) == f"{call}<|im_end|>Tuna.<|im_end|>"
    tools = [Tool.model_validate(TOOL)]
    plan = plan_tools(tools, None, None, template)
    prompt = template.encode(plan.messages(messages[:3]), add_generation_prompt=True, tools=plan.template_tools)
    assert list(example.ids[: len(prompt)]) == prompt
    (example,) = load([{"messages": [*messages[:3], {**TURNS[1], "weight": 0}], "tools": [TOOL]}]).training
    assert trained_text(example, template) == f"{call}<|im_end|>"


PREFERENCE = {"prompt": "Who?", "chosen": "Tuna.", "rejected": "A cat, I think."}


def test_dpo_goes_over_pairs(load: Any, template: ChatTemplate, tmp_path: Path) -> None:
    data = load([PREFERENCE, {**PREFERENCE, "chosen": "Fish."}], recipe="dpo", validation_split=0.5, seed=1)
    (pair,), (held_out,) = data.training, data.validation
    assert isinstance(pair, Pair)
    assert isinstance(held_out, Pair)
    assert {trained_text(one.chosen, template) for one in (pair, held_out)} == {"Tuna.<|im_end|>", "Fish.<|im_end|>"}
    assert {trained_text(one.rejected, template) for one in (pair, held_out)} == {"A cat, I think.<|im_end|>"}
    assert data.report["records"] == data.report["validation_records"] == 1
    assert data.report["trained_tokens"] == len(pair.chosen.trained) + len(pair.rejected.trained)
    shown = events(RunFolder(tmp_path / "run"), "examples")[0]["examples"]
    assert [one["answer"] for one in shown] == ["chosen", "rejected"]


def test_a_pair_is_left_out_when_one_of_its_answers_was_cut_off_or_both_are_the_same(load: Any) -> None:
    long = {**PREFERENCE, "prompt": "Who?" * 30}
    data = load([PREFERENCE, long, {**PREFERENCE, "rejected": "Tuna."}], recipe="dpo", max_seq_len=64)
    assert (len(data.training), data.report["skipped"], data.report["truncated"]) == (1, 2, 1)


def test_records_and_recipe_have_to_fit(load: Any) -> None:
    with pytest.raises(DataError, match=r"record 2 .*: a preference of two answers, from which only the recipe dpo"):
        load([record("a", "b"), PREFERENCE])
    with pytest.raises(DataError, match=r"record 2 .*: the recipe dpo learns from preferences"):
        load([PREFERENCE, record("a", "b")], recipe="dpo")


def test_a_run_cannot_stop_early_by_what_is_not_measured(load: Any) -> None:
    with pytest.raises(UserError, match="early_stopping_patience: nothing is held out; give validation, or valid"):
        load([record("a", "b")] * 2, early_stopping_patience=1)
    data = load([record("a", "b")] * 2, early_stopping_patience=1, validation_split=0.5)
    assert data.report["validation_records"] == 1


def test_the_report_counts_what_is_trained(load: Any) -> None:
    data = load([record("Who?", "ab"), record("Who?", "abcd")])
    assert data.report == {
        "records": 2,
        "tokens": sum(len(example.ids) for example in data.training),
        "trained_tokens": 3 + 5,
        "truncated": 0,
        "longest": len(data.training[1].ids),
        "validation_records": 0,
        "skipped": 0,
        "formats": {"instruct": 2},
        "fingerprint": data.fingerprint,
    }


def test_the_first_examples_are_shown_with_what_is_trained(load: Any, tmp_path: Path) -> None:
    load([record(f"Who {number}?", "Tuna.") for number in range(5)])
    (event,) = events(RunFolder(tmp_path / "run"), "examples")
    assert len(event["examples"]) == 3
    before, answer, after = event["examples"][1]["segments"]
    assert before == {
        "text": "<|im_start|>user\nWho 1?<|im_end|>\n<|im_start|>assistant\n",
        "trained": False,
    }
    assert (answer, after["trained"]) == ({"text": "Tuna.<|im_end|>", "trained": True}, False)


# ---- the store


def rows_of(data: RunData) -> list[Any]:
    return list(data.training)


def test_tokens_are_found_again_where_nothing_changed(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama)
    first = prepare(run)
    store = tmp_path / "run/state/data"
    written = (store / META).stat().st_mtime_ns
    again = prepare(run)
    assert (store / META).stat().st_mtime_ns == written
    assert rows_of(again) == rows_of(first)
    assert again.report == first.report


def test_other_data_or_options_are_tokenized_anew(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama)
    first = prepare(run)
    assert prepare(run, max_seq_len=100).fingerprint != first.fingerprint
    data = tmp_path / "run/data.json"
    data.write_text(json.dumps([record("new", "data")]), encoding="utf-8")
    changed = prepare(run)
    assert changed.fingerprint != first.fingerprint
    assert len(changed.training) == 1


def test_the_fingerprint_does_not_depend_on_where_the_data_and_the_model_stand(
    tiny_llama: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_llama, tmp_path / "model")
    first = prepare(make_run(tmp_path / "here", tiny_llama))
    assert prepare(make_run(tmp_path / "there", moved)).fingerprint == first.fingerprint
    (moved / "chat_template.jinja").write_text("{{ messages[-1].content }}", encoding="utf-8")
    shutil.rmtree(tmp_path / "there")
    assert prepare(make_run(tmp_path / "there", moved, masking="all")).fingerprint != first.fingerprint


def test_a_run_that_is_stopped_while_it_tokenizes_leaves_no_store(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama)
    calls = iter([None] * 5)

    def stop_at_the_sixth() -> None:
        if next(calls, "stop") == "stop":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(run, check_cancelled=stop_at_the_sixth)
    assert list((tmp_path / "run/state").iterdir()) == []
    killed = tmp_path / "run/state/.data.abc.tmp"  # what a SIGKILL leaves
    killed.mkdir()
    assert len(prepare(run).training) == 16
    assert not killed.exists()


def test_a_sample_takes_the_first_records_of_each_set(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama)
    assert rows_of(prepare(run, sample=5)) == rows_of(prepare(run))[:5]
