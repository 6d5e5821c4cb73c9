"""Idempotent inserts, any number of events with one statement a table.

The unique key on event_id decides what is new. What was there already is compared by value, so that the same fact
is a duplicate and another content under the same id is a conflict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, NamedTuple
from uuid import UUID

import simplejson
from sqlalchemy import Connection, TextClause, text

from consumers.db.engine import get_db, refused_values
from consumers.db.schema import check_database
from consumers.errors import EventConflict, StoreUnavailable
from producers.events import ARCHIVE_TYPE, SNAPSHOT_TYPE, Event, PortfolioSnapshot, SignalArchive

_TRIES = 3


class Stored(NamedTuple):
    """Where a fact is: its row, whether this insert made it, and the delivery that did."""

    row_id: int
    created: bool
    source: str
    sequence: int | None


@dataclass(frozen=True)
class _Table:
    """`columns` with their types, in the order of a row's values; the first three say which event it is.

    `content` decides whether two events are the same; `derived` follows from it, unless somebody has changed a row.
    """

    name: str
    columns: tuple[tuple[str, str], ...]
    content: tuple[str, ...]
    derived: tuple[str, ...]

    def _given(self) -> str:
        return ", ".join(f"CAST(:{name} AS {type_}[])" for name, type_ in self.columns)

    def _names(self) -> str:
        return ", ".join(f'"{name}"' for name, _ in self.columns)

    def insert(self) -> TextClause:
        # Numbered as they came, inserted in the order of their event ids: two batches in opposite order would wait for
        # each other. The sequence is looked up once, not for each row.
        return text(f"""
            INSERT INTO {self.name} (id, {self._names()})
            SELECT * FROM (
                SELECT nextval((SELECT CAST(pg_get_serial_sequence('{self.name}', 'id') AS regclass))), given.*
                FROM unnest({self._given()}) AS given ({self._names()})) AS numbered
            ORDER BY event_id
            ON CONFLICT (event_id) DO NOTHING
            RETURNING CAST(event_id AS text), id
        """)  # noqa: S608  # from the constants below; values are parameters

    def compare(self) -> TextClause:
        stored, given = (", ".join(f'{side}."{name}"' for name in self.content) for side in ("stored", "given"))
        intact = " AND ".join(f'stored."{name}" IS NOT DISTINCT FROM given."{name}"' for name in self.derived)
        return text(f"""
            SELECT given.number, stored.id, stored.source, stored.sequence, ({stored}) = ({given}), {intact}
            FROM unnest({self._given()}) WITH ORDINALITY AS given ({self._names()}, number)
            JOIN {self.name} AS stored ON stored.event_id = given.event_id
        """)  # noqa: S608  # from the constants below; values are parameters


_EVENT_COLUMNS = (("event_id", "uuid"), ("source", "text"), ("sequence", "bigint"))
_SNAPSHOTS = _Table(
    "portfolio_history",
    (
        *_EVENT_COLUMNS,
        ("portfolio_id", "bigint"),
        ("snapshot_date", "date"),
        ("timestamp", "timestamptz"),
        ("balance", "numeric"),
        ("total_invested", "numeric"),
        ("total_profit_loss", "numeric"),
        ("total_value", "numeric"),
        ("open_positions", "integer"),
        ("trade_count", "integer"),
    ),
    derived=("portfolio_id",),  # it is part of the id
    content=(
        "snapshot_date",
        "timestamp",
        "balance",
        "total_invested",
        "total_profit_loss",
        "total_value",
        "open_positions",
        "trade_count",
    ),
)
_ARCHIVES = _Table(
    "signal_archives",
    (
        *_EVENT_COLUMNS,
        ("portfolio_id", "bigint"),
        ("archived_at", "timestamptz"),
        ("archive_month", "text"),
        ("signals_count", "integer"),
        ("signals_data", "jsonb"),
    ),
    derived=("portfolio_id", "archive_month", "signals_count"),
    content=("archived_at", "signals_data"),
)
_INSERT = {table.name: table.insert() for table in (_SNAPSHOTS, _ARCHIVES)}
_COMPARE = {table.name: table.compare() for table in (_SNAPSHOTS, _ARCHIVES)}
_OWN_ROW = text("""
    SELECT id FROM portfolio_history
    WHERE source = :source AND sequence = :sequence AND event_id = CAST(:event_id AS uuid)
    UNION ALL SELECT id FROM signal_archives
    WHERE source = :source AND sequence = :sequence AND event_id = CAST(:event_id AS uuid)
