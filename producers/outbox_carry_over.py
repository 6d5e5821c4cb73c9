"""Carries unsettled entries, and digests of deleted ones, from a removed or replaced file into the file at the path.

Entries keep their source, number and nonce, and so their job id: if Redis or the database already has such an entry, it
recognizes the same delivery. If the outbox at the path already has an entry, that entry is left unchanged.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sqlite3
from pathlib import Path

from producers.outbox_place import TAKEN_OUT, OutboxPlace
from producers.outbox_segments import SEGMENT_COLUMNS, insert_missing
from producers.sqlite_connections import is_damage

logger = logging.getLogger(__name__)

ENTRY_COLUMNS = (
    "source_id", "sequence", "nonce", "recorder", "recorded_at", "event_id", "type", "summary", "event",
)  # fmt: skip
_SOURCE_COLUMNS = ("id", "name", "last_sequence", "resends", "current", "left_because")

# The order of the columns matters: if the process dies, the file that it leaves is salvaged like a damaged one.
_COPY_OUT = (
    "CREATE TABLE taken_out.outbox AS SELECT * FROM main.outbox",
    "CREATE TABLE taken_out.sources AS SELECT * FROM main.sources",
    "CREATE TABLE taken_out.entries AS SELECT * FROM main.entries WHERE position IN"
    " (SELECT position FROM main.pending UNION ALL SELECT position FROM main.sent) ORDER BY position",
    "CREATE TABLE taken_out.sent AS SELECT position FROM main.sent",
    "CREATE TABLE taken_out.segments AS SELECT * FROM main.segments",
)
_CARRY_OVER = f"""
INSERT INTO main.entries ({", ".join(ENTRY_COLUMNS)})
SELECT {", ".join(ENTRY_COLUMNS)} FROM taken_out.entries AS taken_out WHERE NOT EXISTS (
    SELECT 1 FROM main.entries AS own WHERE own.source_id = taken_out.source_id
        AND own.sequence = taken_out.sequence AND own.nonce = taken_out.nonce)
ORDER BY position
"""  # noqa: S608  # constants
# A check is due at once: the relay looks in Redis for the jobs of entries that were sent.
_CHECK_SENT = """
INSERT INTO main.retries (position, why, checks, check_at) SELECT own.position, 'carried over', 1, 0
FROM taken_out.sent CROSS JOIN taken_out.entries AS taken_out USING (position) CROSS JOIN main.entries AS own
    ON own.source_id = taken_out.source_id AND own.sequence = taken_out.sequence AND own.nonce = taken_out.nonce
WHERE own.position > ?
"""
_SELECT_SEGMENTS = f"SELECT {', '.join(SEGMENT_COLUMNS)} FROM taken_out.segments ORDER BY id"  # noqa: S608  # constants
_SELECT_SOURCES = f"SELECT {', '.join(_SOURCE_COLUMNS)} FROM taken_out.sources"  # noqa: S608  # constants

# The names need `main`: while this connection does not know yet that another process has created the tables in this
# file, SQLite would take those of the temporary file.
# The source stays current unless this file already has another current source of the same name.
CONTINUE_SOURCE = """
INSERT INTO main.sources (id, name, last_sequence, resends, current, left_because)
VALUES (:id, :name, :last_sequence, :resends,
    :current AND NOT EXISTS (SELECT 1 FROM main.sources WHERE name = :name AND current), :left_because)
ON CONFLICT (id) DO UPDATE SET last_sequence = max(last_sequence, excluded.last_sequence),
    resends = max(resends, excluded.resends)
"""
# A new file takes the tokens of the file that it continues; a file that already has sources keeps its own.
_CONTINUE_HEADER = """
UPDATE main.outbox SET token = ?, other_tokens = ?, redis = ?, queue = ? WHERE NOT EXISTS (SELECT 1 FROM main.sources)
"""


class CarryOver:
    """Temporary files beside the outbox: they contain entries of removed files that the file at the path lacks.

    Each is locked as long as this process lives. If the process dies, a relay salvages the file.
    """

    def __init__(self, place: OutboxPlace) -> None:
        self._place = place
        self._locks: dict[Path, int] = {}

    @property
    def is_pending(self) -> bool:
        return bool(self._locks)

    def take_out(self, db: sqlite3.Connection) -> bool:
        """Copy header, sources, unsettled entries and segments into a temporary file; return False if damaged."""
        self._place.make_folder()
        file = self._place.sibling(f"{TAKEN_OUT}{secrets.token_hex(8)}")
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX)
        db.execute("ATTACH ? AS taken_out", (str(file),))
        try:
            for statement in _COPY_OUT:
                db.execute(statement)
        except sqlite3.Error as error:
            file.unlink(missing_ok=True)
            os.close(lock)
            if not is_damage(error):
                raise
            logger.error("outbox %s was removed, and its entries cannot be read: %s", self._place.path, error)
            return False
        finally:
            db.execute("DETACH taken_out")
        self._locks[file] = lock
        return True

    def put_in(self, db: sqlite3.Connection) -> int:
        """Copy the temporary files into this database, delete them, and return how many entries are new."""
        carried = 0
        for file in list(self._locks):
            if file.exists():  # otherwise a child of this process has done it
                carried += _put_in(db, file)
                file.unlink(missing_ok=True)
            os.close(self._locks.pop(file))
        return carried


def is_in_use(taken_out: Path) -> bool:
    """Return whether the process that made the file, or a child of it, is alive and therefore locks the file."""
    try:
        descriptor = os.open(taken_out, os.O_RDONLY)
    except FileNotFoundError:
        return True  # deleted in the meantime: there is nothing to salvage
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _put_in(db: sqlite3.Connection, taken_out: Path) -> int:
    db.execute("ATTACH ? AS taken_out", (str(taken_out),))
    try:
        db.execute("BEGIN IMMEDIATE")
        carried = _carry_over(db)
        db.execute("COMMIT")
        _carry_segments_over(db)
        return carried
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
        db.execute("DETACH taken_out")


def _carry_over(db: sqlite3.Connection) -> int:
    db.execute(
        _CONTINUE_HEADER, db.execute("SELECT token, other_tokens, redis, queue FROM taken_out.outbox").fetchone()
    )
    for row in db.execute(_SELECT_SOURCES).fetchall():
        db.execute(CONTINUE_SOURCE, dict(zip(_SOURCE_COLUMNS, row, strict=True)))
    (last,) = db.execute("SELECT coalesce(max(position), 0) FROM main.entries").fetchone()
    carried = db.execute(_CARRY_OVER).rowcount
    db.execute(_CHECK_SENT, (last,))
    return carried


def _carry_segments_over(db: sqlite3.Connection) -> None:
    """Copy the segments, after the entries are safe: a file without room for segments must not block new events."""
    try:
        db.execute("BEGIN IMMEDIATE")
        insert_missing(db, db.execute(_SELECT_SEGMENTS).fetchall())
        db.execute("COMMIT")
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
            raise
        logger.error(
            "the digests of deleted events could not be carried over, because the outbox is full: audit --content"
            " cannot check these events"
        )
