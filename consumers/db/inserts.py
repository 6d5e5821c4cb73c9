"""Idempotent inserts of any number of events, with one statement per kind of event.

The unique key on event_id decides which events are new. An event that is already stored is compared with its row by
value: equal content is a duplicate, other content is a conflict. Content that was withdrawn under the event's id is not
inserted: see `consumers.db.withdrawals`.
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

from consumers.db.engine import get_db, translated_value_errors
from consumers.db.schema import check_database
from consumers.db.withdrawals import same_content, withdrawn_by
from consumers.errors import EventConflict, EventWithdrawn, StoreUnavailable
from producers.event_kinds import Column, EventKind
from producers.events import KINDS, Event, Payload

_TRIES = 3
# PostgreSQL closes the session if the transaction of an insert is idle for this long. The process is frozen then, and
# its open insert would block the same event from other workers. Shorter than a lease: when the jobs are requeued, it
# has ended.
IDLE_SECONDS = 10.0


class Stored(NamedTuple):
    """Row of a stored event.

    `created` says whether this insert made it; `source` and `sequence` name the delivery that did.
    """

    row_id: int
    created: bool
    source: str
    sequence: int | None


Answer = Stored | EventConflict | EventWithdrawn

_EVENT_COLUMNS = (("event_id", "uuid"), ("source", "text"), ("sequence", "bigint"))


@cache
def _insert_statement(kind: EventKind) -> TextClause:
    arrays, names = _arrays_and_names(kind)
    # Row ids follow the order of the events: they are taken before PostgreSQL looks for withdrawals, in any order. The
    # rows are inserted in the order of their event ids, because two batches in opposite order could deadlock. The
    # innermost query looks up the table's sequence once, not for each row.
    # The condition with ANY is redundant: it lets PostgreSQL use the index if there are many withdrawals.
    # Both statements are one round trip.
    return text(f"""
        SET LOCAL idle_in_transaction_session_timeout = {round(1000 * IDLE_SECONDS)};
        INSERT INTO {kind.table} (id, {names})
        SELECT given.* FROM (
            SELECT nextval((SELECT CAST(pg_get_serial_sequence('{kind.table}', 'id') AS regclass))), numbered.*
            FROM unnest({arrays}) AS numbered ({names})) AS given
        WHERE NOT EXISTS (
            SELECT FROM withdrawals
            WHERE withdrawals.event_id = ANY (CAST(:event_id AS uuid[])) AND {same_content(kind)})
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


@cache
def _withdrawn_statement(kind: EventKind) -> TextClause:
    arrays, names = _arrays_and_names(kind)
    return text(f"""
        SELECT given.number, withdrawals.actor, withdrawals.withdrawn_at, withdrawals.reason,
            coalesce((withdrawals.source, withdrawals.sequence) = (given.source, given.sequence), false)
        FROM unnest({arrays}) WITH ORDINALITY AS given ({names}, number)
        JOIN withdrawals ON {same_content(kind)}
    """)  # noqa: S608  # from the table of event kinds; values are parameters


def _arrays_and_names(kind: EventKind) -> tuple[str, str]:
    """Return the parameters, one array per column, and the names of the columns."""
    columns = (*_EVENT_COLUMNS, *((column.name, column.type) for column in kind.columns))
    return (
        ", ".join(f"CAST(:{name} AS {type_}[])" for name, type_ in columns),
        ", ".join(f'"{name}"' for name, _ in columns),
    )


def insert_events(db: Connection, events: Sequence[Event]) -> list[Answer]:
    """Insert a row for each event that is not stored yet, in the transaction of `db`.

    Returns:
        One item per event, in the order of `events`. An event whose id is stored with other content gives an
        EventConflict, and one whose content was withdrawn an EventWithdrawn; both change nothing.

    Raises:
        InvalidEvent: at least one event has values that the table cannot store.
        StoreUnavailable: the database is not UTF8, or its tables are older than this program.
    """
    check_database(db)
    answers: list[Answer | None] = [None] * len(events)
    for kind, positions in _by_kind(events):
        for n, answer in zip(positions, _insert(db, kind, [events[n] for n in positions]), strict=True):
            answers[n] = answer
    return answers  # type: ignore[return-value]  # each event has one of the kinds


class Found(NamedTuple):
    """Row with an event's id, and the delivery that made it.

    `same` says whether its content equals the event's, `intact` whether its derived columns have the right values.
    """

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


def find_withdrawn(db: Connection, events: Sequence[Event]) -> list[EventWithdrawn | None]:
    """Return the withdrawal of each event with the same id and content, in the order of `events`, or None."""
    found: list[EventWithdrawn | None] = [None] * len(events)
    for kind, positions in _by_kind(events):
        columns = _texts(kind, [events[n] for n in positions])
        for number, actor, at, reason, own in db.execute(_withdrawn_statement(kind), _arrays(columns)):
            n = positions[number - 1]
            found[n] = EventWithdrawn(events[n].id, withdrawn_by(actor, at, reason), own=own)
    return found


