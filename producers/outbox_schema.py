"""The tables of an outbox.

Entries are a log: they are appended, and later deleted, but never changed. The other tables have their states, for many
entries at once where possible:

- Entries up to `outbox.sent_through` are sent, the later ones are pending. `batches` has the ranges that were sent at
  once, until all their entries are settled or their first check is due.
- `retries` has the exceptions, one row for each: entries whose first check found them unsettled, entries to send again,
  and entries that came from another file. It says why.
- `outcomes` has the settled entries.
- `segments` has the digests of settled entries that were deleted.

The views `pending`, `sent` and `entry_states` compute the state of entries from these tables.
"""

from __future__ import annotations

import secrets
import sqlite3
from pathlib import Path

from producers.errors import OutboxError
from producers.outbox_clock import ClockReading

VERSION = 7

# Condition for an entry of the log: it has no row in `outcomes` or `retries`.
IS_PLAIN = """NOT EXISTS (SELECT 1 FROM outcomes WHERE outcomes.position = entries.position)
    AND NOT EXISTS (SELECT 1 FROM retries WHERE retries.position = entries.position)"""

# Move `sent_through` beyond entries that were settled before they were sent, for example because they were salvaged.
SKIP_SETTLED = f"""
UPDATE outbox SET sent_through = coalesce(
    (SELECT position - 1 FROM entries WHERE position > sent_through AND {IS_PLAIN} ORDER BY position LIMIT 1),
    max(sent_through, (SELECT max(position) FROM entries)),
    sent_through)
"""  # noqa: S608  # a constant

# All times are seconds since the epoch by the outbox's own clock.
# `outbox` has one row. `token` distinguishes copies of the file. Redis may have one of `other_tokens` in its place.
# `redis` and `queue` say where the entries go; `relay` and `relay_at` are the heartbeat of a relay process; the four
# clock columns are a ClockReading.
# `sources` has the last number of each source. Each name has one current source, which new events get; the entries of
# the other sources are still relayed.
# `losses` has the numbers whose entries could not be read from a damaged file.
# `entries.position` is never used twice: an outcome must not be taken for that of another entry.
# `entries.recorder` identifies the HistoryProducer object that recorded the entry.
# If `check_at` of a retry is NULL, the entry is pending; otherwise it is sent. `checks` above 0 says that Redis may
# have its job.
# An outcome without `row_id` is a rejection.
# `segments` is described in producers/segments.py: `ranges` and `rejected` are JSON.
# A salvage recognizes a record by the number and the types of its values, which must differ from table to table.
TABLES = f"""
CREATE TABLE outbox (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    sent_through INTEGER NOT NULL DEFAULT 0,
    token TEXT NOT NULL,
    other_tokens TEXT NOT NULL DEFAULT '',
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
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    source_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    nonce TEXT NOT NULL,
    recorder INTEGER NOT NULL,
    recorded_at REAL NOT NULL,
    event_id TEXT NOT NULL,
    type TEXT NOT NULL,
    summary TEXT NOT NULL,
    event TEXT NOT NULL,
    UNIQUE (source_id, sequence, nonce)
);
CREATE TABLE batches (
    first INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    check_at REAL NOT NULL
);
CREATE TABLE retries (
    position INTEGER PRIMARY KEY,
    why TEXT NOT NULL,
    checks INTEGER NOT NULL,
    check_at REAL
);
CREATE INDEX retries_by_check ON retries (check_at);
CREATE TABLE outcomes (
    position INTEGER PRIMARY KEY,
    settled_at REAL NOT NULL,
    row_id INTEGER,
    reason TEXT
);
CREATE INDEX outcomes_by_age ON outcomes (settled_at);
CREATE INDEX outcomes_rejected ON outcomes (position) WHERE row_id IS NULL;
CREATE TABLE segments (
    id INTEGER PRIMARY KEY,
    source_id TEXT NOT NULL,
    previous_head BLOB NOT NULL,
    head BLOB NOT NULL,
    ranges TEXT NOT NULL,
    rejected TEXT NOT NULL,
    checksum BLOB NOT NULL,
    prefixes BLOB NOT NULL
);
CREATE INDEX segments_of_source ON segments (source_id, id);
CREATE INDEX segments_by_head ON segments (head);
CREATE VIEW pending AS
    SELECT position FROM retries WHERE check_at IS NULL
    UNION ALL
    SELECT position FROM entries WHERE position > (SELECT sent_through FROM outbox) AND {IS_PLAIN};
CREATE VIEW sent AS
    SELECT position, checks, check_at FROM retries WHERE check_at >= 0  -- by the index, unlike IS NOT NULL
    UNION ALL
    SELECT position, 1, check_at FROM batches CROSS JOIN entries ON position BETWEEN first AND last WHERE {IS_PLAIN};
CREATE VIEW entry_states AS
    SELECT entries.*, settled_at, row_id, reason, CASE
        WHEN settled_at IS NOT NULL THEN iif(row_id IS NULL, 'rejected', 'stored')
        WHEN retries.position IS NOT NULL THEN iif(check_at IS NULL, 'pending', 'sent')
        ELSE iif(entries.position > (SELECT sent_through FROM outbox), 'pending', 'sent') END AS state
    FROM entries LEFT JOIN outcomes USING (position) LEFT JOIN retries USING (position);
"""  # noqa: S608  # a constant
_INSERT_OUTBOX = """
INSERT INTO outbox (only_row, token, clock_shown, clock_boot, clock_running, clock_wall) VALUES (1, ?, ?, ?, ?, ?)
"""


def ensure_tables(db: sqlite3.Connection, path: Path) -> None:
    """Create the tables in an empty file, in one transaction. If this raises, close the connection.

    Raises:
        OutboxError: another version of this program wrote the file.
    """
    if _version_of(db, path) == VERSION:
        return
    db.execute("BEGIN IMMEDIATE")
    if _version_of(db, path) != VERSION:  # another process may have created the tables meanwhile
        for statement in TABLES.split(";\n"):
            db.execute(statement)
        reading = ClockReading.first()
        clock = (reading.shown, reading.boot, reading.running, reading.wall)
        db.execute(_INSERT_OUTBOX, (secrets.token_hex(8), *clock))
        db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")


def _version_of(db: sqlite3.Connection, path: Path) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in (0, VERSION):
        age, remedy = ("a newer", "upgrade this program") if version > VERSION else ("an earlier", "")
        remedy = remedy or (
            "run `trading-history outbox flush` of that version, then set HISTORY_OUTBOX to another path or remove the"
            " file"
        )
        raise OutboxError(
            f"outbox {path}: was written by {age} version of this program (format {version}; this one reads format"
            f" {VERSION}). Nothing was changed: {remedy}"
        )
    return int(version)
