"""What a checkpoint says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lm.errors import UserError
from trainer.card import CheckpointFacts, card_files, read_facts
from trainer.config import RunConfig
from trainer.strict import parse_options

DATASET = {
    "fingerprint": "0a1b",
    "records": 16,
    "tokens": 400,
    "trained_tokens": 80,
    "truncated": 0,
    "longest": 40,
    "validation_records": 2,
    "formats": {"instruct": 16},
}


def config(**options: Any) -> RunConfig:
    data = {"model": "/models/smol", "data_files": ["/home/me/facts.jsonl"], **options}
    return parse_options(RunConfig, data)


def facts(**values: Any) -> CheckpointFacts:
    figures: dict[str, Any] = {
        "step": 4,
        "total_steps": 8,
        "epoch": 1,
        "final": False,
        "trained_tokens": 320,
        "loss": 2,
    }
    return CheckpointFacts(**({**figures, "dataset": DATASET} | values))


def files(run: RunConfig, kind: Any = "adapter", base: Path = Path("/nowhere"), **values: Any) -> dict[str, str]:
    return card_files(run, facts(**values), run="ftjob-1", kind=kind, base=base)


def front_matter(text: str) -> dict[str, Any]:
    matter: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return matter


def test_the_json_names_job_step_data_losses_base_and_options_and_no_path() -> None:
    run = config(model_name="org/smol", learning_rate=0.5, lora={"rank": 2}, seed=3)
    text = files(run, validation_loss=1.5, token_accuracy=0.25)["tuneserve.json"]
    told = json.loads(text)
    assert told["job"] == "ftjob-1"
    assert (told["step"], told["total_steps"], told["final"], told["kind"]) == (4, 8, False, "adapter")
    assert told["base_model"] == "org/smol"
    assert told["losses"] == {"loss": 2, "token_accuracy": 0.25, "validation_loss": 1.5}
    assert told["dataset"] == {
        "names": ["facts.jsonl"],
        **{name: DATASET[name] for name in DATASET if name != "formats"},
    }
    assert told["options"] == {"learning_rate": 0.5, "lora": {"rank": 2}, "seed": 3}
    assert "/home" not in text
    assert "/models" not in text


def test_a_checkpoint_of_another_one_names_where_it_began_and_its_sets() -> None:
    sets = [{"data_files": ["/d/a.json", "/d/b.json"]}, {"hub_id": "org/set", "weight": 0.5}]
    run = config(data_files=None, datasets=sets, start_adapter="/runs/x/adapters/step_3")
    told = json.loads(files(run)["tuneserve.json"])
    assert (told["start_adapter"], told["merge_start"]) == ("step_3", False)
    assert told["dataset"]["names"] == ["a.json", "b.json", "org/set"]
    assert r"An adapter for smol, going on from the adapter step\_3, made by LoRA" in files(run)["README.md"]
    merged = files(run.model_copy(update={"merge_start": True}))["README.md"]
    assert r"An adapter for smol with the adapter step\_3 merged in, made by LoRA" in merged


def test_what_travels_is_read_back_and_what_is_damaged_refused(tmp_path: Path) -> None:
    assert read_facts(tmp_path) is None
    for name, text in files(config()).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    told = read_facts(tmp_path)
    assert told is not None
    assert told["base_model"] == "smol"
    (tmp_path / "tuneserve.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot read .*tuneserve\.json"):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("kind", "library", "loader"),
    [("adapter", "peft", "AutoPeftModelForCausalLM"), ("merged", "transformers", "AutoModelForCausalLM")],
)
def test_the_card_is_one_that_the_hub_reads(kind: str, library: str, loader: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Base\n", encoding="utf-8")
    text = files(config(model_name="org/smol"), kind, tmp_path, validation_loss=1.25)["README.md"]
    data = front_matter(text)
    assert data["base_model"] == "org/smol"
    assert data["library_name"] == library
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-generation"
    assert loader in ModelCard(text).text
    assert "| Validation loss | 1.25 |" in ModelCard(text).text
    assert "step 4 of 8" in ModelCard(text).text


def test_names_and_options_cannot_break_the_card() -> None:
    run = config(model_name="a: b\n---\n# c", new_system_prompt="x|y\n\n<script>alert(1)</script> `z` " + "w" * 900)
    text = files(run)["README.md"]
    assert front_matter(text)["base_model"] == "a: b\n---\n# c"
    [row] = [line for line in text.splitlines() if "system" in line]
    assert row.count("|") == row.count(r"\|") + 3
    assert r"x\|y \<script\>alert(1)\</script\> \`z\`" in row
    assert len(row) < 400


@pytest.mark.parametrize(
    "card", ["no front matter", "---\nlicense: [\n---\n", "---\nlicense: 3\n---\n", "---\n- x\n---\n"]
)
def test_a_base_whose_card_says_no_license_gives_none(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert "license" not in front_matter(files(config(), base=tmp_path)["README.md"])


def test_the_same_run_has_the_same_files() -> None:
    assert files(config()) == files(config())
