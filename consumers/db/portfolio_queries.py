"""Queries for portfolio snapshots: pages, daily closes, and the list of portfolios.

Where a function takes a portfolio, None means the snapshots without a portfolio.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, TextClause, text

from consumers.db.measures import EXPRESSIONS, FITS, FOLLOWS_OLD_FORMULA, OLD_FORMULA, Measure
from consumers.db.performance import Close, Performance, Rates, WorthMeasure, performance
from consumers.db.queries import NO_LIMIT, Filter, Query, portfolio_condition, quoted, where

SNAPSHOT_COLUMNS = (
    "id",
    "event_id",
    "source",
    "sequence",
    "portfolio_id",
    "snapshot_date",
    "timestamp",
    "balance",
    "total_invested",
    "total_profit_loss",
    "total_value",
    "open_positions",
    "trade_count",
    "created_at",
)
_AMOUNTS = ("balance", "total_invested", "total_profit_loss", "total_value")
SNAPSHOT_KEYS = ("snapshot_date", "timestamp", "id")
ALL_DATES = (date.min, date.max)
MOST_PORTFOLIOS = 200
MOST_DAYS = 5_000
_ORDER = 'snapshot_date DESC, "timestamp" DESC, id DESC'

# A snapshot's date is local to its offset, so it is within a day of the UTC date. Rows with another date, given by a
# caller, are in a partial index. So a period can be looked up by date.
_UTC_DATE = """CAST("timestamp" AT TIME ZONE 'UTC' AS date)"""
_DATED_OTHERWISE = f"snapshot_date NOT BETWEEN {_UTC_DATE} - 1 AND {_UTC_DATE} + 1"
_FIRST_DAY = "CAST(CAST(:since AS timestamptz) AT TIME ZONE 'UTC' AS date) - 1"
_LAST_DAY = "CAST(CAST(:until AS timestamptz) AT TIME ZONE 'UTC' AS date) + 1"


def snapshots(wanted: Filter) -> Query:
    """Return the query for portfolio snapshots, newest first by snapshot_date and timestamp."""
    conditions = wanted.conditions('"timestamp"')
    if wanted.after is not None:
        conditions.append(_BEHIND_SNAPSHOT)
    within, outside = _date_conditions(wanted)
    rows = _newest_snapshots([*conditions, *within], wanted.order(_ORDER))
    if outside:
        others = _newest_snapshots([*conditions, _DATED_OTHERWISE, outside], _ORDER)
        rows = f"({rows}) UNION ALL ({others}) ORDER BY {_ORDER} LIMIT :limit"
    return Query(SNAPSHOT_COLUMNS, _ORDER, SNAPSHOT_KEYS, rows, wanted.values(), amounts=_AMOUNTS)


_BEHIND_SNAPSHOT = '(snapshot_date, "timestamp", id) < (:after_snapshot_date, :after_timestamp, :after_id)'


def _newest_snapshots(conditions: list[str], order: str) -> str:
    return f"""
        SELECT *, xmin FROM portfolio_history {where(conditions)} ORDER BY {order} LIMIT :limit
    """  # noqa: S608  # from the constants here; values are parameters


def _date_conditions(wanted: Filter) -> tuple[list[str], str]:
    """Return the conditions that a period implies for the date, and their opposite ('' without a period)."""
    within, outside = [], []
    if wanted.since is not None:
        within.append(f"snapshot_date >= {_FIRST_DAY}")
        outside.append(f"snapshot_date < {_FIRST_DAY}")
    if wanted.until is not None:
        within.append(f"snapshot_date <= {_LAST_DAY}")
        outside.append(f"snapshot_date > {_LAST_DAY}")
    return within, f"({' OR '.join(outside)})" if outside else ""


def closes(wanted: Filter) -> Query:
    """Return the query for the last snapshot of each portfolio and date in the period, in the order of `snapshots`."""
    conditions = wanted.conditions('"timestamp"')
    within, outside = _date_conditions(wanted)
    among = [*conditions, *within]
    if wanted.after is not None:
        among.append("snapshot_date <= :after_snapshot_date")
    portfolios = portfolios_in("portfolio_history") if wanted.portfolio_id is None else _ONE_PORTFOLIO
    rows = f"{_closes_of(portfolios, among)} SELECT {quoted(SNAPSHOT_COLUMNS)}, xmin FROM closes"  # noqa: S608  # from the constants here; values are parameters
    if outside:
        others = [*conditions, _DATED_OTHERWISE, outside]
        rows += f"""
            UNION ALL SELECT * FROM (
                SELECT DISTINCT ON (portfolio_id, snapshot_date) {quoted(SNAPSHOT_COLUMNS)}, xmin
                FROM portfolio_history {where(others)}
                ORDER BY portfolio_id, {_ORDER}) AS dated_otherwise
        """  # noqa: S608  # as above
    behind = where([_BEHIND_SNAPSHOT] if wanted.after is not None else [])
    rows = f"SELECT * FROM ({rows}) AS found {behind} ORDER BY {_ORDER} LIMIT :limit"  # noqa: S608  # as above
    return Query(SNAPSHOT_COLUMNS, _ORDER, SNAPSHOT_KEYS, rows, wanted.values(), amounts=_AMOUNTS)


def _closes_of(portfolios: str, conditions: list[str]) -> str:
    """Return the CTEs of a statement: `closes` has at least the newest :limit closes of each of `portfolios`.

    It jumps in the index from one date of a portfolio to the next, so the number of snapshots per day does not matter.
    `portfolios` is the text of a CTE.
    """
    return f"""
        WITH RECURSIVE {portfolios}, closes AS (
            SELECT 1 AS number, close.* FROM portfolios CROSS JOIN LATERAL ({_close("portfolios", conditions)}) AS close
            UNION ALL
            SELECT number + 1, close.* FROM closes CROSS JOIN LATERAL (
                {_close("closes", [*conditions, "snapshot_date < closes.snapshot_date"])}) AS close
            WHERE number <= coalesce(:limit, {NO_LIMIT})
        )
    """  # noqa: S608  # from the constants here; values are parameters


def portfolios_in(table: str, most: str = "ALL") -> str:
    """Return CTEs for WITH RECURSIVE: `portfolios` has the `most` lowest numbers in the table, then a null.

    The recursion jumps in the index from one number to the next. PostgreSQL before 18 does not plan DISTINCT that way.
    """
    return f"""
        numbers (portfolio_id) AS (
            SELECT min(portfolio_id) FROM {table}
            UNION ALL
            SELECT (SELECT min(portfolio_id) FROM {table} WHERE portfolio_id > numbers.portfolio_id)
            FROM numbers WHERE portfolio_id IS NOT NULL
        ),
        portfolios (portfolio_id) AS (
            (SELECT portfolio_id FROM numbers WHERE portfolio_id IS NOT NULL LIMIT {most}) UNION ALL SELECT NULL
        )
    """  # noqa: S608  # from constants


_ONE_PORTFOLIO = "portfolios (portfolio_id) AS (SELECT CAST(:portfolio_id AS bigint))"


def _close(of: str, conditions: list[str]) -> str:
    """Return the SELECT for the newest snapshot of the portfolio in the relation `of`."""
    # Two branches, because an index cannot search for IS NOT DISTINCT FROM.
    numbered, without = (
        f"""
        (SELECT {quoted(SNAPSHOT_COLUMNS)}, xmin FROM portfolio_history {where([*which, *conditions])}
        ORDER BY portfolio_id, {_ORDER} LIMIT 1)
        """  # noqa: S608  # from the constants here; values are parameters
        for which in (
            [f"portfolio_history.{portfolio_condition(f'{of}.portfolio_id')}"],
            [f"{of}.portfolio_id IS NULL", "portfolio_history.portfolio_id IS NULL"],
        )
    )
    return f"{numbered} UNION ALL {without}"


_NEWEST_AGES = text(f"""
    WITH RECURSIVE {portfolios_in("portfolio_history", ":most")}
    SELECT portfolios.portfolio_id, CAST(extract(epoch FROM clock_timestamp() - newest."timestamp") AS float8)
    FROM portfolios CROSS JOIN LATERAL ({_close("portfolios", [])}) AS newest
