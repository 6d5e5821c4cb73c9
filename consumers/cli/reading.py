"""Commands that read the tables: `history`, `archives`, `audit`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer

from consumers.cli.options import AsJson, OfPortfolio, Since, Until
from consumers.embedded.stack import stack
from consumers.terminal import print_archives, print_audit, print_csv, print_json, print_snapshots

_NEWEST = 20

Limit = Annotated[
    int | None, typer.Option("--limit", "-n", min=1, help="At most so many, the newest; 20 unless --csv.")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV: all rows, amounts exact, times with offset.")]


def history(
    *,
    limit: Limit = None,
    portfolio_id: OfPortfolio = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show the newest portfolio snapshots."""
    from consumers.operations import get_portfolio_history, stream_portfolio_history

    _one_format(as_json, as_csv)
    with stack(database=True):
        if as_csv:
            with stream_portfolio_history(limit, portfolio_id=portfolio_id, since=since, until=until) as exact:
                print_csv(exact.columns, exact.rows)
            return
        rows = get_portfolio_history(limit or _NEWEST, portfolio_id=portfolio_id, since=since, until=until)
    (print_json if as_json else print_snapshots)(rows)


def archives(
    *,
    limit: Limit = None,
    portfolio_id: OfPortfolio = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show the newest signal archives."""
    from consumers.operations import get_recent_signal_archives, stream_signal_archives

    _one_format(as_json, as_csv)
    with stack(database=True):
        if as_csv:
            with stream_signal_archives(limit, portfolio_id=portfolio_id, since=since, until=until) as exact:
                print_csv(exact.columns, exact.rows)
            return
        rows = get_recent_signal_archives(limit or _NEWEST, portfolio_id=portfolio_id, since=since, until=until)
    (print_json if as_json else print_archives)(rows)


def audit(
    *,
    since: Annotated[
        datetime | None,
        typer.Option(help="Prove only what was recorded from this time on (local unless it has an offset)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Account for every number of every source; exit status 1 if one is missing."""
    from consumers.ops.audit import audit as account
    from producers.outbox import Outbox
    from producers.settings import TransportSettings, ZoneSettings
    from producers.times import localized

    if since is not None:
        since = localized(since, ZoneSettings.from_environment().timezone, "--since")
    with stack(database=True):
        settings = TransportSettings.from_environment()
        redis = None if settings.redis_url is None else settings.redis()
        with Outbox(settings.outbox) if settings.outbox.is_file() else nullcontext() as outbox:
            audits = account(redis, outbox, settings.queue, since=since)
    (print_json if as_json else print_audit)([asdict(one) for one in audits])
    raise typer.Exit(0 if all(one.complete for one in audits) else 1)


def _one_format(as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise typer.BadParameter("print JSON or CSV, not both", param_hint="--csv")
