"""What is read, in SQL: each listing newest first, narrowed, and continued behind a row that was seen before.

Pages are found by the keys of their last rows, never by counting rows off: that a page is far down, or that rows came
in meanwhile, changes neither its cost nor its contents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import TextClause, text

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
ARCHIVE_COLUMNS = (
    "id",
    "event_id",
    "source",
    "sequence",
    "portfolio_id",
    "archived_at",
    "archive_month",
    "signals_count",
    "signals_data",
    "created_at",
)
SIGNAL_COLUMNS = ("archive_id", "portfolio_id", "archived_at", "position", "signal")

SNAPSHOT_KEYS = ("snapshot_date", "timestamp", "id")
ARCHIVE_KEYS = ("archived_at", "id")
SIGNAL_KEYS = ("archived_at", "archive_id", "position")

_SNAPSHOT_ORDER = 'snapshot_date DESC, "timestamp" DESC, id DESC'
_ARCHIVE_ORDER = "archived_at DESC, id DESC"
_SIGNAL_ORDER = "archived_at DESC, archive_id DESC, position"

# A snapshot's date is that of its own offset, so within a day of UTC's. What a caller has dated otherwise stands in an
# index of its own, and a period can be looked up by date all the same.
_UTC_DATE = """CAST("timestamp" AT TIME ZONE 'UTC' AS date)"""
_DATED_OTHERWISE = f"snapshot_date NOT BETWEEN {_UTC_DATE} - 1 AND {_UTC_DATE} + 1"
_FIRST_DAY = "CAST(CAST(:since AS timestamptz) AT TIME ZONE 'UTC' AS date) - 1"
_LAST_DAY = "CAST(CAST(:until AS timestamptz) AT TIME ZONE 'UTC' AS date) + 1"

_MARKETS = "jsonb_path_query_array(signals_data, '$[*].market_id')"  # the expression of the index on it
_NO_LIMIT = 2**62

# The beginning of a statement. An index scan goes from one number straight to the next, which the planner of PostgreSQL
# below 18 does not think of. The last number is null.
KNOWN_PORTFOLIOS = """
    WITH RECURSIVE known AS (
        (SELECT portfolio_id FROM portfolio_history WHERE portfolio_id IS NOT NULL ORDER BY portfolio_id LIMIT 1)
        UNION ALL
        SELECT (SELECT portfolio_id FROM portfolio_history WHERE portfolio_id > known.portfolio_id
            ORDER BY portfolio_id LIMIT 1)
        FROM known WHERE portfolio_id IS NOT NULL
    )
""".strip()


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """At most `limit` rows, of one portfolio, from `since` to before `until` (aware), behind the row `after`."""

    limit: int | None = None
    portfolio_id: int | None = None
    since: datetime | None = None
    until: datetime | None = None
    after: Mapping[str, Any] | None = None

    def values(self) -> dict[str, Any]:
        """Parameters of a listing's statement."""
        behind = {f"after_{name}": value for name, value in (self.after or {}).items()}
        return behind | {
            "limit": self.limit,
            "portfolio_id": self.portfolio_id,
            "since": self.since and self.since.astimezone(UTC),
            "until": self.until and self.until.astimezone(UTC),
        }

    def conditions(self, instant: str) -> list[str]:
        """All but `after`, for a table whose rows are of the time `instant`."""
        asked = {
            _of_portfolio(":portfolio_id"): self.portfolio_id,
            f"{instant} >= :since": self.since,
            f"{instant} < :until": self.until,
        }
        return [condition for condition, value in asked.items() if value is not None]

    def order(self, newest: str) -> str:
        """The order in which an index finds these rows `newest` first."""
        return newest if self.portfolio_id is None else f"portfolio_id, {newest}"


def _of_portfolio(portfolio_id: str) -> str:
    # With = PostgreSQL may prefer to go through the newest rows of all portfolios, until it meets one that has been at
    # rest for years. With this, and the portfolio in the order, only the index by portfolio will do.
    return f"portfolio_id = ANY (ARRAY[CAST({portfolio_id} AS bigint)])"


