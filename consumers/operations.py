"""The operations on the history: two idempotent inserts, and the reads; two of them also as exact streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple
from uuid import UUID

from consumers.db.archive_queries import archives, market_signals
from consumers.db.engine import get_db
from consumers.db.inserts import insert_event
from consumers.db.plain_dicts import archive_of, snapshot_of, zoned
from consumers.db.portfolio_queries import closes, snapshots
from consumers.db.queries import Filter, Query
from producers.events import PortfolioSnapshot, SignalArchive, event_of

_SNAPSHOTS_A_FETCH = 1000
_ARCHIVES_A_FETCH = 16  # of up to 8 MiB each
DIRECT_SOURCE = "direct"


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


def get_portfolio_history(
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    daily: Literal["last"] | None = None,
    after: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Snapshots, newest first by date and time, as dicts of the columns with amounts as floats.

    At most `limit` of them, of one portfolio, from `since` (inclusive) to `until` (exclusive); with `daily` only the
    last of each portfolio and snapshot_date. The next page is what comes `after` the last dict of this one.
    A naive time is in the local zone.

    Raises:
        ValueError: `limit` is negative.
        StoreUnavailable: the database cannot be read now.
    """
    wanted = _filter(limit, portfolio_id, since, until, after)
    return _select((snapshots if daily is None else closes)(wanted))


def get_recent_signal_archives(
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    after: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Signal archives, newest first, as dicts of the columns with signals_data as a list of dicts.

    At most `limit` of them, of one portfolio, from `since` (inclusive) to `until` (exclusive). The next page is what
    comes `after` the last dict of this one. A naive time is in the local zone.

    Raises:
        ValueError: `limit` is negative.
        StoreUnavailable: the database cannot be read now.
    """
    return _select(archives(_filter(limit, portfolio_id, since, until, after)))


def get_market_signals(
    market_id: str,
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    after: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Every archived signal of one market, newest first: archive_id, portfolio_id, archived_at, position, signal.

    `position` is the signal's place in its archive, from 1. The rest is as for get_recent_signal_archives.

    Raises:
        ValueError: `limit` is negative.
        StoreUnavailable: the database cannot be read now.
    """
    return _select(market_signals(market_id, _filter(limit, portfolio_id, since, until, after)))


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
    """The rows of `get_portfolio_history`, exactly and in flat memory; read them inside the block.

    Raises:
        StoreUnavailable: the database cannot be read now; while reading, too.
    """
    with _streamed(snapshots(_filter(limit, portfolio_id, since, until, None)), _SNAPSHOTS_A_FETCH) as rows:
        yield rows


@contextmanager
def stream_signal_archives(
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[ExactRows]:
    """The rows of `get_recent_signal_archives`, exactly and in flat memory; read them inside the block.

    Raises:
        StoreUnavailable: the database cannot be read now; while reading, too.
    """
    with _streamed(archives(_filter(limit, portfolio_id, since, until, None)), _ARCHIVES_A_FETCH) as rows:
        yield rows


@contextmanager
def _streamed(query: Query, rows_a_fetch: int) -> Iterator[ExactRows]:
    with get_db() as db:
        result = db.execute(query.exact_statement(), query.values, execution_options={"yield_per": rows_a_fetch})
        yield ExactRows(list(result.keys()), iter(result))


def _filter(
    limit: int | None,
    portfolio_id: int | None,
    since: datetime | None,
    until: datetime | None,
    after: Mapping[str, Any] | None,
) -> Filter:
    if limit is not None and limit < 0:
        raise ValueError("limit must not be negative")
    return Filter(
        limit=limit,
        portfolio_id=portfolio_id,
        since=since and zoned(since, "since"),
        until=until and zoned(until, "until"),
        after=after,
    )


def _select(query: Query) -> list[dict[str, Any]]:
    with get_db() as db:
        rows = db.execute(query.statement(), query.values).mappings()
        return [{name: _native(value) for name, value in row.items()} for row in rows]


def _native(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if isinstance(value, UUID) else value
