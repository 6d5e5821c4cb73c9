"""Reads the entries out of a damaged outbox file and copies them into the outbox.

Entries keep their source, number and nonce, and so their job id: if Redis or the database already has such an entry, it
recognizes the same delivery. If the outbox already has an entry, the entry is left unchanged, with one exception: a
settled entry that is unsettled in the damaged file is sent again.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from producers.entries import full_source
from producers.outbox_carry_over import CONTINUE_SOURCE, ENTRY_COLUMNS
from producers.sqlite_salvage import readable_records

# The columns of a file of the first releases, in order.
_COLUMNS_BEFORE = tuple(name for name in ENTRY_COLUMNS if name not in ("nonce", "recorder"))
_SOURCE_COLUMNS = (3, 4, 6, 7)  # number of columns of `sources` in each release; the first three are the same
_LEAST_CERTAIN_COLUMNS = 6  # a shorter row may belong to any program
_STATES = {"pending": "pending", "sent": "sent", "stored": "stored", "confirmed": "stored", "rejected": "rejected"}
_SOURCE_ID = re.compile("[0-9a-f]{32}")
_MOST_LOST_RANGES = 1000
_INSERT_PAGE = 500
_PROBED_RECORDS = 5000

# A freed page may contain an old version of a row. An entry that is sent once too often is only a duplicate.
_INSERT_SALVAGED = f"""
INSERT INTO entries ({", ".join(ENTRY_COLUMNS)}) VALUES ({", ".join(f":{name}" for name in ENTRY_COLUMNS)})
ON CONFLICT (source_id, sequence, nonce) DO UPDATE
    SET state = 'pending', checks = 0, check_at = NULL, settled_at = NULL, row_id = NULL, reason = NULL
    WHERE entries.state IN ('stored', 'rejected') AND excluded.state IN ('pending', 'sent')
"""  # noqa: S608  # constants
_INSERT_LOSS = "INSERT INTO losses (source_id, first, last, file) VALUES (?, ?, ?, ?)"


@dataclass
class Salvage:
    """Result of a salvage: the number of entries copied into the outbox, and the numbers that were not found.

    `unread` has inclusive ranges by source. Their entries are lost, unless they were settled and deleted before.
    """

    file: Path
    entries: int = 0
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
            _entry_of(record.values) or (len(record.values) >= _LEAST_CERTAIN_COLUMNS and _source_of(record.values))
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
    for page in _pages(readable_records(file)):
        entries = [entry for values in page if (entry := _entry_of(values))]
        for entry in entries:
            numbers[entry["source_id"]].add(entry["sequence"])
            sources.setdefault(entry["source_id"], (_name_in(entry["event"]), 0))
        for source_id, source_name, last in filter(None, map(_source_of, page)):
            sources[source_id] = (source_name, max(last, sources.get(source_id, ("", 0))[1]))
        with transaction() as db:
            found.entries += db.executemany(_INSERT_SALVAGED, entries).rowcount if entries else 0
        yield
    with transaction() as db:
        db.execute("DELETE FROM losses WHERE file = ?", (name,))
        for source_id, (source_name, last_known) in sources.items():
            have = sorted(numbers[source_id])
            last = max(last_known, *have[-1:], 0)
            source = {"id": source_id, "name": source_name, "last_sequence": last, "resends": 0, "current": 0}
            db.execute(CONTINUE_SOURCE, source | {"left_because": "damaged"})
            if unread := _gaps(have, last)[:_MOST_LOST_RANGES]:
                found.unread[full_source(source_name, source_id)] = unread
                db.executemany(_INSERT_LOSS, [(source_id, first, end, name) for first, end in unread])
    return found


def _pages(records: Iterable[Any]) -> Iterator[list[Sequence[Any]]]:
    page: list[Sequence[Any]] = []
    for record in records:
        page.append(record.values)
        if len(page) == _INSERT_PAGE:
            yield page
            page = []
    yield page


def _entry_of(values: Sequence[Any]) -> dict[str, Any] | None:
    """Return the columns of an entry by name, or None if the record is not an entry."""
    if len(values) == len(ENTRY_COLUMNS) + 1:
        row = dict(zip(ENTRY_COLUMNS, values[1:], strict=True))
    elif len(values) == len(_COLUMNS_BEFORE) + 1:
        row = {"nonce": "", "recorder": 0} | dict(zip(_COLUMNS_BEFORE, values[1:], strict=True))
    else:
        return None
    texts = all(isinstance(row[name], str) for name in ("source_id", "nonce", "event_id", "type", "summary", "event"))
    numbers = all(isinstance(row[name], int) for name in ("sequence", "recorder", "checks"))
    if not texts or not numbers or not _SOURCE_ID.fullmatch(row["source_id"]) or row["state"] not in _STATES:
        return None
    if not isinstance(row["recorded_at"], int | float) or not _is_intact(row):
        return None
    return row | {"state": _STATES[row["state"]]}


def _is_intact(row: Mapping[str, Any]) -> bool:
    """Return whether the event matches the other columns: a long event may contain parts of another one."""
    try:
        event = json.loads(row["event"])
        return (event["id"], int(event["sequence"])) == (row["event_id"], row["sequence"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _source_of(values: Sequence[Any]) -> tuple[str, str, int] | None:
    """Return id, name and last number of a source, or None if the record is not a source."""
    if len(values) not in _SOURCE_COLUMNS:
        return None
    source_id, name, last = values[:3]
    if not isinstance(source_id, str) or not isinstance(name, str) or not isinstance(last, int):
        return None
    return (source_id, name, last) if _SOURCE_ID.fullmatch(source_id) else None


def _name_in(event: str) -> str:
    """Return the source's name from an event, for a file whose sources cannot be read."""
    try:
        return str(json.loads(event)["source"]).rpartition("/")[0] or "unknown"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unknown"


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
