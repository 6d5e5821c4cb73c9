"""Compare an event with its row, field by field, and keep a set of row ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from producers.events import Event, PortfolioSnapshot, SignalArchive
from producers.fields import readable

_SHOWN_CHARACTERS = 80

_SNAPSHOT_ROWS = text("""
    SELECT id, portfolio_id, snapshot_date, "timestamp", balance, total_invested, total_profit_loss, total_value,
        open_positions, trade_count
    FROM portfolio_history WHERE id = ANY (:row_ids)
""")
_ARCHIVE_ROWS = text("""
    SELECT id, portfolio_id, archived_at, archive_month, signals_count, CAST(signals_data AS text) AS signals
    FROM signal_archives WHERE id = ANY (:row_ids)
""")


class FieldDifference(NamedTuple):
    """A field whose values differ. Both values are text for a reader; a long one is cut."""

    field: str
    in_file: str
    in_table: str


def field_differences(db: Connection, differing: Sequence[tuple[Event, int]]) -> list[list[FieldDifference]]:
    """Return the differing fields of each (event, row id), in the same order.

    All events must be of one kind, with Decimals in signals, not floats. An event without a row has no differences.
    """
    if not differing:
        return []
    archives = isinstance(differing[0][0].data, SignalArchive)
    row_ids = [row_id for _, row_id in differing]
    rows = {row.id: row for row in db.execute(_ARCHIVE_ROWS if archives else _SNAPSHOT_ROWS, {"row_ids": row_ids})}
    return [list(_between(event, rows[row_id])) if row_id in rows else [] for event, row_id in differing]


def _between(event: Event, row: Any) -> Iterator[FieldDifference]:
    data = event.data
    if isinstance(data, SignalArchive):
        for field in ("portfolio_id", "archived_at", "archive_month", "signals_count"):
            if getattr(data, field) != getattr(row, field):
                yield _difference(field, getattr(data, field), getattr(row, field))
        stored = json.loads(row.signals, parse_float=Decimal)
        yield from _within("signals", data.signals, stored)
        return
    assert isinstance(data, PortfolioSnapshot)
    for field in list(row._mapping)[1:]:  # after the id
        given, stored = getattr(data, field), getattr(row, field)
        if given != stored:
            yield _difference(field, given, stored)


def _within(path: str, given: Any, stored: Any) -> Iterator[FieldDifference]:
    """Yield the innermost values that differ."""
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
    """Compact set of row ids: a bit array per 65,536 consecutive ids, so that a million ids take about 130 kB."""

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
