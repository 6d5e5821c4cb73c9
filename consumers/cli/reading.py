"""The commands that read the tables: `history`, `archives` and `performance`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from consumers.cli.options import AsJson, OfPortfolio, Since, Until, date_option, row_number
from consumers.embedded.stack import stack
from consumers.ops.checks import counted
from consumers.terminal import (
    print_archives,
    print_csv,
    print_exact_json,
    print_json,
    print_ndjson,
    print_snapshots,
    print_text,
)

if TYPE_CHECKING:
    from consumers.operations import ExactRows

_NEWEST = 20

Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        "-n",
        parser=row_number,
        metavar="NUMBER",
        help="Maximum number of rows, newest first; 20 by default, all with --csv, --ndjson and --parquet.",
    ),
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print all rows as CSV.")]
AsNdjson = Annotated[
    bool, typer.Option("--ndjson", help="Print all rows, each as a JSON object on a line, with amounts as strings.")
]
Parquet = Annotated[
    Path | None,
    typer.Option(
        "--parquet", metavar="FILE", help="Write all rows to a Parquet file, which is replaced when it is complete."
    ),
]


def history(
    *,
    limit: Limit = None,
    portfolio_id: OfPortfolio = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_ndjson: AsNdjson = False,
    parquet: Parquet = None,
) -> None:
    """Show portfolio snapshots, newest first.

    Example: trading-history history --portfolio-id 1 --since 2026-06-01 --limit 50
    """
    write = _writer(as_json=as_json, as_csv=as_csv, as_ndjson=as_ndjson, parquet=parquet)
    from consumers.operations import get_portfolio_history, stream_portfolio_history

    with stack(database=True):
        if write is not None:
            number = limit or (_NEWEST if as_json else None)
            with stream_portfolio_history(number, portfolio_id=portfolio_id, since=since, until=until) as exact:
                write(exact)
            return
        rows = get_portfolio_history(limit or _NEWEST, portfolio_id=portfolio_id, since=since, until=until)
    print_snapshots(rows)


def archives(
    *,
    limit: Limit = None,
    portfolio_id: OfPortfolio = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_ndjson: AsNdjson = False,
    parquet: Parquet = None,
) -> None:
    """Show signal archives, newest first.

    Example: trading-history archives --since 2026-06-01 --json
    """
    write = _writer(as_json=as_json, as_csv=as_csv, as_ndjson=as_ndjson, parquet=parquet)
    from consumers.operations import get_recent_signal_archives, stream_signal_archives

    with stack(database=True):
        if write is not None:
            number = limit or (_NEWEST if as_json else None)
            with stream_signal_archives(number, portfolio_id=portfolio_id, since=since, until=until) as exact:
                write(exact)
            return
        rows = get_recent_signal_archives(limit or _NEWEST, portfolio_id=portfolio_id, since=since, until=until)
    print_archives(rows)


def performance(
    *,
    portfolio_id: OfPortfolio = None,
    since: Annotated[
        date | None,
        typer.Option(parser=date_option, metavar="DATE", help="Only daily closes from this date on, such as 7d."),
    ] = None,
    until: Annotated[
        date | None, typer.Option(parser=date_option, metavar="DATE", help="Only daily closes before this date.")
    ] = None,
    measure: Annotated[
        Literal["value", "equity"] | None,
        typer.Option(help="Measure of the worth; by default chosen from the portfolio's rows."),
    ] = None,
    risk_free_rate: Annotated[float, typer.Option(metavar="RATE", help="Risk-free rate of a year; 0.02 is 2 %.")] = 0.0,
    days_of_a_year: Annotated[
        float, typer.Option(metavar="NUMBER", help="Number of daily closes that a year has; about 252 for an exchange.")
    ] = 365,
    as_json: AsJson = False,
) -> None:
    """Show returns, ratios and drawdowns of each portfolio, computed from its daily closes and free of deposits.

    Example: trading-history performance --portfolio-id 1 --since 2026-01-01 --risk-free-rate 0.02
    """
    from consumers.cli.performance_tables import print_performances
    from consumers.operations import get_performance

    with stack(database=True):
        try:
            found = get_performance(
                portfolio_id,
                since=since,
                until=until,
                measure=measure,
                risk_free_rate=risk_free_rate,
                days_of_a_year=days_of_a_year,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    (print_json if as_json else print_performances)(found)


def _writer(
    *, as_json: bool, as_csv: bool, as_ndjson: bool, parquet: Path | None
) -> Callable[[ExactRows], object] | None:
    """Return the function that writes the rows in the wanted format; None for a table on the terminal.

    Raises:
        ModuleNotFoundError: pyarrow is not installed, and a Parquet file is wanted.
    """
    wanted = {"--json": as_json, "--csv": as_csv, "--ndjson": as_ndjson, "--parquet": parquet is not None}
    given = [name for name, is_given in wanted.items() if is_given]
    if len(given) > 1:
        raise typer.BadParameter(f"give only one of {', '.join(given)}", param_hint=given[1])
    if parquet is not None:
        from consumers.parquet_files import write_parquet

        return lambda exact: _print_written(parquet, write_parquet(parquet, exact.columns, exact.rows))
    if as_csv:
        return lambda exact: print_csv(exact.columns, exact.rows)
    if as_ndjson:
        return lambda exact: print_ndjson(*exact)
    return (lambda exact: print_exact_json(*exact)) if as_json else None


def _print_written(file: Path, number: int) -> None:
    print_text(f"{counted(number, 'row')} in {file}")
