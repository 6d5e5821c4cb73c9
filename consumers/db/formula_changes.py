"""Compare the formulas of total_value in the imported and the recorded snapshots of a portfolio.

After the switch from an old controller, recorded rows may follow another formula than imported ones. The curve of
total_value then has a step that no trade caused.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sqlalchemy import Connection

from consumers.db.measures import FITS, FORMULAS, OLD_FORMULA, Formula
from consumers.db.portfolio_queries import MOST_PORTFOLIOS, for_one_portfolio
from producers.events import IMPORT_PREFIX

MOST_ROWS = 1_000
MOST_DATES = 1_000
# A formula is followed if it fits 95 % of the rows that decide. The others may be corrected by hand, or be from a time
# before another formula. Below that, several formulas are mixed, and no advice would be right for all rows.
CONVINCING_PERCENT = 95

_EQUITY: Formula = "balance + total_invested + total_profit_loss"
_NEWEST = 'portfolio_id, snapshot_date DESC, "timestamp" DESC, id DESC'
_IMPORTED = f"starts_with(source, '{IMPORT_PREFIX}')"
_FIT_COLUMNS = ", ".join(FITS.values())
# From the newest date to older ones, one close per date, until there is a close of both kinds. Then the rows from these
# two closes on to older ones. Each step is a search in the index portfolio_history_newest_of_portfolio.
_PATTERNS = f"""
    WITH RECURSIVE closes AS (
        (SELECT 1 AS number, snapshot_date, "timestamp", id, {_IMPORTED} AS imported,
            {_IMPORTED} AS imported_found, NOT {_IMPORTED} AS recorded_found
        FROM portfolio_history WHERE {{of}} ORDER BY {_NEWEST} LIMIT 1)
        UNION ALL
        SELECT number + 1, close.*, imported_found OR close.imported, recorded_found OR NOT close.imported
        FROM closes CROSS JOIN LATERAL (
            SELECT snapshot_date, "timestamp", id, {_IMPORTED} AS imported FROM portfolio_history
            WHERE {{of}} AND snapshot_date < closes.snapshot_date ORDER BY {_NEWEST} LIMIT 1) AS close
        WHERE number < :most_dates AND NOT (imported_found AND recorded_found)
    ),
    starts AS (SELECT DISTINCT ON (imported) snapshot_date, "timestamp", id FROM closes ORDER BY imported, number),
    found AS (
        SELECT DISTINCT ON (row.id) row.* FROM starts CROSS JOIN LATERAL (
            SELECT id, source, balance, total_invested, total_profit_loss, total_value FROM portfolio_history
            WHERE {{of}} AND (snapshot_date, "timestamp", id) <= (starts.snapshot_date, starts."timestamp", starts.id)
            ORDER BY {_NEWEST} LIMIT :most_rows) AS row
    )
    SELECT {_IMPORTED}, count(*), {_FIT_COLUMNS} FROM found GROUP BY {_IMPORTED}, {_FIT_COLUMNS}
