"""Filters and queries, with which every reader selects rows: newest first, one page after another.

A page begins behind the keys of the last row of the page before it, not at a count of rows: that a page is far down, or
that rows came in meanwhile, changes neither its cost nor its contents.
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
    """At most `limit` rows, of one portfolio, from `since` to before `until` (aware), behind the row `after`."""

    limit: int | None = None
    portfolio_id: int | None = None
    since: datetime | None = None
    until: datetime | None = None
    after: Mapping[str, Any] | None = None

    def values(self) -> dict[str, Any]:
        """Parameters of a query's statement."""
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
            of_portfolio(":portfolio_id"): self.portfolio_id,
            f"{instant} >= :since": self.since,
            f"{instant} < :until": self.until,
        }
        return [condition for condition, value in asked.items() if value is not None]

    def order(self, newest: str) -> str:
        """The order in which an index finds these rows `newest` first."""
        return newest if self.portfolio_id is None else f"portfolio_id, {newest}"


@dataclass(frozen=True)
class Query:
    """The SQL that finds the rows of a filter.

    `rows` is a SELECT that gives `columns` and `xmin`, the version of the row. `keys` are the columns that say where a
    row stands in `order`, as `Filter.after` wants them; `document` is the JSONB column, of any size.
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


def of_portfolio(portfolio_id: str) -> str:
    """The condition for rows of a portfolio, not null."""
    # With = PostgreSQL may prefer to go through the newest rows of all portfolios, until it meets one that has been at
    # rest for years. With this, and the portfolio in the order, only the index by portfolio will do.
    return f"portfolio_id = ANY (ARRAY[CAST({portfolio_id} AS bigint)])"


def where(conditions: list[str]) -> str:
    return "WHERE " + " AND ".join(conditions) if conditions else ""


def guessed_bytes(document: str) -> str:
    """An expression for about how many bytes of text a JSONB column is, without unpacking it."""
    return f"(CASE WHEN pg_column_compression({document}) IS NULL THEN 1 ELSE 16 END * pg_column_size({document}))"


def quoted(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)
