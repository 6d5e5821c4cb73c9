"""Finds faults in an outbox file: those that SQLite's own check finds, indexes that lack entries, and lost states.

A power failure may lose the write of one page, which is then older than the others.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from producers.errors import OutboxDamaged
from producers.outbox_file import OutboxFile
from producers.outbox_schema import IS_PLAIN

T = TypeVar("T")

logger = logging.getLogger(__name__)

_CHECK_STEPS = 10_000  # instructions of SQLite's virtual machine between two readings of the clock

# The table of each index, and the condition for its rows; usually the smallest table first. SQLite made the last one,
# for the unique columns.
INDEXES = {
    "retries_by_check": ("retries", "true"),
    "outcomes_by_age": ("outcomes", "true"),
    "outcomes_rejected": ("outcomes", "row_id IS NULL"),
    "sqlite_autoindex_entries_1": ("entries", "true"),
}
# Entries that were sent, but are in no batch: their retry or outcome is lost.
_WITHOUT_STATE = f"""
SELECT position FROM entries WHERE position <= (SELECT sent_through FROM outbox) AND {IS_PLAIN}
    AND position > coalesce((SELECT last FROM batches WHERE first <= entries.position ORDER BY first DESC LIMIT 1), 0)
"""  # noqa: S608  # constants
# The entry may have been settled, or deleted, since it was found.
_CHECK = f"""
INSERT INTO retries (position, why, checks, check_at)
SELECT position, 'state lost', 1, 0 FROM entries WHERE position = ? AND {IS_PLAIN}
"""  # noqa: S608  # constants


def find_fault(file: OutboxFile, seconds: float, *, repair: bool) -> str | None:
    """Check the file for at most `seconds` seconds.

    Returns:
        The first fault, or None if the file is sound, or "unfinished" if the time was too short. An index that lacks
        entries, and an entry without a state, are faults; with `repair` they are repaired.
    """
    now = time.monotonic()
    try:
        without_state = _entries_without_state(file, now + seconds / 3)
        if repair and without_state:
            _give_state(file, without_state)  # before the indexes are rebuilt from the tables
        stale = _stale_indexes(file, now + 2 * seconds / 3)
    except OutboxDamaged as error:
        fault = _quick_check(file, now + seconds)
        return str(error) if fault in (None, "unfinished") else fault
    if repair and stale:
        _rebuild(file, stale)
    fault = _quick_check(file, now + seconds)
    if fault in (None, "unfinished") and not repair and (stale or without_state):
        faulty = f"index {', '.join(stale)} is stale" if stale else f"{len(without_state)} entries have no state"
        return f"{faulty}: a controller or relay repairs that when it starts"
    return fault


def _entries_without_state(file: OutboxFile, deadline: float) -> list[int]:
    """Return the positions of entries in no view, or none if the deadline passes."""
    with file.reading() as db:
        found = _until(deadline, db, lambda: db.execute(_WITHOUT_STATE).fetchall())
    return [position for (position,) in found or ()]


def _give_state(file: OutboxFile, positions: list[int]) -> None:
    """Let the relay look for the jobs and acknowledgements of these entries."""
    with file.transaction() as db:
        db.executemany(_CHECK, [(position,) for position in positions])
    logger.error(
        "outbox %s: the states of %d entries were lost, as after a power failure; the relay checks these entries. Check"
        " the disk",
        file.path,
        len(positions),
    )


def _stale_indexes(file: OutboxFile, deadline: float) -> list[str]:
    """Return the stale indexes that are found by the deadline. SQLite's quick check does not find them."""
    with file.reading() as db:
        return [index for index in INDEXES if _until(deadline, db, partial(_is_stale, db, index))]


def _is_stale(db: sqlite3.Connection, index: str) -> bool:
    table, has = INDEXES[index]
    # Count and sum the positions in the index and in its table, in one statement, so that both see the same state.
    sums = ", ".join(
        f"(SELECT count(*) || ':' || total(position) FROM {table} {through} WHERE {has})"  # noqa: S608  # constants
        for through in (f"INDEXED BY {index}", "NOT INDEXED")
    )
    in_index, in_table = db.execute(f"SELECT {sums}").fetchone()
    return bool(in_index != in_table)


def _rebuild(file: OutboxFile, indexes: list[str]) -> None:
    with file.transaction() as db:
        for index in indexes:
            db.execute(f"REINDEX {index}")
    logger.error(
        "outbox %s: an index lacked entries, as after a power failure, and was rebuilt: %s. Check the disk",
        file.path,
        ", ".join(indexes),
    )


def _quick_check(file: OutboxFile, deadline: float) -> str | None:
    with file.reading() as db:
        found = _until(deadline, db, lambda: db.execute("PRAGMA quick_check(1)").fetchone())
    if found is None:
        return "unfinished"
    return None if found[0] == "ok" else str(found[0])


def _until(deadline: float, db: sqlite3.Connection, query: Callable[[], T]) -> T | None:
    """Return the query's result, or None if it has not ended by the deadline."""
    db.set_progress_handler(lambda: time.monotonic() > deadline, _CHECK_STEPS)
    try:
        return query()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return None
    finally:
        db.set_progress_handler(None, 0)