@dataclass(frozen=True)
class Listing:
    """What a listing's statement is made of.

    `rows` is a SELECT that gives `columns` and `xmin`, the version of the row. `keys` are the columns that tell a row's
    place, as `Narrowing.after` wants them; `document` is the JSONB column, of any size.
    """

    columns: tuple[str, ...]
    order: str
    keys: tuple[str, ...]
    rows: str
    values: Mapping[str, Any]
    document: str | None = None

    def statement(self) -> TextClause:
        """For the rows as they are."""
        return text(f"SELECT {quoted(self.columns)} FROM ({self.rows}) AS page ORDER BY {self.order}")  # noqa: S608  # from constants

    def exact_statement(self) -> TextClause:
        """The same, the document as JSON text with every digit."""
        columns = (f'CAST("{one}" AS text) AS "{one}"' if one == self.document else f'"{one}"' for one in self.columns)
        return text(f"SELECT {', '.join(columns)} FROM ({self.rows}) AS page ORDER BY {self.order}")  # noqa: S608  # from constants


def guessed_bytes(document: str) -> str:
    """An expression for about how many bytes of text a JSONB column is, without unpacking it."""
    return f"(CASE WHEN pg_column_compression({document}) IS NULL THEN 1 ELSE 16 END * pg_column_size({document}))"


