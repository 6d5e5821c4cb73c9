"""The SQL of the history: two idempotent inserts, two reads, and the outcomes that did not become rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import simplejson
from sqlalchemy import Connection, text

from consumers.connection import get_db
from consumers.errors import EventConflict, StoreUnavailable
from producers.errors import InvalidEvent
from producers.events import Event, PortfolioSnapshot, SignalArchive, SignalArchiveEvent, event_of, localized
from producers.settings import TransportSettings

DIRECT_SOURCE = "direct"
_INSERT_TRIES = 3


@dataclass(frozen=True)
class Stored:
    """Where a fact is: its row, whether this call made it, and the delivery that did."""

    row_id: int
    created: bool
    source: str
    sequence: int | None


# ---- inserting


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
    values = dict(snapshot)
    values["timestamp"] = _moment("timestamp", values)
    day = values.pop("date", values["timestamp"].date())
    values["snapshot_date"] = _day(values.get("snapshot_date", day))
    return _insert_direct(PortfolioSnapshot.checked(**values))


def insert_signal_archive(archive: Mapping[str, Any]) -> int:
    """Store one batch of signals and return its row's id, the same id when it is stored already.

    Takes archived_at, signals (or signals_data) and optionally portfolio_id. archive_month and signals_count
    may be given and must then be right. A naive time is in the local zone.

    Raises:
        InvalidEvent: a value is missing or wrong; the message names it.
        EventConflict: the portfolio has an archive of that instant with other signals.
        StoreUnavailable: the database cannot take it now.
    """
    values = dict(archive)
    values["archived_at"] = _moment("archived_at", values)
    if "signals_data" in values and "signals" not in values:
        values["signals"] = values.pop("signals_data")
    claimed = {name: values.pop(name) for name in ("archive_month", "signals_count") if name in values}
    checked = SignalArchive.checked(**values)
    for name, value in claimed.items():
        if value != getattr(checked, name):
            raise InvalidEvent.at(name, f"does not match the rest, which makes it {getattr(checked, name)}")
    return _insert_direct(checked)


def _insert_direct(payload: PortfolioSnapshot | SignalArchive) -> int:
    with get_db() as db:
        return insert_event(db, event_of(payload, source=DIRECT_SOURCE, sequence=None)).row_id


def _moment(field: str, values: Mapping[str, Any]) -> datetime:
    if field not in values:
        raise InvalidEvent.at(field, "is missing")
    moment = values[field]
    try:
        moment = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    except ValueError:
        raise InvalidEvent.at(field, "is text that is not an ISO 8601 time") from None
    if not isinstance(moment, datetime):
        raise InvalidEvent.at(field, f"must be a datetime, not {type(moment).__name__}")
    return localized(moment, TransportSettings.from_environment().timezone, field)


def _day(day: Any) -> Any:
    try:
        return date.fromisoformat(day) if isinstance(day, str) else day
    except ValueError:
        raise InvalidEvent.at("snapshot_date", "is text that is not an ISO 8601 date") from None


# ---- reading


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

    At most `limit` of them, of one portfolio, from `since` (inclusive) to `until` (exclusive): aware datetimes.

    Raises:
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

    At most `limit` of them, of one portfolio, from `since` (inclusive) to `until` (exclusive): aware datetimes.

    Raises:
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
    conditions = []
    if portfolio_id is not None:
        conditions.append("portfolio_id = :portfolio_id")
    if since is not None:
        conditions.append(f"{instant} >= :since")
    if until is not None:
        conditions.append(f"{instant} < :until")
    where = "WHERE " + " AND ".join(conditions) if conditions else ""
    values = {"limit": limit, "portfolio_id": portfolio_id, "since": since, "until": until}
    with get_db() as db:
        rows = db.execute(text(statement.format(where=where)), values).mappings()
        return [{name: _native(value) for name, value in row.items()} for row in rows]


def _native(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if isinstance(value, UUID) else value


# ---- outcomes that are no row


_RECORD_OUTCOME = text("""
    INSERT INTO event_outcomes (job_id, source, sequence, event_id, outcome, reason, event)
    VALUES (:job_id, :source, :sequence, CAST(:event_id AS uuid), :outcome, :reason, :event)
    ON CONFLICT (job_id) DO UPDATE SET source = excluded.source, sequence = excluded.sequence,
        event_id = excluded.event_id, outcome = excluded.outcome, reason = excluded.reason,
        event = excluded.event, created_at = now()
""")

_FORGET_OUTCOME = text("DELETE FROM event_outcomes WHERE job_id = :job_id")


def record_absorbed(db: Connection, job_id: str, event: Event) -> None:
    """Note that this delivery brought a fact that another delivery had stored."""
    values = {"source": event.source, "sequence": event.sequence, "event_id": str(event.id)}
    db.execute(_RECORD_OUTCOME, {"job_id": job_id, "outcome": "absorbed", "reason": None, "event": None} | values)


def record_rejected(
    db: Connection,
    job_id: str,
    reason: str,
    event: str,
    *,
    source: str | None,
    sequence: int | None,
    event_id: UUID | None,
) -> None:
    """Note that this delivery was refused for good, why, and what it was."""
    values = {"source": source, "sequence": sequence, "event_id": event_id and str(event_id)}
    db.execute(_RECORD_OUTCOME, {"job_id": job_id, "outcome": "rejected", "reason": reason, "event": event} | values)


def forget_outcome(db: Connection, job_id: str) -> None:
    """The delivery became a row after all: an earlier refusal of it no longer stands."""
    db.execute(_FORGET_OUTCOME, {"job_id": job_id})