_OWN = "WHERE source = :source AND sequence = :sequence AND event_id = CAST(:event_id AS uuid)"


def find_row(db: Connection, source: str, sequence: int, event_id: UUID) -> int | EventWithdrawn | None:
    """Return the id of the row that this delivery made, its withdrawal, or None."""
    rows = " UNION ALL ".join(f"SELECT id FROM {kind.table} {_OWN}" for kind in KINDS.values())  # noqa: S608  # constants
    own = {"source": source, "sequence": sequence, "event_id": str(event_id)}
    row_id: int | None = db.execute(text(rows), own).scalar_one_or_none()
    if row_id is not None:
        return row_id
    gone = db.execute(text(f"SELECT actor, withdrawn_at, reason FROM withdrawals {_OWN} LIMIT 1"), own).one_or_none()  # noqa: S608  # constants
    return None if gone is None else EventWithdrawn(event_id, withdrawn_by(*gone), own=True)


def _by_kind(events: Sequence[Event]) -> Iterator[tuple[EventKind, list[int]]]:
    """Yield the positions of the events of each kind, always in the same order of kinds: others could deadlock."""
    for event_type, kind in KINDS.items():
        positions = [n for n, event in enumerate(events) if event.type == event_type]
        if positions:
            yield kind, positions


def insert_event(event: Event) -> int:
    """Insert one event in its own transaction and return the id of its row, which may already exist.

    Raises:
        EventConflict: its id is stored with other content.
        EventWithdrawn: this content was withdrawn under its id.
        InvalidEvent: the table cannot store its values.
        StoreUnavailable: the database is away or cannot execute the insert now.
    """
    with get_db() as db:
        (answer,) = insert_events(db, [event])
    if not isinstance(answer, Stored):
        raise answer
    return answer.row_id


def _insert(db: Connection, kind: EventKind, events: Sequence[Event]) -> list[Answer]:
    columns = _texts(kind, events)
    event_ids = columns["event_id"]
    answers: dict[int, Answer] = {}
    # If a row that conflicts with the insert is deleted before it is compared, the insert is repeated.
    for _ in range(_TRIES):
        missing = [n for n in range(len(events)) if n not in answers]
        first = {event_ids[n]: n for n in reversed(missing)}  # one row per event id, from its first delivery
        with translated_value_errors():
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
            unstored = [n for n in missing if not isinstance(answers.get(n), Stored)]
            withdrawn = find_withdrawn(db, [events[n] for n in unstored])
            answers |= {n: error for n, error in zip(unstored, withdrawn, strict=True) if error is not None}
        if len(answers) == len(events):
            return [answers[n] for n in range(len(events))]
    raise StoreUnavailable(
        f"cannot insert into {kind.table}: after {_TRIES} tries rows were neither inserted nor found"
        " (concurrent deletes, or a trigger that drops rows)",
        one_statement=True,
    )


def _texts(kind: EventKind, events: Sequence[Event]) -> dict[str, list[str]]:
    """Return the values of the events by column, as elements of a PostgreSQL array literal."""
    payloads = [event.data for event in events]
    return {
        "event_id": [str(event.id) for event in events],
        "source": [_quoted(event.source) for event in events],
        "sequence": ["NULL" if event.sequence is None else str(event.sequence) for event in events],
        **{column.name: _column_texts(column, payloads) for column in kind.columns},
    }


def _column_texts(column: Column, payloads: Iterable[Payload]) -> list[str]:
    written, value_of = _WRITERS.get(column.type, str), attrgetter(column.field)
    return ["NULL" if value is None else written(value) for value in map(value_of, payloads)]


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


# Functions that write values of these types; numbers, dates and UUIDs are written by str().
_WRITERS: dict[str, Callable[[Any], str]] = {
    "jsonb": lambda value: _quoted(simplejson.dumps(value, use_decimal=True, allow_nan=False)),
    "text": _quoted,
    # In UTC: PostgreSQL reads offsets only up to 15:59, RFC 3339 allows up to 23:59.
    "timestamptz": lambda value: str(value.astimezone(UTC)),
}


def _arrays(columns: Mapping[str, list[str]], chosen: Sequence[int] | None = None) -> dict[str, str]:
    """Return one array literal per column, with the chosen events or with all; the server parses it in one step."""
    return {
        name: "{" + ",".join(texts if chosen is None else [texts[n] for n in chosen]) + "}"
        for name, texts in columns.items()
    }
