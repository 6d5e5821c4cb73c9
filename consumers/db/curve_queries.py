"""Queries for the curve of a portfolio: its snapshots over a range of time, in a bounded number of rows.

A portfolio is its number, or None for the snapshots without a portfolio.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, TextClause, text

from consumers.db.measures import EXPRESSIONS, Measure
from consumers.db.portfolio_queries import ALL_DATES, Snapshot, for_one_portfolio, page_columns

# snapshot_date is a local date. It may also be the day before, if a cycle ended after midnight.
_DATE_SLACK = timedelta(days=2)

_COUNT = """
    SELECT count(*) FROM (SELECT FROM portfolio_history WHERE {of} AND snapshot_date BETWEEN :since AND :until
        LIMIT :limit) AS bounded
"""


def count_snapshots(db: Connection, portfolio: int | None, dates: tuple[date, date], limit: int) -> int:
    """Return the number of snapshots of these dates, or `limit` if there are more."""
    values = {"portfolio_id": portfolio, "since": dates[0], "until": dates[1], "limit": limit}
    return int(db.execute(for_one_portfolio(portfolio, _COUNT), values).scalar_one())


def dates_around(since: datetime, until: datetime) -> tuple[date, date]:
    """Return the first and last snapshot_date that rows between two instants can have."""
    return since.date() - _DATE_SLACK, until.date() + _DATE_SLACK


class Range(NamedTuple):
    """Range of time in equal buckets; `until` belongs to the last one."""

    since: datetime
    until: datetime
    buckets: int

    @property
    def bucket_seconds(self) -> float:
        """Width of a bucket; a little more than its share, so that `until` is in the last one."""
        return ((self.until - self.since).total_seconds() + 1e-5) / self.buckets


# Amounts are float8 only to choose rows; they are never shown. PostgreSQL compares arrays element by element, so min
# and max of ARRAY[value, id, peak] also return the row's id and the peak at that row. Bucket -1 is before the range,
# bucket :buckets after it.
_BUCKETS = """
    WITH snapshots AS (
        SELECT id, date_part('epoch', "timestamp") AS at, CAST({worth} AS float8) AS value,
            CAST(balance AS float8) AS balance, CAST(total_invested AS float8) AS invested,
            greatest(CAST(:peak AS float8), max(CAST({worth} AS float8)) OVER earlier) AS peak
        FROM portfolio_history WHERE {of} AND snapshot_date BETWEEN :from_date AND :to_date
        WINDOW earlier AS (ORDER BY "timestamp", id ROWS UNBOUNDED PRECEDING)
    )
    SELECT CAST(bucket AS integer), count(*) AS snapshots,
        min(ARRAY[at, id, peak]) AS first, max(ARRAY[at, id, peak]) AS last,
        ARRAY[min(ARRAY[value, id, peak]), max(ARRAY[value, id, peak]),
            min(ARRAY[CASE WHEN peak > 0 THEN value / peak END, id, peak]) {parts}] AS extremes
    FROM (SELECT *, least(greatest(floor((at - :start) / :width), -1), :buckets) AS bucket FROM snapshots) AS placed
    GROUP BY bucket ORDER BY bucket
"""
_PARTS = """,
            min(ARRAY[balance, id, peak]), max(ARRAY[balance, id, peak]),
            min(ARRAY[invested, id, peak]), max(ARRAY[invested, id, peak])"""


class Bucket(NamedTuple):
    """Snapshots of one bucket: their number, the first and last, and those with extreme values.

    Each chosen row is (the amount that it was chosen by, its id, the highest worth so far).
    """

    number: int
    snapshots: int
    first: Sequence[float]
    last: Sequence[float]
    extremes: Sequence[Sequence[float]]


def buckets(
    db: Connection,
    portfolio: int | None,
    over: Range,
    measure: Measure,
    *,
    dates: tuple[date, date] = ALL_DATES,
    peak: float | None = None,
    parts: bool = False,
) -> list[Bucket]:
    """Return the buckets that have snapshots of these dates, in order.

    `peak` is the highest worth before these dates, by `measure`. With `parts` the extremes include those of balance and
    total_invested.
    """
    values = {
        "portfolio_id": portfolio,
        "from_date": dates[0],
        "to_date": dates[1],
        "peak": peak,
        "start": over.since.timestamp(),
        "width": over.bucket_seconds,
        "buckets": over.buckets,
    }
    statement = _BUCKETS.replace("{parts}", _PARTS if parts else "").replace("{worth}", EXPRESSIONS[measure])
    return [Bucket(*row) for row in db.execute(for_one_portfolio(portfolio, statement), values)]


_SNAPSHOTS: dict[Measure, TextClause] = {
    measure: text(f"""
        SELECT {page_columns(measure)} FROM portfolio_history WHERE id = ANY(:ids) ORDER BY "timestamp", id
    """)  # noqa: S608  # a constant
    for measure in EXPRESSIONS
}


def snapshots(db: Connection, ids: Sequence[int], measure: Measure) -> list[Snapshot]:
    """Return the snapshots with these row ids, oldest first."""
    return [Snapshot(*row) for row in db.execute(_SNAPSHOTS[measure], {"ids": list(ids)})]
