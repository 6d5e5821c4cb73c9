"""Reads the entries out of a damaged outbox file and copies them into the outbox.

Entries keep their source, number and nonce, and so their job id: if Redis or the database already has such an entry, it
recognizes the same delivery. If the outbox already has an entry, the entry is left unchanged, with one exception: a
settled entry that is unsettled in the damaged file is sent again. An entry whose outcome cannot be read, or that has a
retry beside it, is unsettled: the outcome may be one that was deleted for a resend.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from producers.entries import full_source
from producers.outbox_carry_over import CONTINUE_SOURCE, ENTRY_COLUMNS
from producers.outbox_schema import SKIP_SETTLED
from producers.outbox_segments import insert_missing, segment_row_of
from producers.sqlite_connections import sqlite_errors
from producers.sqlite_salvage import Record, readable_records

_SOURCE_COLUMNS = 6
_STATE_COLUMNS = 4  # of outcomes, and of retries
_SOURCE_ID = re.compile("[0-9a-f]{32}")
_MOST_LOST_RANGES = 1000
_INSERT_PAGE = 500
_PROBED_RECORDS = 5000

_FIND = """
SELECT position, settled_at IS NOT NULL FROM entries LEFT JOIN outcomes USING (position)
WHERE source_id = :source_id AND sequence = :sequence AND nonce = :nonce
"""
_INSERT_ENTRY = f"""
INSERT INTO entries ({", ".join(ENTRY_COLUMNS)}) VALUES ({", ".join(f":{name}" for name in ENTRY_COLUMNS)})
"""  # noqa: S608  # constants
_INSERT_OUTCOME = "INSERT INTO outcomes (position, settled_at, row_id, reason) VALUES (?, ?, ?, ?)"
_SEND = "INSERT INTO retries (position, why, checks) VALUES (?, 'salvaged', ?)"
_MAY_BE_SENT = 1  # as the number of checks: the relay asks Redis for the job first
_INSERT_LOSS = "INSERT INTO losses (source_id, first, last, file) VALUES (?, ?, ?, ?)"


@dataclass
class Salvage:
    """Result of a salvage: the number of entries copied into the outbox, and the numbers that were not found.

    `unread` has inclusive ranges by source. Their entries are lost, unless they were settled and deleted before.
    `is_recognized` says whether the file has readable entries or sources.
    """

    file: Path
    entries: int = 0
    is_recognized: bool = False
    unread: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the result as text, for the log and for an operator."""
        lost = "; ".join(f"{source}: {ranges_text(ranges)}" for source, ranges in self.unread.items())
        not_found = f" Sequence numbers that were not found: {lost}." if lost else ""
        return (
            f"salvaged {self.entries} entries from {self.file}.{not_found} Run trading-history audit: numbers that were"
            " not found, or that are lower than the first one found, are lost unless the database has them"
        )


def has_content_of_an_outbox(file: Path) -> bool:
    """Return whether an entry or a source of an outbox is among the first readable records of a damaged file."""
    try:
        return any(
            _entry_of(record.values) or _source_of(record.values)
            for record in islice(readable_records(file), _PROBED_RECORDS)
        )
    except OSError:
        return False


def has_readable_entries(file: Path) -> bool:
    """Return whether an entry is among the first readable records of a damaged file."""
    try:
        return any(_entry_of(record.values) for record in islice(readable_records(file), _PROBED_RECORDS))
    except OSError:
        return False


def salvage_pages(
    file: Path, name: str, transaction: Callable[[], AbstractContextManager[sqlite3.Connection]]
) -> Generator[None, None, Salvage]:
    """Copy the readable entries of the damaged `file`, one page at each step; it may be repeated from the start.

    Losses are stored under `name`. A source that only the file has gets no new events: its last number is not certain.

    Raises:
        OSError: the file cannot be opened.
    """
    found = Salvage(file)
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    sources: dict[str, tuple[str, int]] = {}
    with sqlite_errors(file), closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as outcomes:
        yield from _copy_outcomes(file, outcomes)
        for page in _pages(readable_records(file)):
            entries = [(record.rowid, entry) for record in page if (entry := _entry_of(record.values))]
            for _, entry in entries:
                numbers[entry["source_id"]].add(entry["sequence"])
                sources.setdefault(entry["source_id"], (_name_in(entry["event"]), 0))
            for source_id, source_name, last in filter(None, (_source_of(record.values) for record in page)):
                sources[source_id] = (source_name, max(last, sources.get(source_id, ("", 0))[1]))
            with transaction() as db:
                for source_id in {entry["source_id"] for _, entry in entries}:
                    _continue_source(db, source_id, *sources[source_id])
                for position, entry in entries:
                    outcome = outcomes.execute("SELECT * FROM outcomes WHERE position = ?", (position,)).fetchone()
                    found.entries += _insert(db, entry, outcome)
                insert_missing(db, filter(None, (segment_row_of(record.values) for record in page)))
                db.execute(SKIP_SETTLED)
            yield
    found.is_recognized = bool(sources)
    with transaction() as db:
        db.execute("DELETE FROM losses WHERE file = ?", (name,))
        for source_id, (source_name, last_known) in sources.items():
            have = sorted(numbers[source_id])
            last = max([last_known, *have[-1:]])
            _continue_source(db, source_id, source_name, last)
            if unread := _gaps(have, last)[:_MOST_LOST_RANGES]:
                found.unread[full_source(source_name, source_id)] = unread
                db.executemany(_INSERT_LOSS, [(source_id, first, end, name) for first, end in unread])
    return found