""")  # noqa: S608  # from the constants here
_PORTFOLIOS = text(f"""
    WITH RECURSIVE {portfolios_in("portfolio_history", ":most")} SELECT portfolio_id FROM portfolios
""")  # noqa: S608  # as above
_EXTENT = """
    SELECT first.at AS first_at, last.at AS last_at
    FROM (SELECT "timestamp" AS at FROM portfolio_history WHERE {of}
            ORDER BY snapshot_date, "timestamp", id LIMIT 1) AS first,
        (SELECT "timestamp" AS at FROM portfolio_history WHERE {of}
            ORDER BY snapshot_date DESC, "timestamp" DESC, id DESC LIMIT 1) AS last
"""


def for_one_portfolio(portfolio: int | None, statement: str) -> TextClause:
    """Return `statement` with its `{of}` replaced by the condition for one portfolio."""
    # An index can search for IS NULL and =, but not for IS NOT DISTINCT FROM.
    return text(statement.format(of="portfolio_id IS NULL" if portfolio is None else "portfolio_id = :portfolio_id"))


def newest_snapshot_ages(db: Connection, most_portfolios: int) -> list[tuple[int | None, float]]:
    """Return (portfolio, seconds since its newest snapshot) for the lowest numbers, and for None if it has any."""
    return [(row[0], row[1]) for row in db.execute(_NEWEST_AGES, {"most": most_portfolios})]


class Extent(NamedTuple):
    """Times of the first and last snapshot of a portfolio."""

    portfolio: int | None
    first_at: datetime
    last_at: datetime


def portfolios(db: Connection) -> list[Extent]:
    """Return the portfolios that have snapshots: the 200 lowest numbers, then None if it has any."""
    numbers = db.execute(_PORTFOLIOS, {"most": MOST_PORTFOLIOS}).scalars().all()
    return [found for number in numbers if (found := extent(db, number)) is not None]


def extent(db: Connection, portfolio: int | None) -> Extent | None:
    """Return the extent of a portfolio, or None if it has no snapshot."""
    row = db.execute(for_one_portfolio(portfolio, _EXTENT), {"portfolio_id": portfolio}).one_or_none()
    return None if row is None else Extent(portfolio, *row)


class Snapshot(NamedTuple):
    """Snapshot with the amounts that the history page draws; `worth` is by one of the measures.

    `follows_old_formula`: money was invested, and total_value leaves it out (consumers.db.measures).
    """

    id: int
    snapshot_date: date
    at: datetime
    worth: Decimal
    balance: Decimal
    total_invested: Decimal
    total_profit_loss: Decimal
    follows_old_formula: bool


def page_columns(measure: Measure) -> str:
    """Return the columns of a Snapshot."""
    return f"""
        id, snapshot_date, "timestamp" AS at, trim_scale({EXPRESSIONS[measure]}) AS worth,
        trim_scale(balance) AS balance, trim_scale(total_invested) AS total_invested,
        trim_scale(total_profit_loss) AS total_profit_loss,
        total_invested <> 0 AND {FITS[OLD_FORMULA]} AS follows_old_formula
    """


_DATES = ["snapshot_date BETWEEN :first_date AND :last_date"]
_DAILY_CLOSES: dict[Measure, TextClause] = {
    measure: text(f"""
        {_closes_of(_ONE_PORTFOLIO, _DATES)}
        SELECT {page_columns(measure)} FROM closes ORDER BY snapshot_date DESC LIMIT :limit
    """)  # noqa: S608  # from the constants here; values are parameters
    for measure in EXPRESSIONS
}
_DEFAULT_MEASURE = text(f"""
    {_closes_of(_ONE_PORTFOLIO, [])} SELECT {FOLLOWS_OLD_FORMULA} FROM closes
