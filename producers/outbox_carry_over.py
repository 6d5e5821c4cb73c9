"""Carries unsettled entries from an outbox file that was removed or replaced into the file at the path.

Entries keep their source, number and nonce, and so their job id: if Redis or the database has one already, it is
recognized as the same delivery. An entry that the outbox has stays as it is there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sqlite3
from pathlib import Path

from producers.outbox_place import TAKEN_OUT, OutboxPlace
from producers.sqlite_connections import is_damage

logger = logging.getLogger(__name__)

ENTRY_COLUMNS = (
    "source_id", "sequence", "nonce", "recorder", "event_id", "type", "summary", "event", "state", "recorded_at",
    "checks", "check_at", "settled_at", "row_id", "reason",
)  # fmt: skip
_SOURCE_COLUMNS = ("id", "name", "last_sequence", "resends", "current", "left_because")

# In the order of the columns: a file that a dead process has left behind is salvaged like a damaged one.
_COPY_OUT = (
    "CREATE TABLE taken_out.outbox AS SELECT * FROM main.outbox",
    "CREATE TABLE taken_out.sources AS SELECT * FROM main.sources",
    "CREATE TABLE taken_out.entries AS SELECT * FROM main.entries WHERE state IN ('pending', 'sent') ORDER BY position",
)
_CARRY_OVER = f"""
INSERT OR IGNORE INTO main.entries ({", ".join(ENTRY_COLUMNS)})
SELECT {", ".join(ENTRY_COLUMNS)} FROM taken_out.entries ORDER BY position
"""  # noqa: S608  # constants
_SELECT_SOURCES = f"SELECT {', '.join(_SOURCE_COLUMNS)} FROM taken_out.sources"  # noqa: S608  # constants

# A source goes on here, unless its name has another current one here.
CONTINUE_SOURCE = """
INSERT INTO sources (id, name, last_sequence, resends, current, left_because)
VALUES (:id, :name, :last_sequence, :resends,
    :current AND NOT EXISTS (SELECT 1 FROM sources WHERE name = :name AND current), :left_because)
ON CONFLICT (id) DO UPDATE SET last_sequence = max(last_sequence, excluded.last_sequence),
    resends = max(resends, excluded.resends)
"""
# A new file has the tokens of the one that it continues; any other has its own.
_CONTINUE_HEADER = """
UPDATE outbox SET token = ?, next_token = ?, redis = ?, queue = ? WHERE NOT EXISTS (SELECT 1 FROM sources)
"""


class CarryOver:
    """Files beside the outbox with what was taken out of removed files and is not in the next one yet.

    Each is locked while this process lives: if it dies before, a relay salvages the file.
    """

    def __init__(self, place: OutboxPlace) -> None:
        self._place = place
        self._locks: dict[Path, int] = {}

    @property
    def is_pending(self) -> bool:
        return bool(self._locks)

    def take_out(self, db: sqlite3.Connection) -> bool:
        """Copy the header, the sources and the unsettled entries; False when damage keeps them from being read."""
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
        """Copy what was taken out into this database, and remove the files; returns how many entries are new."""
        carried = 0
        for file in list(self._locks):
            if file.exists():  # else a child of this process was first
                carried += _put_in(db, file)
                file.unlink(missing_ok=True)
            os.close(self._locks.pop(file))
        return carried


def is_in_use(taken_out: Path) -> bool:
    """Whether the process that has made the file, or a child of it, is alive: it holds a lock on it."""
    try:
        descriptor = os.open(taken_out, os.O_RDONLY)
    except FileNotFoundError:
        return True  # no longer needed
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
        return carried
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
        db.execute("DETACH taken_out")


def _carry_over(db: sqlite3.Connection) -> int:
    db.execute(_CONTINUE_HEADER, db.execute("SELECT token, next_token, redis, queue FROM taken_out.outbox").fetchone())
    for row in db.execute(_SELECT_SOURCES).fetchall():
        db.execute(CONTINUE_SOURCE, dict(zip(_SOURCE_COLUMNS, row, strict=True)))
    return db.execute(_CARRY_OVER).rowcount
