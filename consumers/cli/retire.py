"""`trading-history retire`: old months out of the hot tables, and back."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated

import typer

from consumers.cli.options import AsJson
from consumers.cli.progress import progress_bar
from consumers.embedded.stack import stack
from consumers.terminal import print_json, print_months

Before = Annotated[str | None, typer.Option(metavar="YYYY-MM", help="Move the months before this one.")]
Undo = Annotated[bool, typer.Option("--undo", help="Move all retired rows back.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count what would be moved.")]


def retire(*, before: Before = None, undo: Undo = False, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Move old months into tables of their own, which the others show as theirs; may be ended, and run again."""
    from consumers.db import retention

    if undo == (before is not None):
        raise typer.BadParameter("name a month, or --undo", param_hint="--before")
    first = None if before is None else _month(before)
    with stack(database=True):
        if dry_run:
            rows = retention.count_movable(first)
        else:
            with progress_bar() as on_progress:
                rows = retention.bring_back(on_progress) if first is None else retention.retire(first, on_progress)
    (print_json if as_json else print_months)([row._asdict() for row in rows])


def _month(name: str) -> date:
    """Its first day. A later month than this one has nothing to retire yet, but would slow down live inserts."""
    try:
        month = date.fromisoformat(f"{name}-01")  # strptime would take 2026-1 too
    except ValueError:
        raise typer.BadParameter("must be a month such as 2026-01", param_hint="--before") from None
    if month > datetime.now(UTC).date():
        raise typer.BadParameter("must not be a month to come", param_hint="--before")
    return month