""")

Row = tuple[Any, ...]


def insert_events(db: Connection, events: Sequence[Event]) -> list[Stored | EventConflict]:
    """Insert a row for each fact that is not stored yet, in the transaction of `db`; answers in the order of `events`.

    An event whose id is stored with other content is answered with an EventConflict, and changes nothing.

    Raises:
        InvalidEvent: the database refuses the values of at least one of them for good.
        StoreUnavailable: the database is not UTF8, or its tables are older than this program.
    """
    check_database(db)
    answers: list[Stored | EventConflict | None] = [None] * len(events)
    for table, positions in _by_table(events):
        for n, answer in zip(positions, _insert(db, table, [events[n] for n in positions]), strict=True):
            answers[n] = answer
    return answers  # type: ignore[return-value]  # each event is of one of the two


class Found(NamedTuple):
    """The row that has an event's id: which delivery made it, whether its content is the same, what follows intact."""

    row_id: int
    source: str
    sequence: int | None
    same: bool
    intact: bool


def find_events(db: Connection, events: Sequence[Event]) -> list[Found | None]:
    """The row of each event, in the order of `events`; None where there is none."""
    found: list[Found | None] = [None] * len(events)
    for table, positions in _by_table(events):
        rows = [_row(events[n]) for n in positions]
        for number, *facts in db.execute(_COMPARE[table.name], _arrays(table, rows)):
            found[positions[number - 1]] = Found(*facts)
    return found


def find_row(db: Connection, source: str, sequence: int, event_id: UUID) -> int | None:
    """The id of the row that this very delivery has made."""
    row_id: int | None = db.execute(
        _OWN_ROW, {"source": source, "sequence": sequence, "event_id": str(event_id)}
    ).scalar_one_or_none()
    return row_id


def _by_table(events: Sequence[Event]) -> Iterator[tuple[_Table, list[int]]]:
    for table, event_type in ((_SNAPSHOTS, SNAPSHOT_TYPE), (_ARCHIVES, ARCHIVE_TYPE)):
        positions = [n for n, event in enumerate(events) if event.type == event_type]
        if positions:
            yield table, positions


def insert_event(event: Event) -> int:
    """Insert one event in a transaction of its own and return its row's id, the same id when it is stored already.

    Raises:
        EventConflict: its id is stored with other content.
        InvalidEvent: the database refuses its values for good.
        StoreUnavailable: the database cannot take it now.
    """
    with get_db() as db:
        (answer,) = insert_events(db, [event])
    if isinstance(answer, EventConflict):
        raise answer
    return answer.row_id


def _insert(db: Connection, table: _Table, events: Sequence[Event]) -> list[Stored | EventConflict]:
    rows = [_row(event) for event in events]
    answers: dict[int, Stored | EventConflict] = {}
    # A row that was in the way of the insert can be deleted before the look at it: then the insert is due again.
    for _ in range(_TRIES):
        missing = [n for n in range(len(events)) if n not in answers]
        first = {rows[n][0]: n for n in reversed(missing)}  # one row a fact, its first delivery
        chosen = [rows[n] for n in sorted(first.values())]
        with refused_values():
            inserted = db.execute(_INSERT[table.name], _arrays(table, chosen)).all()
        for event_id, row_id in inserted:
            n = first[event_id]
            answers[n] = Stored(row_id, True, events[n].source, events[n].sequence)
        missing = [n for n in missing if n not in answers]
        if missing:
            found = db.execute(_COMPARE[table.name], _arrays(table, [rows[n] for n in missing]))
            for number, row_id, source, sequence, same, _ in found:
                n = missing[number - 1]
                answers[n] = (
                    Stored(row_id, False, source, sequence) if same else EventConflict(events[n].id, table.name, row_id)
                )
        if len(answers) == len(events):
            return [answers[n] for n in range(len(events))]
    raise StoreUnavailable(f"rows of {table.name} come and go, or a trigger drops them", one_statement=True)


def _row(event: Event) -> Row:
    """As text, in the order of the table's columns; None is NULL."""
    # By the type's name, here and above: to ask whether something is another Pydantic model takes it a microsecond.
    content = _archive(event.data) if event.type == ARCHIVE_TYPE else _snapshot(event.data)
    return (str(event.id), _quoted(event.source), event.sequence, event.data.portfolio_id, *content)


# Instants go out in UTC: PostgreSQL reads offsets only up to 15:59, RFC 3339 has them up to 23:59.


def _snapshot(data: PortfolioSnapshot) -> Row:
    return (
        data.snapshot_date,
        data.timestamp.astimezone(UTC),
        data.balance,
        data.total_invested,
        data.total_profit_loss,
        data.total_value,
        data.open_positions,
        data.trade_count,
    )


def _archive(data: SignalArchive) -> Row:
    return (
        data.archived_at.astimezone(UTC),
        data.archive_month,
        data.signals_count,
        _quoted(simplejson.dumps(data.signals, use_decimal=True, allow_nan=False)),
    )


def _arrays(table: _Table, rows: Iterable[Row]) -> dict[str, str]:
    columns = zip(*rows, strict=True)
    return {name: _array(values) for (name, _), values in zip(table.columns, columns, strict=True)}


def _array(values: Iterable[Any]) -> str:
    """A PostgreSQL array literal: one parameter for a whole column, which the server reads in one go.

    Text must come through `_quoted`; numbers, dates, times and UUIDs need no quotes.
    """
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
