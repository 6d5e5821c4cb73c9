"""Compare old history with the tables, field by field and in both directions. It only reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import Connection, TextClause, text

from consumers.db.engine import long_read
from consumers.db.formula_changes import PortfolioFormulas, compare_formulas
from consumers.db.inserts import find_events, find_withdrawn
from consumers.legacy.comparison import FieldDifference, RowIds, field_differences
from consumers.legacy.json_arrays import Entry
from consumers.legacy.old_history import Kind, OldHistory
from producers.errors import InvalidEvent

_PAGE_ROWS = 20_000
_FORMULA_SECONDS = 10.0

# Rows for which the old history should have an entry: rows of its sources, and rows of its portfolios in its period.
_EXPECTED = """
    SELECT id, source, sequence, portfolio_id, {instant} FROM {table}
    WHERE id > :after AND (source = ANY (:sources) OR EXISTS (
        SELECT FROM unnest(CAST(:portfolios AS bigint[]), CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]))
            AS span (portfolio, first, last)
        WHERE {table}.portfolio_id IS NOT DISTINCT FROM span.portfolio
            AND {instant} BETWEEN span.first AND span.last))
    ORDER BY id LIMIT :limit
"""
_ROWS: dict[Kind, TextClause] = {
    "snapshot": text(_EXPECTED.format(table="portfolio_history", instant='"timestamp"')),
    "archive": text(_EXPECTED.format(table="signal_archives", instant="archived_at")),
}
_TABLES: dict[Kind, str] = {"snapshot": "portfolio_history", "archive": "signal_archives"}

DifferenceKind = Literal["missing", "differs", "withdrawn", "unusable", "damaged", "unexpected"]


@dataclass(frozen=True)
class Difference:
    """One difference between the old history and the tables.

    missing: the entry has no row. differs: the row has other values, which `fields` lists. withdrawn: the row of the
    entry was withdrawn; another one with corrected values may exist. unusable: the entry has no valid event. damaged:
    the rest of the file cannot be read. unexpected: the row has no entry. `reason` is a message.
    """

    what: DifferenceKind
    file: str | None
    index: int | None
    table: str | None
    row_id: int | None
    reason: str
    fields: list[FieldDifference] = field(default_factory=list)


@dataclass
class Compared:
    """Number of entries of one import source that were read, and that equal their rows."""

    name: str
    read: int = 0
    equal: int = 0
    differences: int = 0


@dataclass
class _Side:
    """Rows, sources and periods found in the old history of one kind, for the comparison from the tables."""

    rows: RowIds = field(default_factory=RowIds)
    sources: list[str] = field(default_factory=list)
    spans: dict[int | None, tuple[datetime, datetime]] = field(default_factory=dict)


class Verification:
    """Compares histories with the tables. `compared` and `unexpected` grow while `differences` is iterated."""

    def __init__(self, histories: Iterable[OldHistory]) -> None:
        self._histories = list(histories)
        self._sides: dict[Kind, _Side] = {}
        self.compared: list[Compared] = []
        self.unexpected = 0

    def differences(self, advance: Callable[[], None] = lambda: None) -> Iterator[Difference]:
        """Yield each difference when it is found: first one import source after the other, then rows without an entry.

        `advance` is called after each chunk.

        Raises:
            StoreUnavailable: the database cannot be read now.
        """
        for history in self._histories:
            yield from self._forwards(history, advance)
        for kind, side in self._sides.items():
            for difference in _backwards(kind, side):
                self.unexpected += 1
                yield difference

    def formula_changes(self) -> tuple[list[PortfolioFormulas], int]:
        """Return the portfolios whose recorded rows have another formula of total_value than imported ones.

        The number is that of portfolios that were not compared within 10 s. Call it after `differences`. A change is no
        difference between the old history and the tables.

        Raises:
            StoreUnavailable: the database cannot be read now.
        """
        spans = self._sides["snapshot"].spans if "snapshot" in self._sides else ()
        with long_read() as db:
            compared, left_out = compare_formulas(db, spans, _FORMULA_SECONDS)
        return [one for one in compared if one.changed], left_out

    def _forwards(self, history: OldHistory, advance: Callable[[], None]) -> Iterator[Difference]:
        compared = Compared(history.import_source.name)
        self.compared.append(compared)
        side = self._sides.setdefault(history.import_source.kind, _Side())
        for chunk in history.chunks():
            with long_read() as db:
                found = list(_compare(db, history, chunk, side))
            compared.read += len(chunk)
            compared.equal += len(chunk) - len(found)
            compared.differences += len(found)
            yield from found
            advance()
        if history.source:
            side.sources.append(history.source)
        if history.statistics.damage is not None:
            compared.differences += 1
            yield Difference("damaged", compared.name, compared.read, None, None, history.statistics.damage)


def _compare(db: Connection, history: OldHistory, chunk: list[Entry], side: _Side) -> Iterator[Difference]:
    name, table = history.import_source.name, _TABLES[history.import_source.kind]
    events = []
    for entry in chunk:
        try:
            event = history.event(entry)
        except InvalidEvent as error:
            yield Difference("unusable", name, entry.index, None, None, str(error))
        else:
            events.append((entry.index, event))
            _widen(side, event.data.portfolio_id, event.data.instant.astimezone(UTC))  # type: ignore[attr-defined]  # both kinds have them
    differing = []
    found_rows = find_events(db, [event for _, event in events])
    without = [event for (_, event), found in zip(events, found_rows, strict=True) if found is None or not found.same]
    withdrawn = {error.event_id: error for error in find_withdrawn(db, without) if error is not None}
    for (index, event), found in zip(events, found_rows, strict=True):
        if event.id in withdrawn and (found is None or not found.same):
            if found is not None:
                side.rows.add(found.row_id)
            row_id = None if found is None else found.row_id
            yield Difference("withdrawn", name, index, table, row_id, str(withdrawn[event.id]))
            continue
        if found is None:
            yield Difference("missing", name, index, table, None, f"has no row in {table}: {event.data.summary}")
            continue
        side.rows.add(found.row_id)
        if not (found.same and found.intact):
            differing.append((index, event, found.row_id))
    details = field_differences(db, [(event, row_id) for _, event, row_id in differing])
    for (index, _, row_id), fields in zip(differing, details, strict=True):
        reason = "; ".join(f"{one.field}: {one.in_file} in the file, {one.in_table} in the table" for one in fields)
        yield Difference("differs", name, index, table, row_id, reason or f"row {row_id} no longer exists", fields)


def _widen(side: _Side, portfolio_id: int | None, instant: datetime) -> None:
    first, last = side.spans.get(portfolio_id, (instant, instant))
    side.spans[portfolio_id] = (min(first, instant), max(last, instant))


def _backwards(kind: Kind, side: _Side) -> Iterator[Difference]:
    spans = list(side.spans.items())
    wanted = {
        "sources": side.sources,
        "portfolios": [portfolio for portfolio, _ in spans],
        "firsts": [first for _, (first, _) in spans],
        "lasts": [last for _, (_, last) in spans],
        "limit": _PAGE_ROWS,
    }
    after = -(2**63)
    while True:
        with long_read() as db:
            rows = db.execute(_ROWS[kind], wanted | {"after": after}).all()
        for row_id, source, sequence, portfolio_id, instant in rows:
            if row_id not in side.rows:
                whose = "" if portfolio_id is None else f" of portfolio {portfolio_id}"
                number = "" if sequence is None else f" {sequence}"
                at = f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S.%fZ}"
                reason = f"{at}{whose}, recorded by {source}{number}, has no entry"
                yield Difference("unexpected", None, None, _TABLES[kind], row_id, reason)
        if len(rows) < _PAGE_ROWS:
            return
        after = rows[-1][0]
