"""Finds faults in an outbox file: those that SQLite's own check finds, and indexes that lack entries."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

from producers.errors import OutboxDamaged
from producers.outbox_file import OutboxFile

T = TypeVar("T")

logger = logging.getLogger(__name__)

_CHECK_STEPS = 10_000  # instructions of SQLite's virtual machine between two readings of the clock

# The table of each index, and the condition for its rows. SQLite made the last one for the unique columns.
INDEXES = {
    "retries_by_check": ("retries", "true"),
    "outcomes_by_age": ("outcomes", "true"),
    "outcomes_rejected": ("outcomes", "row_id IS NULL"),
    "sqlite_autoindex_entries_1": ("entries", "true"),
}
# Count and sum the positions in each index and in its table, in one statement, so that both see the same state.
_SUMS = ", ".join(
    f"(SELECT count(*) || ':' || total(position) FROM {table} {through} WHERE {has})"  # noqa: S608  # constants
    for index, (table, has) in INDEXES.items()
    for through in (f"INDEXED BY {index}", "NOT INDEXED")
)
_COMPARE_INDEXES = f"SELECT {_SUMS}"  # constants


def find_fault(file: OutboxFile, seconds: float, *, repair: bool) -> str | None:
    """Check the file for at most `seconds` seconds.

    Returns:
        The first fault, or None if the file is sound, or "unfinished" if the time was too short. An index that lacks
        entries is a fault; with `repair` it is rebuilt.
    """
    deadline = time.monotonic() + seconds
    try:
        stale = _stale_indexes(file, time.monotonic() + seconds / 2)
    except OutboxDamaged as error:
        fault = _quick_check(file, deadline)
        return str(error) if fault in (None, "unfinished") else fault
    if repair and stale:
        _rebuild(file, stale)
    fault = _quick_check(file, deadline)
    if fault in (None, "unfinished") and stale and not repair:
        return f"index {', '.join(stale)} is stale: a controller or relay rebuilds it when it starts"
    return fault


def _stale_indexes(file: OutboxFile, deadline: float) -> list[str]:
    """Return the stale indexes, or none if the deadline passes. SQLite's quick check does not find them."""
    with file.reading() as db:
        found = _until(deadline, db, lambda: db.execute(_COMPARE_INDEXES).fetchone())
    if found is None:
        return []
    return [index for index, has, should in zip(INDEXES, found[::2], found[1::2], strict=True) if has != should]


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
