"""The SQL of the history: two idempotent inserts and two reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import simplejson
from sqlalchemy import Connection, text

from consumers.connection import get_db
from consumers.errors import EventConflict, StoreUnavailable
from consumers.plain_dicts import archive_of, snapshot_of, zoned
from producers.events import Event, PortfolioSnapshot, SignalArchive, SignalArchiveEvent, event_of

DIRECT_SOURCE = "direct"
_INSERT_TRIES = 3


@dataclass(frozen=True)
class Stored:
    """Where a fact is: its row, whether this call made it, and the delivery that did."""

    row_id: int
    created: bool
    source: str
    sequence: int | None


_INSERT_SNAPSHOT = text("""
    INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
        total_invested, total_profit_loss, total_value, open_positions, trade_count)
    VALUES (CAST(:event_id AS uuid), :source, :sequence, :portfolio_id, :snapshot_date, :timestamp, :balance,
        :total_invested, :total_profit_loss, :total_value, :open_positions, :trade_count)
    ON CONFLICT (event_id) DO NOTHING
    RETURNING id
""")

# The portfolio is part of the id, so it cannot differ.
_STORED_SNAPSHOT = text("""
    SELECT id, source, sequence,
        (snapshot_date, "timestamp", balance, total_invested, total_profit_loss, total_value, open_positions,
            trade_count)
        = (:snapshot_date, :timestamp, :balance, :total_invested, :total_profit_loss, :total_value,
            :open_positions, :trade_count) AS same
    FROM portfolio_history WHERE event_id = CAST(:event_id AS uuid)
""")

_INSERT_ARCHIVE = text("""
    INSERT INTO signal_archives (event_id, source, sequence, portfolio_id, archived_at, archive_month,
        signals_count, signals_data)
    VALUES (CAST(:event_id AS uuid), :source, :sequence, :portfolio_id, :archived_at, :archive_month,
        :signals_count, CAST(:signals_data AS jsonb))
    ON CONFLICT (event_id) DO NOTHING
    RETURNING id
""")

# Month and count are derived: the instant and the signals are the content.
_STORED_ARCHIVE = text("""
    SELECT id, source, sequence,
        (archived_at, signals_data) = (:archived_at, CAST(:signals_data AS jsonb)) AS same
    FROM signal_archives WHERE event_id = CAST(:event_id AS uuid)
