"""Operations on the history: two idempotent inserts, four reads, and two streams with exact amounts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple
from uuid import UUID

from consumers.db.archive_queries import archives, market_signals
from consumers.db.engine import get_db, long_read
from consumers.db.inserts import insert_event
from consumers.db.performance import Rates, WorthMeasure
from consumers.db.plain_dicts import archive_of, snapshot_of, zoned
from consumers.db.portfolio_queries import closes, performances, snapshots
from consumers.db.queries import Filter, Query
from producers.events import PortfolioSnapshot, SignalArchive, event_of

_SNAPSHOTS_A_FETCH = 1000
_ARCHIVES_A_FETCH = 16  # of up to 8 MiB each
DIRECT_SOURCE = "direct"


def insert_portfolio_history_snapshot(snapshot: Mapping[str, Any]) -> int:
    """Insert one snapshot and return the id of its row. If it is already stored, return the id of that row.

    `snapshot` has the keys timestamp, balance, total_invested, total_profit_loss, total_value, open_positions and
    trade_count; optional are portfolio_id and snapshot_date (or date), by default the date of timestamp. Dates and
    times may be ISO 8601 text, and times also epoch seconds or milliseconds. A naive time is in the local zone.

    Raises:
        InvalidEvent: a value is missing or wrong; the message names it.
        EventConflict: the portfolio already has a snapshot of that instant with other values.
        EventWithdrawn: these values were withdrawn for that instant.
        StoreUnavailable: the database is away or cannot execute the insert now.
    """
    return _insert_direct(snapshot_of(snapshot))


def insert_signal_archive(archive: Mapping[str, Any]) -> int:
    """Insert one archive of signals and return the id of its row. If it is already stored, return the id of that row.

    `archive` has the keys archived_at and signals (or signals_data), and optionally portfolio_id. If it has
    archive_month or signals_count, they must agree with the other values. A naive time is in the local zone.

    Raises:
        InvalidEvent: a value is missing or wrong; the message names it.
        EventConflict: the portfolio already has an archive of that instant with other signals.
        EventWithdrawn: these signals were withdrawn for that instant.
        StoreUnavailable: the database is away or cannot execute the insert now.
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
    """Return snapshots, newest first by snapshot_date and timestamp, as dicts of the columns with amounts as floats.

    Return at most `limit` rows, of one portfolio, from `since` (inclusive) to `until` (exclusive). With
    `daily="last"` return only the last snapshot of each portfolio and snapshot_date. For the next page pass the last
    dict of this page as `after`. A naive time is in the local zone.

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
    """Return signal archives, newest first by archived_at, as dicts of the columns; signals_data is a list of dicts.

    Return at most `limit` rows, of one portfolio, from `since` (inclusive) to `until` (exclusive). For the next page
    pass the last dict of this page as `after`. A naive time is in the local zone.

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
    """Return the archived signals of one market, newest first.

    Each dict has archive_id, portfolio_id, archived_at, position (of the signal in its archive, from 1) and signal.
    The other arguments are those of get_recent_signal_archives.

    Raises:
        ValueError: `limit` is negative.
        StoreUnavailable: the database cannot be read now.
    """
    return _select(market_signals(market_id, _filter(limit, portfolio_id, since, until, after)))


def get_performance(
    portfolio_id: int | None = None,
    *,
    since: date | None = None,
    until: date | None = None,
    measure: WorthMeasure | None = None,
    risk_free_rate: float = 0.0,
    days_of_a_year: float = 365,
) -> list[dict[str, Any]]:
    """Return the performance of one portfolio, or of each of the 200 lowest numbers and of the one without a number.

    It is computed from the daily closes of the dates from `since` on and before `until`. Each dict has portfolio_id,
    measure (by default chosen from the portfolio's rows), closes, first and last date, worth, profit_loss,
    net_deposits, and figures (a dict; its formulas are in consumers.db.performance). Where figures would be wrong they
    are None, and problem says why. Shares and returns are floats: 0.01 is one per cent.

    Raises:
        ValueError: a rate cannot be used; the message names it.
        StoreUnavailable: the database cannot be read now.
    """
    if not -1 < risk_free_rate < math.inf:
        raise ValueError("risk_free_rate must be a number above -1 (0.02 is 2 % a year)")
    if not 1 <= days_of_a_year <= 366:
        raise ValueError("days_of_a_year must be from 1 to 366")
    rates = Rates(risk_free_rate=risk_free_rate, days_of_a_year=days_of_a_year)
    with get_db() as db:
        found = performances(db, portfolio_id, since=since, until=until, measure=measure, rates=rates)
    return [{name: _native(value) for name, value in one.as_dict().items()} for one in found]


class ExactRows(NamedTuple):
    """Stream of rows, with values in the order of `columns`. Amounts are Decimals, `document` is JSON text."""

    columns: Sequence[str]
    rows: Iterator[Sequence[Any]]
    document: str | None


@contextmanager
def stream_portfolio_history(
    limit: int | None = None,
    *,
    portfolio_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[ExactRows]:
    """Stream the rows of `get_portfolio_history` with exact amounts in constant memory; read them inside the block.

    Raises:
        StoreUnavailable: the database cannot be read now. Reading the rows can raise it too.
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
    """Stream the rows of `get_recent_signal_archives` with exact numbers in constant memory; read inside the block.

    Raises:
        StoreUnavailable: the database cannot be read now. Reading the rows can raise it too.
    """
    with _streamed(archives(_filter(limit, portfolio_id, since, until, None)), _ARCHIVES_A_FETCH) as rows:
        yield rows


@contextmanager
def _streamed(query: Query, rows_a_fetch: int) -> Iterator[ExactRows]:
    with long_read() as db:
        result = db.execute(query.exact_statement(), query.values, execution_options={"yield_per": rows_a_fetch})
        yield ExactRows(list(result.keys()), iter(result), query.document)


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
