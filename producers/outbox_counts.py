"""Counts and ages of an outbox's entries, without reading their events: a status is shown often."""

from __future__ import annotations

import sqlite3
from typing import Literal

from producers.entries import OutboxGrowth, OutboxStatus
from producers.outbox_schema import IS_PLAIN

ALL = 2**62  # a position beyond all entries
# To measure the growth, at most 20,000 entries are read.
PAGE_ENTRIES = 500
MOST_PAGES = 40

# Beyond `sent_through` no position is missing: entries are deleted only up to it.
_PENDING_COUNT = """
SELECT (SELECT count(*) FROM retries WHERE check_at IS NULL AND position <= :until)
    + max(0, min(:until, coalesce((SELECT max(position) FROM entries), 0)) - sent_through
        - (SELECT count(*) FROM outcomes WHERE position > sent_through AND position <= :until)
        - (SELECT count(*) FROM retries WHERE position > sent_through AND position <= :until))
FROM outbox
"""
_SENT_COUNT = "SELECT count(*) FROM sent WHERE +position <= :until"  # + keeps the index of the view
_COUNT_OF_PRODUCER = """
SELECT count(*) FROM (SELECT position FROM pending UNION ALL SELECT position FROM sent) CROSS JOIN entries
    USING (position) WHERE recorder = :producer_id AND position <= :until
"""
_SETTLED_COUNTS = """
SELECT (SELECT count(*) FROM outcomes), (SELECT count(*) FROM outcomes WHERE row_id IS NULL)
"""
# Reads one pending entry; the view's minimum would be that of all of them.
_OLDEST = {
    "pending": f"""
SELECT recorded_at FROM entries WHERE position IN (
    SELECT min(position) FROM retries WHERE check_at IS NULL
    UNION ALL
    SELECT * FROM (
        SELECT position FROM entries WHERE position > (SELECT sent_through FROM outbox) AND {IS_PLAIN}
        ORDER BY position LIMIT 1))
ORDER BY position LIMIT 1
""",  # noqa: S608  # constants
    "sent": "SELECT recorded_at FROM entries WHERE position = (SELECT min(position) FROM sent)",
}

_NEWEST = "SELECT recorded_at FROM entries ORDER BY position DESC"
_NEWEST_BYTES = """
SELECT coalesce(avg(length(CAST(event AS BLOB))), 0.0) FROM (SELECT event FROM entries ORDER BY position DESC LIMIT 100)
"""
_SETTLED_SINCE = "SELECT count(*) FROM outcomes WHERE settled_at > ? AND settled_at <= ?"
_OLDEST_OUTCOME = "SELECT min(settled_at) FROM outcomes"
_LAST_POSITION = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'entries'), 0)"


def pending(db: sqlite3.Connection, until: int = ALL) -> int:
    """Return the number of pending entries up to a position."""
    return _number(db, _PENDING_COUNT, {"until": until})


def sent(db: sqlite3.Connection, until: int = ALL) -> int:
    """Return the number of sent entries up to a position."""
    return _number(db, _SENT_COUNT, {"until": until})


def unsettled_of_producer(db: sqlite3.Connection, producer_id: int, until: int) -> int:
    """Return the number of pending and sent entries of one producer up to a position."""
    return _number(db, _COUNT_OF_PRODUCER, {"producer_id": producer_id, "until": until})


def status(db: sqlite3.Connection, now: float) -> OutboxStatus:
    """Count the entries by state. `now` is the time by the outbox's clock."""
    settled, rejected = db.execute(_SETTLED_COUNTS).fetchone()
    ages = (oldest_seconds(db, "pending", now), oldest_seconds(db, "sent", now))
    oldest = max((age for age in ages if age is not None), default=None)
    return OutboxStatus(pending(db), sent(db), settled - rejected, rejected, oldest)


def oldest_seconds(db: sqlite3.Connection, state: Literal["pending", "sent"], now: float) -> float | None:
    """Return the age of the oldest entry in this state, in seconds; None if no entry is in it."""
    row = db.execute(_OLDEST[state]).fetchone()
    return None if row is None else max(now - row[0], 0.0)


def growth(db: sqlite3.Connection, now: float, seconds: float) -> OutboxGrowth | None:
    """Return by how much the unsettled entries have grown in the last `seconds`.

    The time is shorter if very many entries were recorded, or if the outbox is younger.

    None if that is not known: entries that were settled in this time may have been deleted.
    """
    since, oldest_recent, recorded, newest = now - seconds, now, 0, db.execute(_NEWEST)
    for page_number in range(MOST_PAGES):
        recent = [at for (at,) in newest.fetchmany(PAGE_ENTRIES) if since < at <= now]
        if not recent:
            break
        recorded += len(recent)
        oldest_recent = min(recent)
        if page_number == MOST_PAGES - 1:
            since = oldest_recent
    counted = status(db, now)
    kept = counted.depth + counted.stored + counted.rejected
    last_position = db.execute(_LAST_POSITION).fetchone()[0]
    # Settled entries are deleted in the order in which they were settled.
    oldest = db.execute(_OLDEST_OUTCOME).fetchone()[0]
    if kept != last_position and (oldest is None or oldest > since):
        return None
    settled = db.execute(_SETTLED_SINCE, (since, now)).fetchone()[0]
    event_bytes = db.execute(_NEWEST_BYTES).fetchone()[0]
    is_young = 0 < recorded == kept == last_position  # the time before its first entry does not count
    return OutboxGrowth(recorded - settled, kept, now - (oldest_recent if is_young else since), event_bytes)


def _number(db: sqlite3.Connection, query: str, values: dict[str, int]) -> int:
    return int(db.execute(query, values).fetchone()[0])