"""  # noqa: S608  # from the constants here; values are parameters


class Fits(NamedTuple):
    """Number of rows by the formulas that fit them."""

    rows: Mapping[frozenset[Formula], int]

    @property
    def read(self) -> int:
        return sum(self.rows.values())

    @property
    def deciding(self) -> int:
        """Number of rows without those that fit every formula: nothing is invested there, and nothing gained."""
        return self.read - self.rows.get(frozenset(FORMULAS), 0)

    def fitting(self, formula: Formula) -> int:
        """Return the number of deciding rows that fit the formula."""
        return sum(count for fitting, count in self.rows.items() if formula in fitting and len(fitting) < len(FORMULAS))

    @property
    def followed(self) -> list[Formula]:
        """Formulas that fit 95 % of the deciding rows, except one that loses against another.

        It loses if, of the rows that fit only one of the two, the other one fits 95 %. Without such rows both stay.
        """
        convincing = [one for one in FORMULAS if _convinces(self.fitting(one), self.deciding)]
        return [one for one in convincing if not any(self._loses(one, other) for other in convincing)]

    def _loses(self, one: Formula, other: Formula) -> bool:
        alone, against = (
            sum(count for fitting, count in self.rows.items() if this in fitting and that not in fitting)
            for this, that in ((one, other), (other, one))
        )
        return _convinces(against, alone + against)

    def described(self, kind: str) -> str:
        """Return the share of the formulas that are followed, such as `3 of 3 recorded rows (100 %) are …`."""
        fitting, undecided = self.fitting(self.followed[0]), self.read - self.deciding
        share = f"{fitting:,} of {self.deciding:,} {kind} rows ({100 * fitting // self.deciding} %)"
        more = f" ({undecided:,} more fit every formula)" if undecided else ""
        return f"{share} are {' or '.join(self.followed)}{more}"


class PortfolioFormulas(NamedTuple):
    """Rows of a portfolio that were compared: imported ones, and those that a controller recorded."""

    portfolio: int | None
    imported: Fits
    recorded: Fits

    @property
    def whose(self) -> str:
        return "rows without a portfolio" if self.portfolio is None else f"portfolio {self.portfolio}"

    @property
    def has_both(self) -> bool:
        return bool(self.imported.read and self.recorded.read)

    @property
    def changed(self) -> bool:
        """Whether imported rows follow one formula and recorded rows another."""
        imported, recorded = self.imported.followed, self.recorded.followed
        return bool(imported and recorded) and set(imported).isdisjoint(recorded)

    @property
    def found(self) -> str:
        """Describe the change, with the numbers of rows that were counted."""
        return (
            f"{self.whose}: {self.imported.described('imported')}, {self.recorded.described('recorded')};"
            f" read: {self.imported.read:,} imported and {self.recorded.read:,} recorded rows"
        )

    @property
    def advice(self) -> str:
        """Say what the controller passes as total_value to continue the imported values."""
        followed = self.imported.followed
        formula = _EQUITY if _EQUITY in followed else followed[0]
        passed = f"total_value={' + '.join(_argument(name) for name in formula.split(' + '))}"
        if formula == OLD_FORMULA:
            return (
                f"to continue the imported values, leave total_value out or pass {passed}; both leave out invested"
                " money, which the measure equity has in all rows: choose it on the page and for performance, and"
                " rewrite nothing"
            )
        equity = "; the measure equity has this formula in all rows" if formula == _EQUITY else ""
        return f"to continue the imported values, pass {passed}{equity}; rewrite no row that is recorded already"


def compare_formulas(
    db: Connection, portfolios: Iterable[int | None], most_seconds: float
) -> tuple[list[PortfolioFormulas], int]:
    """Return the formulas of the first 200 portfolios, as far as the time allows, and the number of the others.

    For each, at most 1,000 rows are read from its newest imported close on to older rows, and as many from its newest
    recorded close. These two closes are looked for in its newest 1,000 dates. The rest of the transaction is planned
    without bitmap scans and sorts, if possible.
    """
    # Without statistics, as after an import, PostgreSQL would read and sort all rows of a portfolio.
    db.exec_driver_sql("SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off; SET LOCAL enable_seqscan = off")
    compared: list[PortfolioFormulas] = []
    wanted = list(portfolios)
    until = time.monotonic() + most_seconds
    for portfolio in wanted[: MOST_PORTFOLIOS + 1]:
        if time.monotonic() > until:
            break
        compared.append(_formulas(db, portfolio))
    return compared, len(wanted) - len(compared)


def _formulas(db: Connection, portfolio: int | None) -> PortfolioFormulas:
    imported: Counter[frozenset[Formula]] = Counter()
    recorded: Counter[frozenset[Formula]] = Counter()
    values = {"portfolio_id": portfolio, "most_dates": MOST_DATES, "most_rows": MOST_ROWS}
    for is_imported, count, *fits in db.execute(for_one_portfolio(portfolio, _PATTERNS), values):
        fitting = frozenset(formula for formula, fit in zip(FORMULAS, fits, strict=True) if fit)
        (imported if is_imported else recorded)[fitting] += count
    return PortfolioFormulas(portfolio, Fits(imported), Fits(recorded))


def _convinces(fitting: int, deciding: int) -> bool:
    return deciding > 0 and 100 * fitting >= CONVINCING_PERCENT * deciding


def _argument(name: str) -> str:
    return f'portfolio["{name}"]'