""")  # noqa: S608  # from the constants here; values are parameters


def daily_closes(
    db: Connection, portfolio: int | None, measure: Measure, dates: tuple[date, date] = ALL_DATES
) -> list[Snapshot]:
    """Return the last snapshot of each snapshot_date, oldest first, for at most the newest 5,000 of these dates."""
    values = {"portfolio_id": portfolio, "first_date": dates[0], "last_date": dates[1], "limit": MOST_DAYS}
    return [Snapshot(*row) for row in db.execute(_DAILY_CLOSES[measure], values)][::-1]


def default_measure(db: Connection, portfolio: int | None) -> Measure:
    """Return the measure that is a portfolio's worth, chosen from its newest 5,000 daily closes.

    It is `equity` where every recorded value is balance + total_profit_loss and money was invested, else `value`.
    """
    values = {"portfolio_id": portfolio, "limit": MOST_DAYS}
    return "equity" if db.execute(_DEFAULT_MEASURE, values).scalar_one() else "value"


class PortfolioPerformance(NamedTuple):
    """Performance of one portfolio, whose worth is by `measure`."""

    portfolio_id: int | None
    measure: Measure
    performance: Performance

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of both, and the figures as a dict. Amounts are Decimals."""
        return {"portfolio_id": self.portfolio_id, "measure": self.measure, **asdict(self.performance)}


def performance_of(
    db: Connection, portfolio: int | None, measure: WorthMeasure | None, dates: tuple[date, date], rates: Rates
) -> PortfolioPerformance:
    """Return the performance of a portfolio over its daily closes of these dates, at most the newest 5,000.

    Without `measure` it is the portfolio's default measure.
    """
    used = measure or default_measure(db, portfolio)
    closes = [
        Close(row.snapshot_date, row.worth, row.total_profit_loss, used == "value" and row.follows_old_formula)
        for row in daily_closes(db, portfolio, used, dates)
    ]
    return PortfolioPerformance(portfolio, used, performance(closes, rates))


def performances(
    db: Connection,
    portfolio: int | None = None,
    *,
    since: date | None = None,
    until: date | None = None,
    measure: WorthMeasure | None = None,
    rates: Rates,
) -> list[PortfolioPerformance]:
    """Return the performance of one portfolio, by default of all that `portfolios` returns.

    It is that of the dates from `since` on and before `until`.
    """
    last = date.max if until is None else date.fromordinal(max(until.toordinal() - 1, 1))
    wanted = [one.portfolio for one in portfolios(db)] if portfolio is None else [portfolio]
    return [performance_of(db, number, measure, (since or date.min, last), rates) for number in wanted]
