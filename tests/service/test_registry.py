from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm.errors import NotFoundError, UserError
from service.database import Database
from service.jobs.job import Job
from service.jobs.store import JobStore
from service.registry import Registry
from trainer.config import TrainingOptions


def job(store: JobStore, suffix: str = "bot") -> Job:
    return store.create(
        status="running",
        model="tiny",
        options=TrainingOptions(),
        data_files=["data/a.jsonl"],
        suffix=suffix,
        promote="final",
    )


def checkpoint(step: int, **overrides: Any) -> dict[str, Any]:
    path = f"adapters/step_{step}"
    event = {"type": "checkpoint", "step": step, "kind": "adapter", "path": path, "final": False, "loss": 1.5}
    return event | overrides


def test_base_models_are_the_folders_with_a_config_as_they_are_now(registry: Registry, home: Path) -> None:
    assert [entry.id for entry in registry.entries()] == ["tiny"]
    for name in ("second", "no:colon", ".hidden", "empty"):
        (home / "models" / name).mkdir()
    for name in ("second", "no:colon", ".hidden"):
        (home / "models" / name / "config.json").write_text("{}")
    assert [entry.id for entry in registry.entries()] == ["tiny", "second"]
    (home / "models" / "tiny" / "config.json").unlink()
    assert [entry.id for entry in registry.entries()] == ["second"]
    with pytest.raises(NotFoundError, match="known are second"):
        registry.base_folder("tiny")


def test_a_folder_whose_name_could_not_stand_in_an_id_is_refused_at_once(database: Database, home: Path) -> None:
    with pytest.raises(UserError, match=r"model: the folder name 'my model' .* rename it") as error:
        Registry(database, home=home, organization="tuneserve", base_folders={"my model": home / "my model"})
    assert error.value.param == "model"


def test_an_entry_that_does_not_exist_is_refused_with_those_that_do(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="tiny") as error:
        registry.get("gpt-4")
    assert error.value.param == "model"


def test_checkpoints_get_the_documented_names(registry: Registry, store: JobStore, home: Path) -> None:
    named, unnamed = job(store), job(store, suffix="")
    first = registry.add_checkpoint(named, home / "runs" / named.id, checkpoint(3))
    last = registry.add_checkpoint(named, home / "runs" / named.id, checkpoint(6, final=True, validation_loss=2.0))
    bare = registry.add_checkpoint(unnamed, home / "runs" / unnamed.id, checkpoint(6, final=True))
    assert first.id == f"ft:tiny:tuneserve:bot:{named.id[-8:]}:ckpt-step-3"
    assert last.id == f"ft:tiny:tuneserve:bot:{named.id[-8:]}"
    assert bare.id == f"ft:tiny:tuneserve::{unnamed.id[-8:]}"
    assert [entry.id for entry in registry.of_job(named.id)] == [first.id, last.id]
    assert (last.train_loss, last.validation_loss, last.step, last.job_id) == (1.5, 2.0, 6, named.id)


def test_an_adapter_is_served_on_its_base_and_a_full_checkpoint_by_itself(
    registry: Registry, store: JobStore, home: Path
) -> None:
    run = home / "runs" / "x"
    adapter = registry.add_checkpoint(job(store), run, checkpoint(3))
    assert (adapter.base_dir, adapter.adapter_dir) == (home / "models" / "tiny", run / "adapters" / "step_3")
    full = registry.add_checkpoint(job(store), run, checkpoint(3, kind="full", path="checkpoints/step_3"))
    assert (full.base_dir, full.adapter_dir) == (run / "checkpoints" / "step_3", None)


