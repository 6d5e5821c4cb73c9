"""Keeps digests of the entries that an outbox deletes: the table `segments`.

An entry is kept whole for some days. When it is deleted, its digest is added to the chain of its source in the same
transaction, so every settled entry is in the outbox or in a segment.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

from producers.segments import Recorded, Segment, chain_of

# Older segments lose their prefixes: their heads still prove all values, but no longer say which one has changed.
_PREFIXED_SEGMENTS = 16_000  # of all sources; 64 MiB, a sixteenth of the largest outbox

SEGMENT_COLUMNS = ("source_id", "previous", "head", "numbers", "rejected", "checksum", "prefixes")

_SELECT = "SELECT id, previous, head, numbers, rejected, prefixes FROM segments WHERE source_id = ?"
_LAST = f"{_SELECT} ORDER BY id DESC LIMIT 1"  # constants
_OF_SOURCE = f"{_SELECT} ORDER BY id"  # constants
_INSERT = f"INSERT INTO segments ({', '.join(SEGMENT_COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # constants
_INSERT_MISSING = f"""
INSERT INTO segments ({", ".join(SEGMENT_COLUMNS)}) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7
WHERE NOT EXISTS (SELECT 1 FROM segments WHERE source_id = ?1 AND head = ?3)
"""  # noqa: S608  # constants
_DELETE_OLD_PREFIXES = """
UPDATE segments SET prefixes = x'' WHERE id <= (SELECT max(id) FROM segments) - ? AND prefixes <> x''
"""


def add_to_chain(db: sqlite3.Connection, source_id: str, events: Sequence[Recorded]) -> None:
    """Add settled events of one source, which are about to be deleted, to its chain."""
    row = db.execute(_LAST, (source_id,)).fetchone()
    last = None if row is None else _segment(row)
    if last is not None and last.room:
        db.execute("DELETE FROM segments WHERE id = ?", row[:1])
    db.executemany(_INSERT, [_row(source_id, segment) for segment in chain_of(events, last)])
    db.execute(_DELETE_OLD_PREFIXES, (_PREFIXED_SEGMENTS,))


def segments_of(db: sqlite3.Connection, source_id: str) -> Iterator[Segment]:
    """Yield the segments of one source in the order in which they were made."""
    return map(_segment, db.execute(_OF_SOURCE, (source_id,)))


def insert_missing(db: sqlite3.Connection, row: Sequence[Any]) -> None:
    """Insert a segment of another file of this outbox, as a row of SEGMENT_COLUMNS, unless this file has it."""
    db.execute(_INSERT_MISSING, row)


def segment_row_of(values: Sequence[Any]) -> Sequence[Any] | None:
    """Return the row of SEGMENT_COLUMNS in a record that was read from a damaged file, or None if it is no segment."""
    row = values[1:]
    if len(row) != len(SEGMENT_COLUMNS):
        return None
    is_segment = all(isinstance(row[n], str) for n in (0, 3, 4)) and all(
        isinstance(row[n], bytes) for n in (1, 2, 5, 6)
    )
    return row if is_segment and row[5] == _checksum(row[0], *row[1:5]) else None


def _segment(row: Sequence[Any]) -> Segment:
    _, previous, head, numbers, rejected, prefixes = row
    ranges = tuple((first, last) for first, last in json.loads(numbers))
    return Segment(previous, head, ranges, frozenset(json.loads(rejected)), prefixes)


def _row(source_id: str, segment: Segment) -> tuple[Any, ...]:
    numbers, rejected = json.dumps(segment.ranges), json.dumps(sorted(segment.rejected))
    checksum = _checksum(source_id, segment.previous, segment.head, numbers, rejected)
    return (source_id, segment.previous, segment.head, numbers, rejected, checksum, segment.prefixes)


def _checksum(source_id: str, previous: bytes, head: bytes, numbers: str, rejected: str) -> bytes:
    """Return a checksum of a row, because the pages of a damaged file have none."""
    return sha256(f"{source_id} {numbers} {rejected} ".encode() + previous + head).digest()[:8]
