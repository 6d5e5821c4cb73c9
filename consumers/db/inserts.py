"""Idempotent inserts, any number of events with one statement a table, by the table of event kinds.

The unique key on event_id decides what is new. What was there already is compared by value, so that the same fact
is a duplicate and another content under the same id is a conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple
from uuid import UUID

import simplejson
from sqlalchemy import Connection, TextClause, text

from consumers.db.engine import get_db, refused_values
from consumers.db.schema import check_database
from consumers.errors import EventConflict, StoreUnavailable
from producers.event_kinds import Column, EventKind
from producers.events import KINDS, Event, Payload

_TRIES = 3


class Stored(NamedTuple):
    """Where a fact is: its row, whether this insert made it, and the delivery that did."""

    row_id: int
    created: bool
    source: str
    sequence: int | None


_EVENT_COLUMNS = (("event_id", "uuid"), ("source", "text"), ("sequence", "bigint"))


@cache
def _insert_statement(kind: EventKind) -> TextClause:
    arrays, names = _arrays_and_names(kind)
    # Numbered as they came, inserted in the order of their event ids: two batches in opposite order would wait for
    # each other. The sequence is looked up once, not for each row.
    return text(f"""
        INSERT INTO {kind.table} (id, {names})
        SELECT * FROM (
            SELECT nextval((SELECT CAST(pg_get_serial_sequence('{kind.table}', 'id') AS regclass))), given.*
            FROM unnest({arrays}) AS given ({names})) AS numbered
        ORDER BY event_id
        ON CONFLICT (event_id) DO NOTHING
        RETURNING CAST(event_id AS text), id
    """)  # noqa: S608  # from the table of event kinds; values are parameters


@cache
def _compare_statement(kind: EventKind) -> TextClause:
    arrays, names = _arrays_and_names(kind)
    content, derived = (
        " AND ".join(
            f'stored."{column.name}" IS NOT DISTINCT FROM given."{column.name}"'
            for column in kind.columns
            if column.derived is derived
        )
        for derived in (False, True)
    )
    return text(f"""
        SELECT given.number, stored.id, stored.source, stored.sequence, {content}, {derived or True}
        FROM unnest({arrays}) WITH ORDINALITY AS given ({names}, number)
        JOIN {kind.table} AS stored ON stored.event_id = given.event_id
    """)  # noqa: S608  # from the table of event kinds; values are parameters


def _arrays_and_names(kind: EventKind) -> tuple[str, str]:
    """The parameters, one array a column, and the names of the columns."""
    columns = (*_EVENT_COLUMNS, *((column.name, column.type) for column in kind.columns))
    return (
        ", ".join(f"CAST(:{name} AS {type_}[])" for name, type_ in columns),
        ", ".join(f'"{name}"' for name, _ in columns),
    )


def insert_events(db: Connection, events: Sequence[Event]) -> list[Stored | EventConflict]:
    """Insert a row for each fact that is not stored yet, in the transaction of `db`; answers in the order of `events`.

    An event whose id is stored with other content is answered with an EventConflict, and changes nothing.

    Raises:
        InvalidEvent: the database refuses the values of at least one of them for good.
        StoreUnavailable: the database is not UTF8, or its tables are older than this program.
    """
    check_database(db)
    answers: list[Stored | EventConflict | None] = [None] * len(events)
    for kind, positions in _by_kind(events):
        for n, answer in zip(positions, _insert(db, kind, [events[n] for n in positions]), strict=True):
            answers[n] = answer
    return answers  # type: ignore[return-value]  # each event is of one of the kinds


class Found(NamedTuple):
    """The row that has an event's id: which delivery made it, whether its content is the same, what follows intact."""

    row_id: int
    source: str
    sequence: int | None
    same: bool
    intact: bool


def find_events(db: Connection, events: Sequence[Event]) -> list[Found | None]:
    """Return the row of each event, in the order of `events`, or None if it has no row."""
    found: list[Found | None] = [None] * len(events)
    for kind, positions in _by_kind(events):
        columns = _texts(kind, [events[n] for n in positions])
        for number, *facts in db.execute(_compare_statement(kind), _arrays(columns)):
            found[positions[number - 1]] = Found(*facts)
    return found


