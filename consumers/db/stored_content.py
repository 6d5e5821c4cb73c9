"""The content of events in the database: in rows, in withdrawals, and in the texts of rejected events.

Only digests are kept of it: a thousand archives may have gigabytes. Values are read as text and converted here. A value
that no event can have, such as an infinite time, gives no digest and does not raise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from functools import cache
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, TextClause, text

from producers.digests import columns_of, digest_of, digest_of_text
from producers.event_kinds import EventKind
from producers.events import KINDS

Place = Literal["row", "withdrawal"]

_ROWS = """
    SELECT id, source, sequence, CAST(event_id AS text), {columns} FROM {table} WHERE {condition}
"""
_WITHDRAWALS = """
    SELECT id, source, sequence, CAST(event_id AS text), {columns} FROM withdrawals
    WHERE {condition} AND jsonb_exists_all(content, ARRAY[{names}])
"""
_OUTCOMES = text("""
    SELECT sequence, CAST(event_id AS text) AS event_id, event FROM event_outcomes
    WHERE source = :source AND sequence = ANY (:numbers)
""")
_BY_NUMBER = "source = :source AND sequence = ANY (:numbers)"
_BY_EVENT = "event_id = ANY (CAST(:event_ids AS uuid[]))"
_FETCHED_ROWS = 100  # at a time: each may have 8 MiB

# PostgreSQL writes such a character itself, never as an escape.
_ESCAPED_SURROGATE = re.compile(r"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]")
_NOT_OF_AN_EVENT = (ArithmeticError, RecursionError, TypeError, ValueError)


def _json(value: str) -> Any:
    if _ESCAPED_SURROGATE.search(value):
        raise ValueError("a lone surrogate")
    return json.loads(value, parse_float=Decimal)


_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "bigint": int,
    "boolean": lambda value: value == "true",
    "integer": int,
    "jsonb": _json,
    "numeric": Decimal,
    "timestamptz": datetime.fromisoformat,
}
# The smallest and the largest offset of an event, and UTC: they give each local date that an instant can have.
_ZONES = [timezone(sign * timedelta(hours=23, minutes=59)) for sign in (-1, 0, 1)]


@dataclass(frozen=True)
class StoredContent:
    """Digest of the content of an event in a row of its history table, or in a withdrawal of such a row.

    `row_id` is the id in `table`; `source` and `sequence` name the delivery that made the row. `digest` is None if no
    event can have the values. `digests_of_duplicates` has the digests of the same event in other zones.
    """

    place: Place
    table: str
    row_id: int
    source: str
    sequence: int | None
    event_id: UUID
    digest: bytes | None
    digests_of_duplicates: frozenset[bytes] = frozenset()

    def __str__(self) -> str:
        return f"{self.place} {self.row_id} of {self.table}"


@dataclass(frozen=True)
class StoredOutcome:
    """Delivery without a row: its number, the id of its event if known, and the digest of a rejected event's text."""

    sequence: int
    event_id: UUID | None
    digest: bytes | None


def contents_by_number(db: Connection, source: str, numbers: Collection[int]) -> list[StoredContent]:
    """Return the rows and the withdrawals of these numbers of a source."""
    parameters = {"source": source, "numbers": list(numbers)}
    return [
        StoredContent(place, table, row_id, *delivery, event_id, _digest(kind, event_id, columns))
        for kind, place, table, row_id, delivery, event_id, columns in _rows(db, _BY_NUMBER, parameters)
    ]


def contents_by_event(db: Connection, event_ids: Collection[UUID]) -> list[StoredContent]:
    """Return the rows and the withdrawals of these events, with `digests_of_duplicates`."""
    if not event_ids:
        return []
    found = []
    parameters = {"event_ids": [str(one) for one in event_ids]}
    for kind, place, table, row_id, delivery, event_id, columns in _rows(db, _BY_EVENT, parameters):
        digest = _digest(kind, event_id, columns)
        others = _digests_in_other_zones(kind, event_id, columns)
        # If the row's derived columns fit no zone, they were changed.
        duplicates = others if digest in others else frozenset[bytes]()
        found.append(StoredContent(place, table, row_id, *delivery, event_id, digest, duplicates))
    return found


