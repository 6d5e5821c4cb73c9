"""What the page asks PostgreSQL about snapshots: bounded reads of one consistent state, along the indexes.

A portfolio is its number, or None for the snapshots without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import NamedTuple

from sqlalchemy import Connection, TextClause, text

from consumers.db.engine import get_reader
from consumers.db.queries import KNOWN_PORTFOLIOS

ALL_DATES = (date.min, date.max)
MOST_PORTFOLIOS = 200
MOST_DAYS = 5_000
# snapshot_date is a local date, and may be the day of a cycle that ended after midnight.
_DATE_SLACK = timedelta(days=2)


@contextmanager
def reading() -> Iterator[Connection]:
    """One consistent transaction that can only read. Raises StoreUnavailable."""
    with get_reader() as reader, reader.execution_options(isolation_level="REPEATABLE READ").begin():
        # Compiling costs more than it saves: hundreds of milliseconds for queries that take tens.
        reader.exec_driver_sql("SET LOCAL jit = off")
        yield reader


def _of(portfolio: int | None, statement: str) -> TextClause:
    # An index knows IS NULL and =, but not IS NOT DISTINCT FROM.
    return text(statement.format(of="portfolio_id IS NULL" if portfolio is None else "portfolio_id = :portfolio"))


_PORTFOLIOS = text(f"""
    {KNOWN_PORTFOLIOS}
    SELECT portfolio_id FROM (SELECT portfolio_id FROM known LIMIT :limit) AS bounded WHERE portfolio_id IS NOT NULL
    UNION ALL
    SELECT NULL WHERE EXISTS (SELECT FROM portfolio_history WHERE portfolio_id IS NULL)
""")  # noqa: S608  # a constant

_EXTENT = """
    SELECT first.at AS first_at, last.at AS last_at, trim_scale(last.total_value) AS total_value
    FROM (SELECT "timestamp" AS at FROM portfolio_history WHERE {of}
            ORDER BY snapshot_date, "timestamp", id LIMIT 1) AS first,
        (SELECT "timestamp" AS at, total_value FROM portfolio_history WHERE {of}
            ORDER BY snapshot_date DESC, "timestamp" DESC, id DESC LIMIT 1) AS last
"""


class Extent(NamedTuple):
    """The first and the last snapshot of a portfolio, and the value in the last."""

    portfolio: int | None
    first_at: datetime
    last_at: datetime
    total_value: Decimal


def portfolios(db: Connection) -> list[Extent]:
    """Every portfolio that has a snapshot, by number, those without one last; at most 200."""
    numbers = db.execute(_PORTFOLIOS, {"limit": MOST_PORTFOLIOS}).scalars().all()
    return [found for number in numbers if (found := extent(db, number)) is not None]


def extent(db: Connection, portfolio: int | None) -> Extent | None:
    """None when the portfolio has no snapshot."""
    row = db.execute(_of(portfolio, _EXTENT), {"portfolio": portfolio}).one_or_none()
    return None if row is None else Extent(portfolio, *row)


_COUNT = """
    SELECT count(*) FROM (SELECT FROM portfolio_history WHERE {of} AND snapshot_date BETWEEN :since AND :until
        LIMIT :limit) AS bounded
"""


def count_snapshots(db: Connection, portfolio: int | None, dates: tuple[date, date], limit: int) -> int:
    """How many snapshots of these dates there are; `limit` when there are as many or more."""
    values = {"portfolio": portfolio, "since": dates[0], "until": dates[1], "limit": limit}
    return int(db.execute(_of(portfolio, _COUNT), values).scalar_one())


def dates_around(since: datetime, until: datetime) -> tuple[date, date]:
    """The snapshot dates that rows between two instants can have."""
    return since.date() - _DATE_SLACK, until.date() + _DATE_SLACK


class Range(NamedTuple):
    """A stretch of time in so many buckets; `until` belongs to the last one."""

    since: datetime
    until: datetime
    buckets: int

    @property
    def bucket_seconds(self) -> float:
        return ((self.until - self.since).total_seconds() + 1e-5) / self.buckets


# float8 serves to choose rows, never to tell amounts. An array compares by its first element, then by the next: min
# and max bring along which row it was and what the peak was then. Bucket -1 lies before the range, the last one after.
_BUCKETS = """
    WITH snapshots AS (
        SELECT id, date_part('epoch', "timestamp") AS at, CAST(total_value AS float8) AS value,
            CAST(balance AS float8) AS balance, CAST(total_invested AS float8) AS invested,
            greatest(CAST(:peak AS float8), max(CAST(total_value AS float8)) OVER earlier) AS peak
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
    """The snapshots of one stretch of time: how many, the first and last, and those that are extreme in it.

    Each chosen row is (what it was chosen by, its id, the highest total value up to it).
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
    *,
    dates: tuple[date, date] = ALL_DATES,
    peak: float | None = None,
    parts: bool = False,
) -> list[Bucket]:
    """The snapshots of these dates by bucket; the peak starts with `peak`; `parts`: also balance and invested."""
    values = {
        "portfolio": portfolio,
        "from_date": dates[0],
        "to_date": dates[1],
        "peak": peak,
        "start": over.since.timestamp(),
        "width": over.bucket_seconds,
        "buckets": over.buckets,
    }
    statement = _BUCKETS.replace("{parts}", _PARTS if parts else "")
    return [Bucket(*row) for row in db.execute(_of(portfolio, statement), values)]


_SNAPSHOTS = text("""
    SELECT id, snapshot_date, "timestamp" AS at, trim_scale(total_value) AS total_value,
        trim_scale(balance) AS balance, trim_scale(total_invested) AS total_invested
    FROM portfolio_history WHERE id = ANY(:ids) ORDER BY "timestamp", id
""")


class Snapshot(NamedTuple):
    id: int
    snapshot_date: date
    at: datetime
    total_value: Decimal
    balance: Decimal
    total_invested: Decimal


def snapshots(db: Connection, ids: Sequence[int]) -> list[Snapshot]:
    """These rows, oldest first."""
    return [Snapshot(*row) for row in db.execute(_SNAPSHOTS, {"ids": list(ids)})]


# The last snapshot of each date: one step of the index a date, however many snapshots the dates have.
_CLOSES = """
    WITH RECURSIVE closes AS (
        (SELECT id, snapshot_date, "timestamp", total_value, balance, total_invested FROM portfolio_history
            WHERE {of} AND snapshot_date <= :until ORDER BY snapshot_date DESC, "timestamp" DESC, id DESC LIMIT 1)
        UNION ALL
        SELECT older.* FROM closes CROSS JOIN LATERAL (
            SELECT id, snapshot_date, "timestamp", total_value, balance, total_invested FROM portfolio_history
            WHERE {of} AND snapshot_date < closes.snapshot_date AND snapshot_date >= :since
            ORDER BY snapshot_date DESC, "timestamp" DESC, id DESC LIMIT 1) AS older
    )
    SELECT id, snapshot_date, "timestamp", trim_scale(total_value), trim_scale(balance), trim_scale(total_invested)
    FROM closes WHERE snapshot_date >= :since LIMIT :limit
"""


def closes(db: Connection, portfolio: int | None, dates: tuple[date, date] = ALL_DATES) -> list[Snapshot]:
    """The last snapshot of each snapshot_date, oldest first: at most the newest 5,000 of these dates."""
    values = {"portfolio": portfolio, "since": dates[0], "until": dates[1], "limit": MOST_DAYS}
    return [Snapshot(*row) for row in db.execute(_of(portfolio, _CLOSES), values)][::-1]