def quoted(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def snapshots(narrowing: Narrowing) -> Listing:
    """Portfolio snapshots, newest first by snapshot_date, timestamp."""
    conditions = narrowing.conditions('"timestamp"')
    if narrowing.after is not None:
        conditions.append(_BEHIND_SNAPSHOT)
    within, outside = _days(narrowing)
    rows = _newest_snapshots([*conditions, *within], narrowing.order(_SNAPSHOT_ORDER))
    if outside:
        others = _newest_snapshots([*conditions, _DATED_OTHERWISE, outside], _SNAPSHOT_ORDER)
        rows = f"({rows}) UNION ALL ({others}) ORDER BY {_SNAPSHOT_ORDER} LIMIT :limit"
    return Listing(SNAPSHOT_COLUMNS, _SNAPSHOT_ORDER, SNAPSHOT_KEYS, rows, narrowing.values())


_BEHIND_SNAPSHOT = '(snapshot_date, "timestamp", id) < (:after_snapshot_date, :after_timestamp, :after_id)'


def _newest_snapshots(conditions: list[str], order: str) -> str:
    return f"""
        SELECT *, xmin FROM portfolio_history {_where(conditions)} ORDER BY {order} LIMIT :limit
    """  # noqa: S608  # from the constants here; values are parameters


def _days(narrowing: Narrowing) -> tuple[list[str], str]:
    """Conditions on the date that a period implies, and their contrary ('' without a period)."""
    within, outside = [], []
    if narrowing.since is not None:
        within.append(f"snapshot_date >= {_FIRST_DAY}")
        outside.append(f"snapshot_date < {_FIRST_DAY}")
    if narrowing.until is not None:
        within.append(f"snapshot_date <= {_LAST_DAY}")
        outside.append(f"snapshot_date > {_LAST_DAY}")
    return within, f"({' OR '.join(outside)})" if outside else ""


def closes(narrowing: Narrowing) -> Listing:
    """The last snapshot of each portfolio on each date (of those in the period), in the order of `snapshots`.

    Jumps from one date of a portfolio to its next in the index: days of thousands of snapshots cost what others cost.
    """
    conditions = narrowing.conditions('"timestamp"')
    within, outside = _days(narrowing)
    among = [*conditions, *within]
    if narrowing.after is not None:
        among.append("snapshot_date <= :after_snapshot_date")
    rows = f"""
        WITH RECURSIVE portfolios (portfolio_id) AS ({_ONE_PORTFOLIO if narrowing.portfolio_id is not None else _ALL}),
        closes AS (
            SELECT 0 AS number, close.* FROM portfolios CROSS JOIN LATERAL ({_last("portfolios", among)}) AS close
            UNION ALL
            SELECT number + 1, close.* FROM closes CROSS JOIN LATERAL (
                {_last("closes", [*among, "snapshot_date < closes.snapshot_date"])}) AS close
            WHERE number < coalesce(:limit, {_NO_LIMIT})
        )
        SELECT {quoted(SNAPSHOT_COLUMNS)}, xmin FROM closes
    """  # noqa: S608  # from the constants here; values are parameters
    if outside:
        others = [*conditions, _DATED_OTHERWISE, outside]
        rows += f"""
            UNION ALL SELECT * FROM (
                SELECT DISTINCT ON (portfolio_id, snapshot_date) {quoted(SNAPSHOT_COLUMNS)}, xmin
                FROM portfolio_history {_where(others)}
                ORDER BY portfolio_id, {_SNAPSHOT_ORDER}) AS dated_otherwise
        """  # noqa: S608  # as above
    behind = _where([_BEHIND_SNAPSHOT] if narrowing.after is not None else [])
    rows = f"SELECT * FROM ({rows}) AS found {behind} ORDER BY {_SNAPSHOT_ORDER} LIMIT :limit"  # noqa: S608  # as above
    return Listing(SNAPSHOT_COLUMNS, _SNAPSHOT_ORDER, SNAPSHOT_KEYS, rows, narrowing.values())


_ONE_PORTFOLIO = "SELECT CAST(:portfolio_id AS bigint)"
# Its last row is null, which is also the number of the portfolio that has none.
_ALL = """
    SELECT min(portfolio_id) FROM portfolio_history
    UNION ALL
    SELECT (SELECT min(portfolio_id) FROM portfolio_history WHERE portfolio_id > portfolios.portfolio_id)
    FROM portfolios WHERE portfolio_id IS NOT NULL
"""


def _last(of: str, conditions: list[str]) -> str:
    """The newest snapshot of the portfolio of the relation `of`."""
    # Two ways, as an index has no IS NOT DISTINCT FROM.
    numbered, without = (
        f"""
        (SELECT {quoted(SNAPSHOT_COLUMNS)}, xmin FROM portfolio_history {_where([*which, *conditions])}
        ORDER BY portfolio_id, {_SNAPSHOT_ORDER} LIMIT 1)
        """  # noqa: S608  # from the constants here; values are parameters
        for which in (
            [f"portfolio_history.{_of_portfolio(f'{of}.portfolio_id')}"],
            [f"{of}.portfolio_id IS NULL", "portfolio_history.portfolio_id IS NULL"],
        )
    )
    return f"{numbered} UNION ALL {without}"


def archives(narrowing: Narrowing) -> Listing:
    """Signal archives, newest first by archived_at."""
    rows = f"""
        SELECT *, xmin FROM signal_archives {_where(_of_archives(narrowing, "<"))}
        ORDER BY {narrowing.order(_ARCHIVE_ORDER)} LIMIT :limit
    """  # noqa: S608  # from the constants here; values are parameters
    return Listing(ARCHIVE_COLUMNS, _ARCHIVE_ORDER, ARCHIVE_KEYS, rows, narrowing.values(), document="signals_data")


def _of_archives(narrowing: Narrowing, behind: str, key: str = "id") -> list[str]:
    conditions = narrowing.conditions("archived_at")
    if narrowing.after is not None:
        conditions.append(f"(archived_at, id) {behind} (:after_archived_at, :after_{key})")
    return conditions


def market_signals(market_id: str, narrowing: Narrowing) -> Listing:
    """Every archived signal of one market, newest first by archived_at, then in the order of its archive."""
    spellings = _spellings(market_id)
    given = [f"CAST(:market_{n} AS jsonb)" for n in range(len(spellings))]
    has_market = " OR ".join(f"{_MARKETS} @> jsonb_build_array({one})" for one in given)
    signal_conditions = [f"signal -> 'market_id' IN ({', '.join(given)})"]
    if narrowing.after is not None:  # of the same archive only what stands further on
        signal_conditions.append(
            "((archived_at, id) < (:after_archived_at, :after_archive_id) OR place > :after_position)"
        )
    rows = f"""
        SELECT id AS archive_id, portfolio_id, archived_at, place AS position, signal, version AS xmin
        FROM (
            SELECT *, xmin AS version FROM signal_archives
            {_where([f"({has_market})", *_of_archives(narrowing, "<=", "archive_id")])}
            ORDER BY {_ARCHIVE_ORDER} LIMIT coalesce(:limit, {_NO_LIMIT}) + 1
        ) AS archives CROSS JOIN LATERAL jsonb_array_elements(signals_data) WITH ORDINALITY AS one (signal, place)
        {_where(signal_conditions)}
        ORDER BY {_SIGNAL_ORDER} LIMIT :limit
    """  # noqa: S608  # from the constants here; values are parameters
    values = narrowing.values() | {f"market_{n}": spelling for n, spelling in enumerate(spellings)}
    return Listing(SIGNAL_COLUMNS, _SIGNAL_ORDER, SIGNAL_KEYS, rows, values, document="signal")


def _spellings(market_id: str) -> list[str]:
    """As JSON: the text, and the number if somebody wrote it as one."""
    number = re.fullmatch("0|[1-9][0-9]{0,99}", market_id)
    return [json.dumps(market_id), *([market_id] if number else [])]


def _where(conditions: list[str]) -> str:
    return "WHERE " + " AND ".join(conditions) if conditions else ""
