"""The tables of an outbox, and the upgrade of a file of an earlier version."""

from __future__ import annotations

import secrets
import sqlite3
from pathlib import Path

from producers.errors import OutboxError, OutboxOutdated
from producers.outbox_clock import ClockReading

VERSION = 4

# All times are seconds since the epoch by the outbox's own clock.
# `outbox` has one row. `token` distinguishes copies of the file, `next_token` is about to replace it; `redis` and
# `queue` say where the entries go; `relay` and `relay_at` are the heartbeat of a relay process; the four clock columns
# are a ClockReading.
# `sources` has the last number of each source. Each name has one current source, which new events get; the entries of
# the other sources are still relayed.
# `losses` has the numbers whose entries could not be read from a damaged file.
# `entries.recorder` identifies the HistoryProducer object that recorded the entry. It and `nonce` have defaults because
# a process of an earlier release may have the file open during an upgrade and continue to append.
_TABLES = """
CREATE TABLE outbox (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    token TEXT NOT NULL,
    next_token TEXT,
    redis TEXT,
    queue TEXT,
    relay TEXT,
    relay_at REAL,
    clock_shown REAL NOT NULL,
    clock_boot TEXT NOT NULL,
    clock_running REAL NOT NULL,
    clock_wall REAL NOT NULL
);
CREATE TABLE sources (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    last_sequence INTEGER NOT NULL,
    resends INTEGER NOT NULL DEFAULT 0,
    current INTEGER NOT NULL DEFAULT 1,
    left_because TEXT
);
CREATE UNIQUE INDEX sources_current ON sources (name) WHERE current;
CREATE TABLE losses (
    source_id TEXT NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    file TEXT NOT NULL
);
CREATE TABLE entries (
    position INTEGER PRIMARY KEY,
    source_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    nonce TEXT NOT NULL DEFAULT '',
    recorder INTEGER NOT NULL DEFAULT 0,
    event_id TEXT NOT NULL,
    type TEXT NOT NULL,
    summary TEXT NOT NULL,
    event TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'sent', 'stored', 'rejected')),
    recorded_at REAL NOT NULL,
    checks INTEGER NOT NULL DEFAULT 0,
    check_at REAL,
    settled_at REAL,
    row_id INTEGER,
    reason TEXT,
    UNIQUE (source_id, sequence, nonce)
);
CREATE INDEX entries_pending ON entries (position) WHERE state = 'pending';
CREATE INDEX entries_sent ON entries (check_at) WHERE state = 'sent';
CREATE INDEX entries_settled ON entries (settled_at) WHERE state IN ('stored', 'rejected');
CREATE INDEX entries_awaiting ON entries (source_id) WHERE state = 'sent';
CREATE INDEX entries_rejected ON entries (source_id) WHERE state = 'rejected';
"""

# Upgrade from version 3.
_DROP_UNUSED = "ALTER TABLE sources DROP COLUMN left_at"

# Upgrade from versions 1 and 2.
_BEFORE_UPGRADE = """
ALTER TABLE entries RENAME TO entries_before;
ALTER TABLE sources RENAME TO sources_before;
DROP INDEX entries_pending;
DROP INDEX IF EXISTS entries_unconfirmed;
DROP INDEX IF EXISTS entries_confirmed;
DROP INDEX IF EXISTS entries_settled;
DROP INDEX IF EXISTS entries_awaiting;
DROP INDEX IF EXISTS entries_rejected;
"""
_UPGRADE = """
INSERT INTO sources (id, name, last_sequence, resends) SELECT id, name, last_sequence, {resends} FROM sources_before;
INSERT INTO entries (position, source_id, sequence, event_id, type, summary, event, state, recorded_at, checks,
    check_at, settled_at, row_id, reason)
SELECT position, source_id, sequence, event_id, type, summary, event,
    CASE state WHEN 'confirmed' THEN 'stored' ELSE state END, recorded_at, checks, check_at, settled_at, row_id, reason
FROM entries_before ORDER BY position;
DROP TABLE entries_before;
DROP TABLE sources_before;
"""
_INSERT_OUTBOX = """
INSERT INTO outbox (only_row, token, clock_shown, clock_boot, clock_running, clock_wall) VALUES (1, ?, ?, ?, ?, ?)
"""
_UPGRADE_MILLISECONDS = 120_000  # wait for an upgrade by another process: 400 MB take 20 s
_FIRST_RELEASE = 1  # `sources` had no column `resends`
_WITH_LEFT_AT = 3  # `sources` had a column that was never read


def ensure_tables(db: sqlite3.Connection, path: Path, *, upgrade: bool) -> None:
    """Create the tables or, with `upgrade`, upgrade them, in one transaction, unless the file is up to date.

    Raises:
        OutboxOutdated: an earlier release wrote the file; only without `upgrade`.
        OutboxError: a newer release wrote the file.
    """
    version = _version_of(db, path)
    if version == VERSION:
        return
    if version and not upgrade:
        # A controller of that release may be running, and after an upgrade all of its calls would fail.
        raise OutboxOutdated(
            f"outbox {path}: was written by an earlier release (version {version}). Nothing was changed; it is upgraded"
            " when a controller or relay of this release opens it"
        )
    (limit,) = db.execute("PRAGMA max_page_count").fetchone()
    (busy,) = db.execute("PRAGMA busy_timeout").fetchone()
    db.execute(f"PRAGMA busy_timeout = {_UPGRADE_MILLISECONDS}")
    db.execute("PRAGMA max_page_count = 4294967294")  # an upgrade needs room for old and new tables
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version_of(db, path)  # another process may have upgraded the file meanwhile
        if version != VERSION:
            _make(db, version)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    finally:
        db.execute(f"PRAGMA max_page_count = {limit}")
        db.execute(f"PRAGMA busy_timeout = {busy}")


def _version_of(db: sqlite3.Connection, path: Path) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise OutboxError(
            f"outbox {path}: was written by a newer release (version {version}; this release reads up to {VERSION})."
            " Upgrade this program"
        )
    return int(version)


def _make(db: sqlite3.Connection, version: int) -> None:
    if version == _WITH_LEFT_AT:
        db.execute(_DROP_UNUSED)
    else:
        upgrade = _UPGRADE.format(resends="0" if version == _FIRST_RELEASE else "resends")
        script = _BEFORE_UPGRADE + _TABLES + upgrade if version else _TABLES
        for statement in script.split(";"):
            db.execute(statement)
        reading = ClockReading.first()
        db.execute(_INSERT_OUTBOX, (secrets.token_hex(8), reading.shown, reading.boot, reading.running, reading.wall))
    db.execute(f"PRAGMA user_version = {VERSION}")
