"""The four operations on the history: two idempotent inserts and two reads; and the reads as exact streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import TextClause, text

from consumers.connection import get_db
from consumers.inserts import insert_event
from consumers.plain_dicts import archive_of, snapshot_of, zoned
from producers.events import PortfolioSnapshot, SignalArchive, event_of

DIRECT_SOURCE = "direct"
_SNAPSHOTS_A_FETCH = 1000
_ARCHIVES_A_FETCH = 16  # of up to 8 MiB each


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
    return insert_event(event_of(payload, source=DIRECT_SOURCE, sequence=None))


_SNAPSHOTS = """
    SELECT id, event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance, total_invested,
        total_profit_loss, total_value, open_positions, trade_count, created_at
    FROM portfolio_history
    {where}
    ORDER BY snapshot_date DESC, "timestamp" DESC, id DESC
    LIMIT :limit
"""

_ARCHIVES = """
    SELECT id, event_id, source, sequence, portfolio_id, archived_at, archive_month, signals_count, {signals},
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
    return _select(
        _ARCHIVES.replace("{signals}", "signals_data"),
        "archived_at",
        limit=limit,
        portfolio_id=portfolio_id,
        since=since,
        until=until,
    )


class ExactRows(NamedTuple):
    """Rows as they come from the server, in the order of `columns`: amounts are Decimals, signals JSON text."""

    columns: Sequence[str]
    rows: Iterator[Sequence[Any]]


@contextmanager
def stream_portfolio_history(
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[ExactRows]:
    """What `get_portfolio_history` gives, exactly and in flat memory; to be read inside the block.

    Raises:
        StoreUnavailable: the database cannot be read now; while reading, too.
    """
    statement, values = _narrowed(
        _SNAPSHOTS, '"timestamp"', limit=limit, portfolio_id=portfolio_id, since=since, until=until
    )
    with _streamed(statement, values, _SNAPSHOTS_A_FETCH) as rows:
        yield rows


@contextmanager
def stream_signal_archives(
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[ExactRows]:
    """What `get_recent_signal_archives` gives, exactly and in flat memory; to be read inside the block.

    Raises:
        StoreUnavailable: the database cannot be read now; while reading, too.
    """
    exact = _ARCHIVES.replace("{signals}", "CAST(signals_data AS text) AS signals_data")
    statement, values = _narrowed(
        exact, "archived_at", limit=limit, portfolio_id=portfolio_id, since=since, until=until
    )
    with _streamed(statement, values, _ARCHIVES_A_FETCH) as rows:
        yield rows


@contextmanager
def _streamed(statement: TextClause, values: Mapping[str, Any], rows_a_fetch: int) -> Iterator[ExactRows]:
    with get_db() as db:
        result = db.execute(statement, values, execution_options={"yield_per": rows_a_fetch})
        yield ExactRows(list(result.keys()), iter(result))


def _select(
    statement: str,
    instant: str,
    *,
    limit: int | None,
    portfolio_id: int | None,
    since: datetime | None,
    until: datetime | None,
) -> list[dict[str, Any]]:
    narrowed, values = _narrowed(statement, instant, limit=limit, portfolio_id=portfolio_id, since=since, until=until)
    with get_db() as db:
        rows = db.execute(narrowed, values).mappings()
        return [{name: _native(value) for name, value in row.items()} for row in rows]


def _narrowed(
    statement: str,
    instant: str,
    *,
    limit: int | None,
    portfolio_id: int | None,
    since: datetime | None,
    until: datetime | None,
) -> tuple[TextClause, dict[str, Any]]:
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
    return text(statement.replace("{where}", where)), values


def _native(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if isinstance(value, UUID) else value
