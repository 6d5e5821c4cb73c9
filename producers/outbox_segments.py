"""The table `segments` of an outbox: digests of the entries that it has deleted.

An entry is kept whole for some days. When it is deleted, its digest is added to the chain of its source in the same
transaction. The digests of about 16 million events are kept; a seal (`audit --seal`) keeps older ones.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, TypeVar

from producers.digests import digest_of_text
from producers.segments import Segment, SettledEvent, continued

_MOST_SEGMENTS = 16_000  # of all sources; 128 MB, an eighth of the largest outbox
_PAGE_BYTES = 4 * 2**20  # of events: one may have 8 MiB

SEGMENT_COLUMNS = ("source_id", "previous_head", "head", "ranges", "rejected", "checksum", "prefixes")

_SELECT = "SELECT id, previous_head, head, ranges, rejected, prefixes FROM segments WHERE source_id = ?"
_LAST = f"{_SELECT} ORDER BY id DESC LIMIT 1"  # constants
_OF_SOURCE = f"{_SELECT} ORDER BY id"  # constants
_PUT = f"INSERT OR REPLACE INTO segments (id, {', '.join(SEGMENT_COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # constants
_INSERT_MISSING = f"""
INSERT INTO segments ({", ".join(SEGMENT_COLUMNS)}) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7
WHERE NOT EXISTS (SELECT 1 FROM segments WHERE source_id = ?1 AND head = ?3)
"""  # noqa: S608  # constants
_DELETE_OLDEST = "DELETE FROM segments WHERE id <= (SELECT max(id) FROM segments) - ?"

Row = TypeVar("Row", bound=Sequence[Any])


def add_to_chain(db: sqlite3.Connection, source_id: str, events: Sequence[SettledEvent]) -> None:
    """Add settled events of one source, which are about to be deleted, to its chain."""
    if not events:
        return
    found = db.execute(_LAST, (source_id,)).fetchone()
    last = None if found is None else _segment(found)
    changed = continued(last, events)
    if last is not None and last.free_places:  # it is the first of the changed ones
        db.execute(_PUT, (found[0], *_row(source_id, changed.pop(0))))
    db.executemany(_PUT, [(None, *_row(source_id, segment)) for segment in changed])
    db.execute(_DELETE_OLDEST, (_MOST_SEGMENTS,))


def settled_event(sequence: int, rejected: bool, event_type: str, event: str) -> SettledEvent | None:
    """Return what the chain needs of an entry; None if this version of the program does not know such an event."""
    digest = digest_of_text(event_type, event)
    return None if digest is None else SettledEvent(sequence, rejected, digest)


def segments_of(db: sqlite3.Connection, source_id: str) -> Iterator[Segment]:
    """Yield the segments of one source in the order in which they were made."""
    return map(_segment, db.execute(_OF_SOURCE, (source_id,)))


def insert_missing(db: sqlite3.Connection, rows: Iterable[Sequence[Any]]) -> None:
    """Insert segments of another file of this outbox, as rows of SEGMENT_COLUMNS, unless this file has them."""
    db.executemany(_INSERT_MISSING, rows)


def segment_row_of(values: Sequence[Any]) -> Sequence[Any] | None:
    """Return the row of SEGMENT_COLUMNS in a record that was read from a damaged file, or None if it is no segment."""
    row = values[1:]
    if len(row) != len(SEGMENT_COLUMNS):
        return None
    source_id, previous_head, head, ranges, rejected, checksum, prefixes = row
    if not all(isinstance(one, str) for one in (source_id, ranges, rejected)):
        return None
    if not all(isinstance(one, bytes) for one in (previous_head, head, checksum, prefixes)):
        return None
    texts, blobs = (source_id, ranges, rejected), (previous_head, head, prefixes)
    return row if checksum == _checksum(texts, blobs) else None


def one_page(rows: Iterable[Row]) -> list[Row]:
    """Return the first rows, up to 4 MiB of events but at least one. The event's text is the last column."""
    page: list[Row] = []
    size = 0
    for row in rows:
        size += len(row[-1])
        if page and size > _PAGE_BYTES:
            break
        page.append(row)
    return page


def _segment(row: Sequence[Any]) -> Segment:
    _, previous_head, head, ranges, rejected, prefixes = row
    numbers = tuple((first, last) for first, last in json.loads(ranges))
    return Segment(previous_head, head, numbers, frozenset(json.loads(rejected)), prefixes)


def _row(source_id: str, segment: Segment) -> tuple[Any, ...]:
    ranges, rejected = json.dumps(segment.ranges), json.dumps(sorted(segment.rejected))
    blobs = (segment.previous_head, segment.head, segment.prefixes)
    checksum = _checksum((source_id, ranges, rejected), blobs)
    return (source_id, segment.previous_head, segment.head, ranges, rejected, checksum, segment.prefixes)


def _checksum(texts: Iterable[str], blobs: Iterable[bytes]) -> bytes:
    """Return a checksum of a row's values, because the pages of a damaged file have none."""
    return sha256("\n".join(texts).encode() + b"".join(blobs)).digest()[:8]
