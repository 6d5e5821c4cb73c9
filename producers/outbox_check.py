"""Finds faults in an outbox file: SQLite's own check, and indexes that lack entries."""

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

_CHECK_STEPS = 10_000  # of SQLite's virtual machine, between two looks at the clock

# Each index, with the condition for the entries in it. The last one is that of the unique columns.
INDEXES = {
    "entries_pending": "state = 'pending'",
    "entries_sent": "state = 'sent'",
    "entries_awaiting": "state = 'sent'",
    "entries_settled": "state IN ('stored', 'rejected')",
    "entries_rejected": "state = 'rejected'",
    "sqlite_autoindex_entries_1": "true",
}
# Sums over the indexes and over the table, in one statement, so that both are of one moment.
_BY_INDEX = ", ".join(
    f"(SELECT count(*) || ':' || total(position) FROM entries INDEXED BY {index} WHERE {has})"  # noqa: S608  # constants
    for index, has in INDEXES.items()
)
_BY_TABLE = ", ".join(
    f"count(*) FILTER (WHERE {has}) || ':' || total(position) FILTER (WHERE {has})" for has in INDEXES.values()
)
_COMPARE_INDEXES = f"SELECT {_BY_INDEX}, {_BY_TABLE} FROM entries NOT INDEXED"  # noqa: S608  # constants


def find_fault(file: OutboxFile, seconds: float, *, repair: bool) -> str | None:
    """The first fault in the file, None when there is none, or `unfinished` after so many seconds.

    An index that lacks entries is a fault, and with `repair` is built anew.
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
        return f"index {', '.join(stale)} is stale: a controller or relay builds it anew when it starts"
    return fault


def _stale_indexes(file: OutboxFile, deadline: float) -> list[str]:
    """Stale indexes that are found by the deadline. SQLite's quick check does not compare an index with its table."""
    with file.reading() as db:
        found = _until(deadline, db, lambda: db.execute(_COMPARE_INDEXES).fetchone())
    if found is None:
        return []
    by_table = found[len(INDEXES) :]
    return [index for index, has, should in zip(INDEXES, found, by_table, strict=False) if has != should]


def _rebuild(file: OutboxFile, indexes: list[str]) -> None:
    with file.transaction() as db:
        for index in indexes:
            db.execute(f"REINDEX {index}")
    logger.error(
        "outbox %s: an index lacked entries, as after a power failure, and was built anew: %s. The entries that it"
        " lacked are sent now; check the disk",
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
    """The query's result; None if it has not ended by the deadline."""
    db.set_progress_handler(lambda: time.monotonic() > deadline, _CHECK_STEPS)
    try:
        return query()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return None
    finally:
        db.set_progress_handler(None, 0)
