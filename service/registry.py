"""What can be served, and what was promoted when. Knows no engine: `serving.py` loads what this lists.

An entry is a base model, a base model with an adapter, or a full fine-tuned checkpoint. Ids:
    <base>                                      a folder in models/
    ft:<base>:<org>:<suffix>:<short>            the final checkpoint of a job
    ft:<base>:<org>:<suffix>:<short>:ckpt-step-N    an earlier one
Order is the registry's own sequence, never a file's time. Promotions of a base form a stack: its newest one that was
not undone is what `latest` means, and without any it is the base itself.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm.errors import NotFoundError, UserError
from lm.layout import is_model_folder
from service.database import Database
from service.jobs.job import Job
from service.model_facts import MODEL_NAME

Kind = Literal["base", "adapter", "full"]

NUM_NAMED = 20


class NameTakenError(UserError):
    """The name means another model already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    id: str
    seq: int
    base: str
    """Name of the base model, whose tokenizer and template it shares."""
    kind: Kind
    base_dir: Path
    """The weights that are loaded: an adapter stands on its base model, or on a checkpoint that its job began from."""
    adapter_dir: Path | None
    job_id: str | None
    step: int | None
    epoch: int | None
    created_at: float
    train_loss: float | None
    validation_loss: float | None
    token_accuracy: float | None
    validation_token_accuracy: float | None
    best: bool
    """Of its job, the one with the lowest validation loss so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    seq: int
    entry_id: str
    reason: str
    created_at: float


class Registry:
    def __init__(
        self, database: Database, *, home: Path, organization: str, base_folders: Mapping[str, Path] | None = None
    ) -> None:
        """`base_folders` are base models by name, also outside of models/. Raises UserError for one that fits no id."""
        self._base_folders = dict(base_folders or {})
        for name in self._base_folders:
            if not MODEL_NAME.fullmatch(name):
                raise UserError(
                    f"model: the folder name {name!r} cannot stand in a model id; rename it to letters, digits, "
                    "`.`, `_` and `-`",
                    param="model",
                )
        self.database = database
        self.home = home
        self.organization = organization
        rows = database.rows("SELECT id, folder FROM entries WHERE kind = 'base' AND folder IS NOT NULL")
        self._added = {row["id"]: home / row["folder"] for row in rows}  # `bases` is asked from other threads, too

    # ---- entries

    def bases(self) -> dict[str, Path]:
        """Base models by name, as the disk has them now. A name that could not stand in an id is left out.

        A registered name keeps its folder when one of that name appears in models/: adapters were trained on it.
        """
        folders = (path for path in sorted((self.home / "models").glob("*")) if is_model_folder(path))
        found = {path.name: path for path in folders if MODEL_NAME.fullmatch(path.name)}
        added = {name: folder for name, folder in self._added.items() if is_model_folder(folder)}
        return found | added | self._base_folders

    def add_base(self, name: str, folder: Path) -> tuple[Entry, bool]:
        """Make the model folder `folder`, which lies in models/, a base model `name`; it outlives a restart.

        Also whether that is new: the same again changes nothing. Raises NameTakenError when the name means, or ever
        meant, another model, NotFoundError when the folder has gone.
        """
        bases = self.bases()
        taken = bases.get(name) or self._registered(name)
        if taken is not None and taken.resolve() != folder.resolve():
            where = taken.relative_to(self.home) if taken.is_relative_to(self.home) else taken
            raise NameTakenError(f"name: {name!r} is the model in {where} already; choose another name", param="name")
        is_new = name not in bases
        if is_new and not is_model_folder(folder):
            raise NotFoundError(f"path: the model folder {folder.name!r:.200} has just gone", param="path")
        if is_new:
            self._added[name] = folder
        self._insert(id=name, base=name, kind="base", folder=str(folder.relative_to(self.home)) if is_new else None)
        row = self.database.row("SELECT * FROM entries WHERE id = ?", name)
        assert row is not None  # inserted above, or before
        return self._entry(row, {name: folder} | bases), is_new

    def _registered(self, name: str) -> Path | None:
        """Where the base model `name` is, or was when it was last seen."""
        row = self.database.row("SELECT folder FROM entries WHERE id = ?", name)
        return None if row is None else self.home / (row["folder"] or f"models/{name}")

    def base_folder(self, name: str) -> Path:
        """Raises NotFoundError with the names that exist."""
        bases = self.bases()
        if name not in bases:
            raise NotFoundError(
                f"there is no base model {name!r:.80}; {_known(bases)}. `tuneserve pull` gets more", param="model"
            )
        return bases[name]

    def get(self, entry_id: str) -> Entry:
        """Raises NotFoundError with the ids that exist."""
        if found := self._select("id = ?", entry_id):
            return found[0]
        known = [entry.id for entry in reversed(self.entries())]
        raise NotFoundError(f"there is no model {entry_id!r:.120}; {_known(known)}", param="model")

    def entries(self) -> list[Entry]:
        """All that exist, in the order in which they were registered."""
        return self._select("1")

    def of_job(self, job_id: str) -> list[Entry]:
        return self._select("job_id = ?", job_id)

    def _select(self, condition: str, *parameters: str) -> list[Entry]:
        """Base models that are new on the disk are registered first."""
        bases = self.bases()
        registered = {row["id"] for row in self.database.rows("SELECT id FROM entries WHERE kind = 'base'")}
        for name in sorted(bases.keys() - registered):
            self._insert(id=name, base=name, kind="base")
        rows = self.database.rows(f"SELECT * FROM entries WHERE {condition} ORDER BY seq", *parameters)
        return [self._entry(row, bases) for row in rows if row["kind"] != "base" or row["id"] in bases]

    def path_in_home(self, entry: Entry) -> str | None:
        """Where the entry's own folder lies, an adapter's for an adapter; None for a base model outside of home."""
        folder = entry.adapter_dir or entry.base_dir
        return str(folder.relative_to(self.home)) if folder.is_relative_to(self.home) else None

    def checkpoint_id(self, job: Job, event: Mapping[str, Any]) -> str:
        name = f"ft:{job.model}:{self.organization}:{job.suffix}:{job.id[-8:]}"
        return name if event["final"] else f"{name}:ckpt-step-{event['step']}"

    def add_checkpoint(
        self, job: Job, run_dir: Path, event: Mapping[str, Any], *, weights: Path | None = None
    ) -> Entry:
        """Register what a trainer's `checkpoint` event of kind "adapter" or "full" tells.

        `weights` is the model folder that an adapter stands on, where that is not the base model's. A step that is told
        again, after the run was taken up at an earlier one, stays the entry that it is.
        """
        entry_id, folder = self.checkpoint_id(job, event), run_dir / event["path"]
        with self.database.transaction():
            self._insert(
                id=entry_id,
                base=job.model,
                kind=event["kind"],
                folder=self._relative(folder),
                weights=None if weights is None else self._relative(weights),
                job_id=job.id,
                step=event["step"],
                epoch=event.get("epoch"),
                train_loss=event.get("loss"),
                validation_loss=event.get("validation_loss"),
                token_accuracy=event.get("token_accuracy"),
                validation_token_accuracy=event.get("validation_token_accuracy"),
            )
            if event.get("best"):
                self.database.connection.execute(
                    "UPDATE entries SET best = (id = ?) WHERE job_id = ?", (entry_id, job.id)
                )
        return self.get(entry_id)

    def remove(self, entry: Entry) -> None:
        """Forget a fine-tuned entry and its promotions. What lies on the disk is the caller's."""
        with self.database.transaction():
            self.database.connection.execute("DELETE FROM promotions WHERE entry_id = ?", (entry.id,))
            self.database.connection.execute("DELETE FROM entries WHERE id = ? AND kind != 'base'", (entry.id,))

    def standing_on(self, entry: Entry) -> list[Entry]:
        """Adapters whose weights are this full checkpoint."""
        return [] if entry.kind != "full" else self._select("weights = ?", self._relative(entry.base_dir))

    def _relative(self, folder: Path) -> str:
        return str(folder.relative_to(self.home) if folder.is_relative_to(self.home) else folder)

    def _insert(self, **columns: Any) -> None:
        self.database.insert("entries", unless_there=True, created_at=time.time(), **columns)

    def _entry(self, row: sqlite3.Row, bases: Mapping[str, Path]) -> Entry:
        columns = dict(row)
        kind, base, folder, weights = columns["kind"], columns["base"], columns.pop("folder"), columns.pop("weights")
        own = None if folder is None else self.home / folder
        base_dir = bases.get(base, self.home / "models" / base) if weights is None else self.home / weights
        return Entry(
            **columns | {"best": bool(columns["best"])},
            base_dir=own if kind == "full" and own else base_dir,
            adapter_dir=own if kind == "adapter" else None,
        )

    # ---- promotions

    def promotions(self, base: str) -> list[Promotion]:
        """Those of `base` that were not undone, newest first."""
        rows = self.database.rows(
            "SELECT promotions.* FROM promotions JOIN entries ON entries.id = entry_id"
            " WHERE base = ? AND undone_at IS NULL ORDER BY promotions.seq DESC",
            base,
        )
        names = ("seq", "entry_id", "reason", "created_at")
        return [Promotion(**{name: row[name] for name in names}) for row in rows]

    def was_promoted(self, entry_id: str) -> bool:
        """Whether it ever was, undone or not."""
        return self.database.row("SELECT 1 FROM promotions WHERE entry_id = ?", entry_id) is not None

    def last_change(self, base: str) -> float | None:
        """When `latest` of this base last became another entry; None when it never did."""
        row = self.database.row(
            "SELECT max(max(promotions.created_at), max(coalesce(undone_at, 0))) AS time"
            " FROM promotions JOIN entries ON entries.id = entry_id WHERE base = ?",
            base,
        )
        assert row is not None  # an aggregate always has a row
        time_: float | None = row["time"]
        return time_

    def add_promotion(self, entry_id: str, reason: str) -> None:
        self.database.insert("promotions", entry_id=entry_id, reason=reason, created_at=time.time())

    def undo_promotions(self, base: str, *, down_to: int) -> None:
        """Take back the promotions of `base` above the one with the sequence number `down_to` (0: all of them)."""
        with self.database.transaction():
            for promotion in self.promotions(base):
                if promotion.seq > down_to:
                    self.database.connection.execute(
                        "UPDATE promotions SET undone_at = ? WHERE seq = ?", (time.time(), promotion.seq)
                    )


def _known(names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return "none exists yet"
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return f"known are {', '.join(names[:NUM_NAMED])}{more}"