def _continue_source(db: sqlite3.Connection, source_id: str, name: str, last: int) -> None:
    source = {"id": source_id, "name": name, "last_sequence": last, "resends": 0, "current": 0}
    db.execute(CONTINUE_SOURCE, source | {"left_because": "damaged"})


def _copy_outcomes(file: Path, found: sqlite3.Connection) -> Iterator[None]:
    """Copy the readable outcomes of the damaged file into a table of the temporary database `found`, page by page.

    They have the positions of their entries.
    """
    found.execute("CREATE TABLE outcomes (position INTEGER PRIMARY KEY, settled_at REAL, row_id INTEGER, reason TEXT)")
    found.execute("CREATE TABLE retries (position INTEGER PRIMARY KEY)")
    for page in _pages(readable_records(file)):
        rows = [(record.rowid, *record.values[1:]) for record in page if _is_outcome(record.values)]
        retries = [(record.rowid,) for record in page if _is_retry(record.values)]
        found.execute("BEGIN")
        found.executemany("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?)", rows)
        found.executemany("INSERT OR IGNORE INTO retries VALUES (?)", retries)
        found.execute("COMMIT")
        yield
    found.execute("DELETE FROM outcomes WHERE position IN (SELECT position FROM retries)")


def _insert(db: sqlite3.Connection, entry: Mapping[str, Any], outcome: Sequence[Any] | None) -> bool:
    """Insert the entry, or send it again if only the outbox has its outcome. Return whether anything was changed."""
    own = db.execute(_FIND, entry).fetchone()
    if own is None:
        position = db.execute(_INSERT_ENTRY, entry).lastrowid
        if outcome is None:
            db.execute(_SEND, (position, _MAY_BE_SENT))
        else:
            db.execute(_INSERT_OUTCOME, (position, *outcome[1:]))
        return True
    position, is_settled = own
    if not is_settled or outcome is not None:
        return False
    db.execute("DELETE FROM outcomes WHERE position = ?", (position,))
    db.execute(_SEND, (position, 0))
    return True


def _pages(records: Iterable[Record]) -> Iterator[list[Record]]:
    page: list[Record] = []
    for record in records:
        page.append(record)
        if len(page) == _INSERT_PAGE:
            yield page
            page = []
    yield page


def _entry_of(values: Sequence[Any]) -> dict[str, Any] | None:
    """Return the columns of an entry by name, or None if the record is not an entry."""
    if len(values) != len(ENTRY_COLUMNS) + 1:
        return None
    row = dict(zip(ENTRY_COLUMNS, values[1:], strict=True))
    texts = all(isinstance(row[name], str) for name in ("source_id", "nonce", "event_id", "type", "summary", "event"))
    numbers = all(isinstance(row[name], int) for name in ("sequence", "recorder"))
    if not texts or not numbers or not _SOURCE_ID.fullmatch(row["source_id"]):
        return None
    return row if _is_time(row["recorded_at"]) and _is_intact(row) else None


def _is_outcome(values: Sequence[Any]) -> bool:
    if len(values) != _STATE_COLUMNS or values[0] is not None or not _is_time(values[1]):
        return False
    _, _, row_id, reason = values
    return isinstance(row_id, int) if reason is None else row_id is None and isinstance(reason, str)


def _is_retry(values: Sequence[Any]) -> bool:
    if len(values) != _STATE_COLUMNS or values[0] is not None:
        return False
    _, why, checks, check_at = values
    return isinstance(why, str) and isinstance(checks, int) and isinstance(check_at, int | float | None)


def _is_time(value: Any) -> bool:
    """Return whether SQLite can store the value as a time: it would store NaN as NULL."""
    return isinstance(value, int | float) and math.isfinite(value)


def _is_intact(row: Mapping[str, Any]) -> bool:
    """Return whether the event matches the other columns: a long event may contain parts of another one."""
    try:
        event = json.loads(row["event"])
        return (event["id"], int(event["sequence"])) == (row["event_id"], row["sequence"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _source_of(values: Sequence[Any]) -> tuple[str, str, int] | None:
    """Return id, name and last number of a source, or None if the record is not a source."""
    if len(values) != _SOURCE_COLUMNS:
        return None
    source_id, name, last = values[:3]
    if not isinstance(source_id, str) or not isinstance(name, str) or not isinstance(last, int):
        return None
    return (source_id, name, last) if _SOURCE_ID.fullmatch(source_id) else None


def _name_in(event: str) -> str:
    """Return the source's name from the event of an intact entry, for a file whose sources cannot be read."""
    return str(json.loads(event).get("source", "")).rpartition("/")[0] or "unknown"


def _gaps(numbers: Sequence[int], last: int) -> list[tuple[int, int]]:
    """Return the gaps between the first of `numbers` and `last`; lower entries were settled and deleted."""
    gaps, before = [], numbers[0] if numbers else last
    for number in [*numbers, last + 1]:
        if number > before + 1:
            gaps.append((before + 1, number - 1))
        before = max(before, number)
    return gaps


def ranges_text(ranges: Sequence[tuple[int, int]]) -> str:
    """Return ranges as text, such as `2-3, 6`."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
