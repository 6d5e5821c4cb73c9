"""Withdrawal of wrong rows: remove a row from its history table, and keep its content in the table `withdrawals`.

Inserts leave out an event whose content was withdrawn under its id. A concurrent insert must see the row or its
withdrawal, so a withdrawal locks the history table against inserts. In a READ COMMITTED transaction, an INSERT takes
its snapshot after it has waited for that lock. All transactions that insert are READ COMMITTED, whatever the role or
the database sets: see `consumers.db.engine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, NoReturn
from uuid import UUID

from sqlalchemy import Connection, TextClause, text

from consumers.db.schema import check_database
from consumers.errors import WithdrawalRefused
from producers.event_kinds import Column, EventKind
from producers.events import IMPORT_PREFIX, KINDS

_MAY_WITHDRAW = text("""
    SELECT has_table_privilege(:name, 'DELETE') AND has_table_privilege('withdrawals', 'INSERT') AS may,
        current_user AS role
""")
_EARLIER = text("""
    SELECT reason, actor, withdrawn_at FROM withdrawals WHERE event_id = CAST(:event_id AS uuid)
    ORDER BY id DESC LIMIT 1
""")
_REJECTED = text("""
    SELECT reason FROM event_outcomes WHERE event_id = CAST(:event_id AS uuid) AND outcome = 'rejected'
    ORDER BY created_at DESC LIMIT 1
""")


@dataclass(frozen=True)
class Withdrawal:
    """A withdrawn row. `content` has its columns by name: amounts as strings with every digit, times with offset."""

    id: int
    event_id: UUID
    table: str
    row_id: int
    source: str
    sequence: int | None
    job_id: str | None
    content: dict[str, Any]
    reason: str
    actor: str
    created_at: datetime
    withdrawn_at: datetime


def withdraw(db: Connection, event_id: UUID, reason: str, actor: str) -> Withdrawal:
    """Remove the row of this event and keep its content, in the transaction of `db`.

    Inserts into its table wait until the transaction ends. The withdrawn content cannot be inserted again, but other
    content under the same event id can.

    Raises:
        WithdrawalRefused: the event has no row, or this role lacks a right that the owner of the tables has. Nothing
            was changed.
        StoreUnavailable: the database is not UTF8, its tables are missing or older than this program, or, raised by
            `get_db`, the transaction did not get the lock within 5 s.
        ValueError: `reason` or `actor` is empty.
    """
    for name, value in (("reason", reason), ("actor", actor)):
        if not value.strip():
            raise ValueError(f"{name} must not be empty")
    check_database(db)
    kind = _kind_of(db, event_id)
    if kind is None:
        _refuse(db, event_id)
    may = db.execute(_MAY_WITHDRAW, {"name": kind.table}).one()
    if not may.may:
        raise WithdrawalRefused(
            f"role {may.role} may not withdraw a row of {kind.table}, which needs DELETE there and INSERT on"
            " withdrawals: write the name and password of the owner of the tables in DATABASE_URL"
        )
    db.exec_driver_sql(f"LOCK TABLE {kind.table} IN SHARE ROW EXCLUSIVE MODE")
    given = {"event_id": str(event_id), "reason": reason, "actor": actor}
    row = db.execute(_withdraw_statement(kind), given).mappings().one_or_none()
    if row is None:  # withdrawn by another session, which had the lock before
        _refuse(db, event_id)
    in_order = {column.name: row["content"][column.name] for column in kind.columns}  # JSONB sorts by length
    return Withdrawal(table=kind.table, **{**row, "content": in_order})


def withdrawn_by(actor: str, at: datetime, reason: str) -> str:
    """Return the part of a message that says who withdrew a row, when and why."""
    return f"withdrawn by {actor} at {at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}: {reason}"


def same_content(kind: EventKind) -> str:
    """Return the SQL condition that a row of `given` has the event id and the content of a row of `withdrawals`.

    It compares the columns that make a conflict, by value.
    """
    columns = [column for column in kind.columns if not column.derived]
    conditions = [f'{_value(column)} IS NOT DISTINCT FROM given."{column.name}"' for column in columns]
    return " AND ".join(["withdrawals.event_id = given.event_id", *conditions])


def _value(column: Column) -> str:
    if column.type == "jsonb":
        return f"withdrawals.content -> '{column.name}'"
    return f"CAST(withdrawals.content ->> '{column.name}' AS {column.type})"


def _kind_of(db: Connection, event_id: UUID) -> EventKind | None:
    """Return the kind in whose table the event has a row, or None."""
    for kind in KINDS.values():
        row = text(f"SELECT 1 FROM {kind.table} WHERE event_id = CAST(:event_id AS uuid)")  # noqa: S608  # a constant
        if db.scalar(row, {"event_id": str(event_id)}):
            return kind
    return None


@cache
def _withdraw_statement(kind: EventKind) -> TextClause:
    content = ", ".join(f"'{column.name}', {_json_value(column)}" for column in kind.columns)
    # Only entries of an import have a job id that follows from source and sequence.
    return text(f"""
        WITH removed AS (DELETE FROM {kind.table} WHERE event_id = CAST(:event_id AS uuid) RETURNING *)
        INSERT INTO withdrawals (event_id, source, sequence, job_id, row_id, content, reason, actor, created_at)
        SELECT event_id, source, sequence,
            CASE WHEN source LIKE '{IMPORT_PREFIX}%/%' THEN split_part(source, '/', 3) || '-' || sequence END,
            id, jsonb_build_object({content}), :reason, :actor, created_at
        FROM removed
        RETURNING id, event_id, row_id, source, sequence, job_id, content, reason, actor, created_at, withdrawn_at
    """)  # noqa: S608  # from the table of event kinds; values are parameters


def _json_value(column: Column) -> str:
    # As a JSON number, an amount would lose digits in programs that read JSON numbers as floats.
    return f'CAST(trim_scale("{column.name}") AS text)' if column.type == "numeric" else f'"{column.name}"'


def _refuse(db: Connection, event_id: UUID) -> NoReturn:
    """Raise WithdrawalRefused with what is known about an event that has no row."""
    of_event = {"event_id": str(event_id)}
    if (earlier := db.execute(_EARLIER, of_event).one_or_none()) is not None:
        reason = f"it was already {withdrawn_by(earlier.actor, earlier.withdrawn_at, earlier.reason)}"
    elif (rejected := db.scalar(_REJECTED, of_event)) is not None:
        reason = f"it was rejected: {rejected}; see trading-history failed show {event_id}"
    else:
        reason = "see trading-history history --json and archives --json for the ids of the rows"
    raise WithdrawalRefused(f"no row has the event id {event_id}: {reason}")
