"""The tables of the service's database, and how each version became the next one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

TABLES = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    model TEXT NOT NULL,
    options TEXT NOT NULL,
    data_files TEXT NOT NULL,
    file_id TEXT,
    suffix TEXT NOT NULL,
    promote TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    attempt INTEGER NOT NULL DEFAULT 1,
    pid INTEGER,
    events_offset INTEGER NOT NULL DEFAULT 0,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    progress TEXT NOT NULL DEFAULT '{}',
    error TEXT,
    fine_tuned_model TEXT
);
CREATE INDEX jobs_by_status ON jobs (status);
CREATE TABLE job_events (
    job_id TEXT NOT NULL REFERENCES jobs (id),
    seq INTEGER NOT NULL,
    type TEXT NOT NULL,
    time REAL NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job_id, seq)
) WITHOUT ROWID;
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    base TEXT NOT NULL,
    kind TEXT NOT NULL,
    folder TEXT,
    job_id TEXT REFERENCES jobs (id),
    step INTEGER,
    created_at REAL NOT NULL,
    train_loss REAL,
    validation_loss REAL
);
CREATE TABLE promotions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    entry_id TEXT NOT NULL REFERENCES entries (id),
    reason TEXT NOT NULL,
    created_at REAL NOT NULL,
    undone_at REAL
);
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at REAL NOT NULL
);
"""


def _create_tables(connection: sqlite3.Connection) -> None:
    for statement in TABLES.split(";\n"):
        connection.execute(statement)


def _add_notes(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE jobs ADD COLUMN notes TEXT NOT NULL DEFAULT '[]'")


JOBS_THAT_PAUSE = """
ALTER TABLE jobs ADD COLUMN run_name TEXT NOT NULL DEFAULT '';
UPDATE jobs SET run_name = CASE WHEN attempt = 1 THEN id ELSE id || '.attempt' || attempt END;
ALTER TABLE jobs ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN paused INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN pause_requested INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN datasets TEXT NOT NULL DEFAULT '[]';
ALTER TABLE jobs ADD COLUMN validation TEXT;
ALTER TABLE jobs ADD COLUMN validation_file_id TEXT;
ALTER TABLE jobs ADD COLUMN file_ids TEXT NOT NULL DEFAULT '[]';
UPDATE jobs SET file_ids = json_array(file_id) WHERE file_id IS NOT NULL;
ALTER TABLE jobs ADD COLUMN result_files TEXT NOT NULL DEFAULT '[]';
ALTER TABLE jobs ADD COLUMN start_from TEXT;
ALTER TABLE jobs ADD COLUMN merge_start INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}';
ALTER TABLE jobs ADD COLUMN webhook TEXT;
ALTER TABLE jobs ADD COLUMN idempotency_key TEXT;
ALTER TABLE jobs ADD COLUMN request_hash TEXT;
CREATE UNIQUE INDEX jobs_by_key ON jobs (idempotency_key);
ALTER TABLE entries ADD COLUMN weights TEXT;
ALTER TABLE entries ADD COLUMN epoch INTEGER;
ALTER TABLE entries ADD COLUMN token_accuracy REAL;
ALTER TABLE entries ADD COLUMN validation_token_accuracy REAL;
ALTER TABLE entries ADD COLUMN best INTEGER NOT NULL DEFAULT 0;
CREATE TABLE webhooks (
    id TEXT NOT NULL UNIQUE,
    job_id TEXT NOT NULL REFERENCES jobs (id),
    url TEXT NOT NULL,
    body TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    next_attempt_at REAL,
    delivered_at REAL,
    problem TEXT
);
"""
"""`next_attempt_at` of a webhook is null once it was delivered or given up."""


def _let_jobs_pause(connection: sqlite3.Connection) -> None:
    for statement in JOBS_THAT_PAUSE.strip().split(";\n"):
        connection.execute(statement)


def _let_files_expire(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE files ADD COLUMN expires_at REAL")


MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = [
    _create_tables,
    _add_notes,
    _let_jobs_pause,
    _let_files_expire,
]
"""Migration N brings a database from user_version N to N + 1. Append only."""
