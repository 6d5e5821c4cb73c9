"""What the tables hold of given events: nothing, the same, or something else, and in which fields.

Shared by the import, which sends what is missing, and by verify, which says what differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from consumers.inserts import Found, find_events
from producers.events import Event, PortfolioSnapshot, SignalArchive
from producers.fields import readable

_SHOWN_CHARACTERS = 80

# Numbers of those that have a row or an outcome; the others, nearly all in a first import, cost no comparison.
_KNOWN = """
    SELECT given.number, history.id IS NOT NULL, outcomes.outcome, outcomes.reason
    FROM unnest(CAST(:event_ids AS uuid[]), CAST(:job_ids AS text[]))
        WITH ORDINALITY AS given (event_id, job_id, number)
    LEFT JOIN {table} AS history ON history.event_id = given.event_id
    LEFT JOIN event_outcomes AS outcomes ON outcomes.job_id = given.job_id
    WHERE history.id IS NOT NULL OR outcomes.job_id IS NOT NULL
"""
_KNOWN_SNAPSHOTS = text(_KNOWN.format(table="portfolio_history"))
_KNOWN_ARCHIVES = text(_KNOWN.format(table="signal_archives"))

_SNAPSHOT_ROWS = text("""
    SELECT id, snapshot_date, "timestamp", balance, total_invested, total_profit_loss, total_value, open_positions,
        trade_count
    FROM portfolio_history WHERE id = ANY (:row_ids)
""")
_ARCHIVE_ROWS = text("""
    SELECT id, archived_at, CAST(signals_data AS text) AS signals FROM signal_archives WHERE id = ANY (:row_ids)
""")


class Standing(NamedTuple):
    """What is known of one delivery: the row with its event's id, and the recorded outcome of its job."""

    found: Found | None
    outcome: str | None
    reason: str | None

    def is_own(self, source: str, sequence: int) -> bool:
        """This delivery made the row, and the row is as the delivery would make it now."""
        found = self.found
        return found is not None and found.same and (found.source, found.sequence) == (source, sequence)

    def is_settled(self, source: str, sequence: int) -> bool:
        """Its own row; or another's of the same fact, if that was recorded: else an audit would miss the number."""
        absorbed = self.found is not None and self.found.same and self.outcome == "absorbed"
        return absorbed or self.is_own(source, sequence)

    def refusal(self) -> str | None:
        """The reason, if it would only be refused again: the other content still stands, or a person gave it up."""
        conflict = self.found is not None and not self.found.same
        if self.outcome == "discarded" or (self.outcome == "rejected" and conflict):
            return self.reason
        return None


NOTHING_KNOWN = Standing(None, None, None)


def standings(db: Connection, deliveries: Sequence[tuple[str, Event]]) -> list[Standing]:
    """For each (job id, event), all of one kind, in order."""
    if not deliveries:
        return []
    known = [NOTHING_KNOWN] * len(deliveries)
    archives = isinstance(deliveries[0][1].data, SignalArchive)
    arrays = {
        "event_ids": [str(event.id) for _, event in deliveries],
        "job_ids": [job_id for job_id, _ in deliveries],
    }
    stored = []
    for number, has_row, outcome, reason in db.execute(_KNOWN_ARCHIVES if archives else _KNOWN_SNAPSHOTS, arrays):
        known[number - 1] = Standing(None, outcome, reason)
        if has_row:
            stored.append(number - 1)
    for n, found in zip(stored, find_events(db, [deliveries[n][1] for n in stored]), strict=True):
        known[n] = known[n]._replace(found=found)
    return known


class FieldDifference(NamedTuple):
    """One field with another value, both as text for a person, long ones cut."""

    field: str
    in_file: str
    in_table: str


def field_differences(db: Connection, differing: Sequence[tuple[Event, int]]) -> list[list[FieldDifference]]:
    """For each (event, row id), all of one kind, what is different; empty for a row that is gone since."""
    if not differing:
        return []
    archives = isinstance(differing[0][0].data, SignalArchive)
    row_ids = [row_id for _, row_id in differing]
    rows = {row.id: row for row in db.execute(_ARCHIVE_ROWS if archives else _SNAPSHOT_ROWS, {"row_ids": row_ids})}
    return [list(_between(event, rows[row_id])) if row_id in rows else [] for event, row_id in differing]


def _between(event: Event, row: Any) -> Iterator[FieldDifference]:
    data = event.data
    if isinstance(data, SignalArchive):
        if data.archived_at != row.archived_at:
            yield _difference("archived_at", data.archived_at, row.archived_at)
        stored = json.loads(row.signals, parse_float=Decimal)
        yield from _within("signals", _as_stored(data.signals), stored)
        return
    assert isinstance(data, PortfolioSnapshot)
    for field in row._mapping.keys() - {"id"}:
        given, stored = getattr(data, field), getattr(row, field)
        if given != stored:
            yield _difference(field, given, stored)


def _as_stored(value: Any) -> Any:
    """Floats as the decimals that JSON writes for them."""
    if isinstance(value, float):
        return Decimal(repr(value))
    if isinstance(value, dict):
        return {key: _as_stored(item) for key, item in value.items()}
    return [_as_stored(item) for item in value] if isinstance(value, list) else value


def _within(path: str, given: Any, stored: Any) -> Iterator[FieldDifference]:
    """The innermost values that differ."""
    if isinstance(given, dict) and isinstance(stored, dict):
        for key in sorted(given.keys() | stored.keys()):
            if key not in given or key not in stored:
                yield _difference(f"{path}.{key}", given.get(key, "absent"), stored.get(key, "absent"))
            else:
                yield from _within(f"{path}.{key}", given[key], stored[key])
    elif isinstance(given, list) and isinstance(stored, list) and len(given) == len(stored):
        for index, (mine, theirs) in enumerate(zip(given, stored, strict=True)):
            yield from _within(f"{path}.{index}", mine, theirs)
    elif isinstance(given, list) and isinstance(stored, list):
        yield _difference(path, f"{len(given)} elements", f"{len(stored)} elements")
    elif given != stored or isinstance(given, bool) != isinstance(stored, bool):
        yield _difference(path, given, stored)


def _difference(field: str, given: Any, stored: Any) -> FieldDifference:
    given, stored = (
        f"{one:f}" if isinstance(one, Decimal) and one.is_finite() else str(one) for one in (given, stored)
    )
    cut = _SHOWN_CHARACTERS
    return FieldDifference(readable(field, 2 * cut), readable(given, cut), readable(stored, cut))


class RowIds:
    """A set of row ids in a few bits each: ids lie close together, so a million take some 130 kB."""

    _PAGE_BITS = 2**16

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def add(self, row_id: int) -> None:
        page, bit = divmod(row_id, self._PAGE_BITS)
        bits = self._pages.get(page)
        if bits is None:
            bits = self._pages[page] = bytearray(self._PAGE_BITS // 8)
        bits[bit >> 3] |= 1 << (bit & 7)

    def __contains__(self, row_id: int) -> bool:
        page, bit = divmod(row_id, self._PAGE_BITS)
        bits = self._pages.get(page)
        return bits is not None and bool(bits[bit >> 3] & (1 << (bit & 7)))