def test_the_path_of_an_entry_is_its_own_folder_as_home_sees_it(
    database: Database, store: JobStore, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "other"
    registry = Registry(database, home=home, organization="tuneserve", base_folders={outside.name: outside})
    run = home / "runs" / "x"
    adapter = registry.add_checkpoint(job(store), run, checkpoint(3))
    full = registry.add_checkpoint(job(store), run, checkpoint(3, kind="full", path="checkpoints/step_3"))
    assert registry.path_in_home(adapter) == "runs/x/adapters/step_3"
    assert registry.path_in_home(full) == "runs/x/checkpoints/step_3"
    assert registry.path_in_home(registry.get("tiny")) == "models/tiny"
    assert registry.path_in_home(registry.get("other")) is None


def test_a_step_that_is_told_again_stays_the_entry_that_it_is(registry: Registry, store: JobStore, home: Path) -> None:
    trained = job(store)
    run = home / "runs" / trained.id
    first = registry.add_checkpoint(trained, run, checkpoint(3, best=True))
    second = registry.add_checkpoint(trained, run, checkpoint(6))
    assert registry.add_checkpoint(trained, run, checkpoint(3, best=True)) == first
    assert [entry.id for entry in registry.of_job(trained.id)] == [first.id, second.id]


def test_one_checkpoint_of_a_job_is_its_best(registry: Registry, store: JobStore, home: Path) -> None:
    trained, other = job(store), job(store)
    registry.add_checkpoint(other, home / "runs" / other.id, checkpoint(1, best=True))
    for step, best in ((1, True), (2, True), (3, False)):
        registry.add_checkpoint(trained, home / "runs" / trained.id, checkpoint(step, best=best, token_accuracy=0.5))
    assert [(entry.step, entry.best) for entry in registry.of_job(trained.id)] == [(1, False), (2, True), (3, False)]
    assert [entry.best for entry in registry.of_job(other.id)] == [True]
    assert {entry.token_accuracy for entry in registry.of_job(trained.id)} == {0.5}


def test_an_adapter_may_stand_on_a_checkpoint_of_ours(registry: Registry, store: JobStore, home: Path) -> None:
    run = home / "runs" / "x"
    full = registry.add_checkpoint(job(store), run, checkpoint(3, kind="full", path="checkpoints/step_3"))
    adapter = registry.add_checkpoint(job(store), home / "runs" / "y", checkpoint(3), weights=full.base_dir)
    assert adapter.base_dir == full.base_dir
    assert registry.standing_on(full) == [adapter]
    assert registry.standing_on(adapter) == []


def test_what_is_removed_can_neither_be_named_nor_gone_back_to(registry: Registry, store: JobStore, home: Path) -> None:
    entries = [registry.add_checkpoint(job(store), home / "runs" / "x", checkpoint(step)) for step in (1, 2)]
    for entry in entries:
        registry.add_promotion(entry.id, "test")
    registry.remove(entries[1])
    assert [promotion.entry_id for promotion in registry.promotions("tiny")] == [entries[0].id]
    with pytest.raises(NotFoundError):
        registry.get(entries[1].id)
    registry.remove(registry.get("tiny"))
    assert registry.get("tiny").kind == "base"


def test_a_home_can_be_moved(registry: Registry, store: JobStore, home: Path, tmp_path: Path) -> None:
    entry = registry.add_checkpoint(job(store), home / "runs" / "x", checkpoint(3))
    moved = Registry(registry.database, home=tmp_path / "elsewhere", organization="tuneserve")
    assert moved.get(entry.id).adapter_dir == tmp_path / "elsewhere" / "runs" / "x" / "adapters" / "step_3"


def test_promotions_are_a_stack(registry: Registry, store: JobStore, home: Path) -> None:
    assert registry.promotions("tiny") == []
    assert registry.last_change("tiny") is None
    entries = [registry.add_checkpoint(job(store), home / "runs" / "x", checkpoint(step)) for step in (1, 2, 3)]
    for entry in entries:
        registry.add_promotion(entry.id, "test")
    newest, middle, oldest = registry.promotions("tiny")
    assert [newest.entry_id, middle.entry_id, oldest.entry_id] == [entry.id for entry in reversed(entries)]
    assert registry.last_change("tiny") == newest.created_at
    registry.undo_promotions("tiny", down_to=oldest.seq)
    assert registry.promotions("tiny") == [oldest]
    changed = registry.last_change("tiny")
    assert changed is not None
    assert changed > newest.created_at
    registry.undo_promotions("tiny", down_to=0)
    assert registry.promotions("tiny") == []
    assert registry.was_promoted(entries[0].id)