""")


def insert_event(db: Connection, event: Event) -> Stored:
    """Insert the event's row unless the fact is stored already, in the transaction of `db`.

    Raises:
        EventConflict: its id is stored with other content.
    """
    if isinstance(event, SignalArchiveEvent):
        table, insert, stored = "signal_archives", _INSERT_ARCHIVE, _STORED_ARCHIVE
        values = _archive_values(event.data)
    else:
        table, insert, stored = "portfolio_history", _INSERT_SNAPSHOT, _STORED_SNAPSHOT
        values = _snapshot_values(event.data)
    values |= {"event_id": str(event.id), "source": event.source, "sequence": event.sequence}
    # A row that was in the way of the insert can be deleted before the look at it: then the insert is due again.
    for _ in range(_INSERT_TRIES):
        row_id = db.execute(insert, values).scalar()
        if row_id is not None:
            return Stored(row_id, True, event.source, event.sequence)
        row = db.execute(stored, values).one_or_none()
        if row is not None:
            if not row.same:
                raise EventConflict(event.id, table, row.id)
            return Stored(row.id, False, row.source, row.sequence)
    raise StoreUnavailable(f"the row of event {event.id} comes and goes")


# Instants go out in UTC: PostgreSQL reads offsets only up to 15:59, RFC 3339 has them up to 23:59.


def _snapshot_values(snapshot: PortfolioSnapshot) -> dict[str, Any]:
    return dict(snapshot) | {"timestamp": snapshot.timestamp.astimezone(UTC)}


def _archive_values(archive: SignalArchive) -> dict[str, Any]:
    return {
        "portfolio_id": archive.portfolio_id,
        "archived_at": archive.archived_at.astimezone(UTC),
        "archive_month": archive.archive_month,
        "signals_count": archive.signals_count,
        "signals_data": simplejson.dumps(archive.signals, use_decimal=True, allow_nan=False),
    }


def insert_portfolio_history_snapshot(snapshot: Mapping[str, Any]) -> int:
    """Store one snapshot and return its row's id, the same id when it is stored already.

    Takes timestamp, balance, total_invested, total_profit_loss, total_value, open_positions, trade_count, and
    optionally portfolio_id and snapshot_date (or date; the timestamp's by default). Dates and times may be ISO
    text; a naive time is in the local zone.

    Raises:
        InvalidEvent: a value is missing or wrong; the message names it.
        EventConflict: the portfolio has a snapshot of that instant with other values.
        StoreUnavailable: the database cannot take it now.
    """
    return _insert_direct(snapshot_of(snapshot))


def insert_signal_archive(archive: Mapping[str, Any]) -> int:
    """Store one batch of signals and return its row's id, the same id when it is stored already.

    Takes archived_at, signals (or signals_data) and optionally portfolio_id. archive_month and signals_count
    may be given and must then be right. A naive time is in the local zone.

    Raises:
        InvalidEvent: a value is missing or wrong; the message names it.
        EventConflict: the portfolio has an archive of that instant with other signals.
        StoreUnavailable: the database cannot take it now.
    """
    return _insert_direct(archive_of(archive))


def _insert_direct(payload: PortfolioSnapshot | SignalArchive) -> int:
    with get_db() as db:
        return insert_event(db, event_of(payload, source=DIRECT_SOURCE, sequence=None)).row_id


_SNAPSHOTS = """
    SELECT id, event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance, total_invested,
        total_profit_loss, total_value, open_positions, trade_count, created_at
    FROM portfolio_history
    {where}
    ORDER BY snapshot_date DESC, "timestamp" DESC, id DESC
    LIMIT :limit
"""

_ARCHIVES = """
    SELECT id, event_id, source, sequence, portfolio_id, archived_at, archive_month, signals_count, signals_data,
        created_at
    FROM signal_archives
    {where}
    ORDER BY archived_at DESC, id DESC
    LIMIT :limit
"""


def get_portfolio_history(
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[dict[str, Any]]:
    """Snapshots, newest first by date and time, as dicts of the columns with amounts as floats.

    At most `limit` of them, of one portfolio, from `since` (inclusive) to `until` (exclusive).
    A naive time is in the local zone.

    Raises:
        ValueError: `limit` is negative.
        StoreUnavailable: the database cannot be read now.
    """
    return _select(_SNAPSHOTS, '"timestamp"', limit=limit, portfolio_id=portfolio_id, since=since, until=until)


def get_recent_signal_archives(
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[dict[str, Any]]:
    """Signal archives, newest first, as dicts of the columns with signals_data as a list of dicts.

    At most `limit` of them, of one portfolio, from `since` (inclusive) to `until` (exclusive).
    A naive time is in the local zone.

    Raises:
        ValueError: `limit` is negative.
        StoreUnavailable: the database cannot be read now.
    """
    return _select(_ARCHIVES, "archived_at", limit=limit, portfolio_id=portfolio_id, since=since, until=until)


def _select(
    statement: str,
    instant: str,
    *,
    limit: int | None,
    portfolio_id: int | None,
    since: datetime | None,
    until: datetime | None,
) -> list[dict[str, Any]]:
    if limit is not None and limit < 0:
        raise ValueError("limit must not be negative")
    conditions = []
    if portfolio_id is not None:
        conditions.append("portfolio_id = :portfolio_id")
    if since is not None:
        conditions.append(f"{instant} >= :since")
    if until is not None:
        conditions.append(f"{instant} < :until")
    where = "WHERE " + " AND ".join(conditions) if conditions else ""
    values = {
        "limit": limit,
        "portfolio_id": portfolio_id,
        "since": since and zoned(since, "since"),
        "until": until and zoned(until, "until"),
    }
    with get_db() as db:
        rows = db.execute(text(statement.format(where=where)), values).mappings()
        return [{name: _native(value) for name, value in row.items()} for row in rows]


def _native(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if isinstance(value, UUID) else value