def find_row(db: Connection, source: str, sequence: int, event_id: UUID) -> int | None:
    """The id of the row that this very delivery has made."""
    rows = " UNION ALL ".join(
        f"SELECT id FROM {kind.table} "  # noqa: S608  # constants
        "WHERE source = :source AND sequence = :sequence AND event_id = CAST(:event_id AS uuid)"
        for kind in KINDS.values()
    )
    own = {"source": source, "sequence": sequence, "event_id": str(event_id)}
    row_id: int | None = db.execute(text(rows), own).scalar_one_or_none()
    return row_id


def _by_kind(events: Sequence[Event]) -> Iterator[tuple[EventKind, list[int]]]:
    """The positions of each kind's events, the kinds always in one order: transactions would wait for each other."""
    for event_type, kind in KINDS.items():
        positions = [n for n, event in enumerate(events) if event.type == event_type]
        if positions:
            yield kind, positions


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


def _insert(db: Connection, kind: EventKind, events: Sequence[Event]) -> list[Stored | EventConflict]:
    columns = _texts(kind, events)
    event_ids = columns["event_id"]
    answers: dict[int, Stored | EventConflict] = {}
    # A row that conflicts with the insert can be deleted before it is compared: then the insert is repeated.
    for _ in range(_TRIES):
        missing = [n for n in range(len(events)) if n not in answers]
        first = {event_ids[n]: n for n in reversed(missing)}  # one row a fact, its first delivery
        with refused_values():
            inserted = db.execute(_insert_statement(kind), _arrays(columns, sorted(first.values()))).all()
        for event_id, row_id in inserted:
            n = first[event_id]
            answers[n] = Stored(row_id, True, events[n].source, events[n].sequence)
        missing = [n for n in missing if n not in answers]
        if missing:
            found = db.execute(_compare_statement(kind), _arrays(columns, missing))
            for number, row_id, source, sequence, same, _ in found:
                n = missing[number - 1]
                answers[n] = (
                    Stored(row_id, False, source, sequence) if same else EventConflict(events[n].id, kind.table, row_id)
                )
        if len(answers) == len(events):
            return [answers[n] for n in range(len(events))]
    raise StoreUnavailable(
        f"cannot insert into {kind.table}: after {_TRIES} tries rows were neither inserted nor found"
        " (concurrent deletes, or a trigger that drops rows)",
        one_statement=True,
    )


def _texts(kind: EventKind, events: Sequence[Event]) -> dict[str, list[str]]:
    """Column by column the values of the events, as elements of a PostgreSQL array literal."""
    payloads = [event.data for event in events]
    return {
        "event_id": [str(event.id) for event in events],
        "source": [_quoted(event.source) for event in events],
        "sequence": ["NULL" if event.sequence is None else str(event.sequence) for event in events],
        **{column.name: _column_texts(column, payloads) for column in kind.columns},
    }


def _column_texts(column: Column, payloads: Iterable[Payload]) -> list[str]:
    written, value_of = _WRITTEN.get(column.type, str), attrgetter(column.attribute or column.name)
    return ["NULL" if value is None else written(value) for value in map(value_of, payloads)]


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


# How values of these types are written; numbers, dates and UUIDs as Python prints them.
_WRITTEN: dict[str, Callable[[Any], str]] = {
    "jsonb": lambda value: _quoted(simplejson.dumps(value, use_decimal=True, allow_nan=False)),
    "text": _quoted,
    # In UTC: PostgreSQL reads offsets only up to 15:59, RFC 3339 has them up to 23:59.
    "timestamptz": lambda value: str(value.astimezone(UTC)),
}


def _arrays(columns: Mapping[str, list[str]], chosen: Sequence[int] | None = None) -> dict[str, str]:
    """One parameter for each column, which the server reads in one go; of the chosen events, or of all."""
    return {
        name: "{" + ",".join(texts if chosen is None else [texts[n] for n in chosen]) + "}"
        for name, texts in columns.items()
    }
