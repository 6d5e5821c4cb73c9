"""Filters and queries of all readers: rows newest first, in pages.

A page begins behind the keys of the last row of the previous page, not at an offset. Its cost does not grow with the
depth of the page, and its contents do not change when rows are inserted meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import TextClause, text

NO_LIMIT = 2**62


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Rows to select: at most `limit`, of one portfolio, from `since` to before `until`, behind the row `after`.

    The times are aware. `after` has the keys of a row, see `Query.keys`.
    """

    limit: int | None = None
    portfolio_id: int | None = None
    since: datetime | None = None
    until: datetime | None = None
    after: Mapping[str, Any] | None = None

    def values(self) -> dict[str, Any]:
        """Return the parameters of a query's statement."""
        behind = {f"after_{name}": value for name, value in (self.after or {}).items()}
        return behind | {
            "limit": self.limit,
            "portfolio_id": self.portfolio_id,
            "since": self.since and self.since.astimezone(UTC),
            "until": self.until and self.until.astimezone(UTC),
        }

    def conditions(self, instant: str) -> list[str]:
        """Return the SQL conditions, without that of `after`; `instant` is the column with the time of a row."""
        asked = {
            portfolio_condition(":portfolio_id"): self.portfolio_id,
            f"{instant} >= :since": self.since,
            f"{instant} < :until": self.until,
        }
        return [condition for condition, value in asked.items() if value is not None]

    def order(self, newest: str) -> str:
        """Return the ORDER BY in which an index has these rows; `newest` is the order without a portfolio."""
        return newest if self.portfolio_id is None else f"portfolio_id, {newest}"


@dataclass(frozen=True)
class Query:
    """SQL that selects the rows of a filter.

    `rows` is a SELECT of `columns` and of `xmin`, the version of the row. `keys` are the columns that define the place
    of a row in `order`, and the keys of `Filter.after`. `document` is the JSONB column, which may be large. `amounts`
    are the columns with money.
    """

    columns: tuple[str, ...]
    order: str
    keys: tuple[str, ...]
    rows: str
    values: Mapping[str, Any]
    document: str | None = None
    amounts: tuple[str, ...] = ()

    def statement(self) -> TextClause:
        """Return the statement for the rows with native values."""
        return text(f"SELECT {quoted(self.columns)} FROM ({self.rows}) AS page ORDER BY {self.order}")  # noqa: S608  # from constants

    def exact_statement(self) -> TextClause:
        """Return the same statement with the document as JSON text, which keeps every digit."""
        columns = (f'CAST("{one}" AS text) AS "{one}"' if one == self.document else f'"{one}"' for one in self.columns)
        return text(f"SELECT {', '.join(columns)} FROM ({self.rows}) AS page ORDER BY {self.order}")  # noqa: S608  # from constants


def portfolio_condition(portfolio_id: str) -> str:
    """Return the condition for the rows of a portfolio that is not null."""
    # With = PostgreSQL may scan the newest rows of all portfolios, which takes long if this portfolio has no row of the
    # last years. With ANY, and the portfolio in the order, it can use only the index by portfolio.
    return f"portfolio_id = ANY (ARRAY[CAST({portfolio_id} AS bigint)])"


def where(conditions: list[str]) -> str:
    """Return a WHERE clause with all conditions, or '' if there are none."""
    return "WHERE " + " AND ".join(conditions) if conditions else ""


def guessed_bytes(document: str) -> str:
    """Return an SQL expression that estimates the bytes of a JSONB column as text, without decompressing it."""
    return f"(CASE WHEN pg_column_compression({document}) IS NULL THEN 1 ELSE 16 END * pg_column_size({document}))"


def quoted(columns: Iterable[str]) -> str:
    """Return a list of quoted column names for a SELECT."""
    return ", ".join(f'"{column}"' for column in columns)
