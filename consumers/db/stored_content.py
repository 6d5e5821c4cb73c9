"""The content of events in the database: in rows, in withdrawals, and in the texts of rejected events.

Values are read as text and converted here: a value that no event can have, such as an infinite time, must not raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from functools import cache, cached_property
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, Row, TextClause, text

from producers.digests import columns_of, digest_of, digest_of_text
from producers.event_kinds import EventKind
from producers.events import KINDS

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

_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "bigint": int,
    "boolean": lambda value: value == "true",
    "integer": int,
    "jsonb": lambda value: json.loads(value, parse_float=Decimal),
    "numeric": Decimal,
    "timestamptz": datetime.fromisoformat,
}
# The smallest and the largest offset of an event, and UTC: they give each local date that an instant can have.
_ZONES = [timezone(sign * timedelta(hours=23, minutes=59)) for sign in (-1, 0, 1)]


@dataclass(frozen=True)
class StoredContent:
    """Content of an event in a row of its history table, or in a withdrawal of such a row.

    `row_id` is the id in the history table or in `withdrawals`; `source` and `sequence` name the delivery that made the
    row. `texts` has its columns as PostgreSQL writes them.
    """

    kind: EventKind
    place: Literal["row", "withdrawal"]
    row_id: int
    source: str
    sequence: int | None
    event_id: UUID
    texts: Sequence[str | None]

    def __str__(self) -> str:
        return f"{self.place} {self.row_id} of {self.kind.table if self.place == 'row' else 'withdrawals'}"

    @cached_property
    def columns(self) -> dict[str, Any] | None:
        """The values by column; None if no event can have such values."""
        try:
            return {
                column.name: None if value is None else _FROM_TEXT.get(column.type, str)(value)
                for column, value in zip(self.kind.columns, self.texts, strict=True)
            }
        except (ArithmeticError, RecursionError, ValueError):
            return None

    @cached_property
    def digest(self) -> bytes | None:
        """The digest of the content, see `producers.digests`; None if no event can have such values."""
        return None if self.columns is None else digest_of(self.kind.type, self.event_id, self.columns)

    def digests_in_other_zones(self) -> set[bytes]:
        """Return the digests that the same event has if its times are given in other zones.

        Derived columns, such as the month, may depend on the zone. A duplicate may have been recorded in another zone
        than the delivery that made the row. If the row's derived columns fit no zone, the result is empty.
        """
        if self.columns is None:
            return set()
        digests = {digest_of(self.kind.type, self.event_id, self._columns_in(zone)) for zone in _ZONES}
        return digests if self.digest in digests else set()

    def _columns_in(self, zone: timezone) -> dict[str, Any]:
        """Return the columns with the values that they have if the times are given in `zone`."""
        given = {}
        for column in self.kind.columns:
            if not column.derived or column.name in self.kind.identity:
                value = (self.columns or {})[column.name]
                given[column.field] = value.astimezone(zone) if isinstance(value, datetime) else value
        return columns_of(self.kind.payload.model_construct(None, **given))


@dataclass(frozen=True)
class StoredOutcome:
    """Delivery without a row: its number, the id of its event if that is known, and the text of a rejected event."""

    sequence: int
    event_id: UUID | None
    event: str | None

    @property
    def digest(self) -> bytes | None:
        """The digest of the rejected event; None for a duplicate."""
        return None if self.event is None else digest_of_text(_type_in(self.event), self.event)


def contents_by_number(db: Connection, source: str, numbers: Collection[int]) -> list[StoredContent]:
    """Return the rows and the withdrawals of these numbers of a source."""
    return _contents(db, _BY_NUMBER, {"source": source, "numbers": list(numbers)})


def contents_by_event(db: Connection, event_ids: Collection[UUID]) -> list[StoredContent]:
    """Return the rows and the withdrawals of these events, whichever delivery made them."""
    return _contents(db, _BY_EVENT, {"event_ids": [str(one) for one in event_ids]}) if event_ids else []


def outcomes_by_number(db: Connection, source: str, numbers: Collection[int]) -> list[StoredOutcome]:
    """Return the outcomes of these numbers of a source."""
    found = db.execute(_OUTCOMES, {"source": source, "numbers": list(numbers)})
    return [StoredOutcome(row.sequence, row.event_id and UUID(row.event_id), row.event) for row in found]


def _contents(db: Connection, condition: str, parameters: dict[str, Any]) -> list[StoredContent]:
    found = []
    for kind in KINDS.values():
        for place, statement in _statements(kind, condition).items():
            found += [_content(kind, place, row) for row in db.execute(statement, parameters)]
    return found


@cache
def _statements(kind: EventKind, condition: str) -> dict[Literal["row", "withdrawal"], TextClause]:
    columns = ", ".join(f'CAST("{column.name}" AS text)' for column in kind.columns)
    members = ", ".join(f"content ->> '{column.name}'" for column in kind.columns)
    names = ", ".join(f"'{column.name}'" for column in kind.columns)
    return {
        "row": text(_ROWS.format(columns=columns, table=kind.table, condition=condition)),
        "withdrawal": text(_WITHDRAWALS.format(columns=members, names=names, condition=condition)),
    }


def _content(kind: EventKind, place: Literal["row", "withdrawal"], row: Row[Any]) -> StoredContent:
    row_id, source, sequence, event_id = tuple(row)[:4]
    return StoredContent(kind, place, row_id, source, sequence, UUID(event_id), tuple(row)[4:])


def _type_in(event: str) -> str:
    """Return the type of an event from its text, or an empty text if it has none."""
    try:
        return str(json.loads(event)["type"])
    except (KeyError, RecursionError, TypeError, ValueError):
        return ""