def outcomes_by_number(db: Connection, source: str, numbers: Collection[int]) -> list[StoredOutcome]:
    """Return the outcomes of these numbers of a source."""
    parameters = {"source": source, "numbers": list(numbers)}
    found = db.execute(_OUTCOMES, parameters, execution_options={"yield_per": _FETCHED_ROWS})
    return [
        StoredOutcome(
            sequence, event_id and UUID(event_id), None if event is None else digest_of_text(_type_in(event), event)
        )
        for sequence, event_id, event in found
    ]


def _rows(
    db: Connection, condition: str, parameters: dict[str, Any]
) -> Iterator[tuple[EventKind, Place, str, int, tuple[str, int | None], UUID, dict[str, Any] | None]]:
    """Yield (kind, place, table, row id, delivery, event id, columns) of each row and withdrawal."""
    for kind in KINDS.values():
        for place, statement in _statements(kind, condition).items():
            table = kind.table if place == "row" else "withdrawals"
            found = db.execute(statement, parameters, execution_options={"yield_per": _FETCHED_ROWS})
            for row_id, source, sequence, event_id, *texts in found:
                yield kind, place, table, row_id, (source, sequence), UUID(event_id), _columns(kind, texts)


@cache
def _statements(kind: EventKind, condition: str) -> dict[Place, TextClause]:
    columns = ", ".join(f'CAST("{column.name}" AS text)' for column in kind.columns)
    members = ", ".join(f"content ->> '{column.name}'" for column in kind.columns)
    names = ", ".join(f"'{column.name}'" for column in kind.columns)
    return {
        "row": text(_ROWS.format(columns=columns, table=kind.table, condition=condition)),
        "withdrawal": text(_WITHDRAWALS.format(columns=members, names=names, condition=condition)),
    }


def _columns(kind: EventKind, texts: Sequence[str | None]) -> dict[str, Any] | None:
    """Return the values by column; None if no event can have such values."""
    try:
        return {
            column.name: None if value is None else _FROM_TEXT.get(column.type, str)(value)
            for column, value in zip(kind.columns, texts, strict=True)
        }
    except _NOT_OF_AN_EVENT:
        return None


def _digest(kind: EventKind, event_id: UUID, columns: dict[str, Any] | None) -> bytes | None:
    try:
        return None if columns is None else digest_of(kind.type, event_id, columns)
    except _NOT_OF_AN_EVENT:  # pragma: no cover - JSON that is nested so deeply that it can only just be read
        return None


def _digests_in_other_zones(kind: EventKind, event_id: UUID, columns: dict[str, Any] | None) -> frozenset[bytes]:
    """Return the digests that an event has if its times are given in other zones.

    Derived columns, such as the month, may depend on the zone. A duplicate may have been recorded in another zone than
    the delivery that made the row.
    """
    if columns is None:
        return frozenset()
    try:
        return frozenset(digest_of(kind.type, event_id, _columns_in(zone, kind, columns)) for zone in _ZONES)
    except _NOT_OF_AN_EVENT:
        return frozenset()


def _columns_in(zone: timezone, kind: EventKind, columns: dict[str, Any]) -> dict[str, Any]:
    """Return the columns with the values that they have if the times are given in `zone`."""
    given = {}
    for column in kind.columns:
        if not column.derived or column.name in kind.identity:
            value = columns[column.name]
            given[column.field] = value.astimezone(zone) if isinstance(value, datetime) else value
    return columns_of(kind.payload.model_construct(None, **given))


def _type_in(event: str) -> str:
    """Return the type of an event from its text, or an empty text if it has none."""
    try:
        return str(json.loads(event)["type"])
    except (*_NOT_OF_AN_EVENT, KeyError):
        return ""
