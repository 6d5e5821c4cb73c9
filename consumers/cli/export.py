"""The command `trading-history export`: write the history as JSON files of the old controller."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from consumers.cli.options import AsJson, Timezone, portfolio_number, progress_bar, time_in_zone
from consumers.embedded.stack import stack
from consumers.terminal import print_exported, print_json

_NO_NUMBER = "none"

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder for the files; created if it does not exist.", file_okay=True)
]
Portfolios = Annotated[
    list[str] | None,
    typer.Option(
        "--portfolio-id",
        metavar="ID",
        help="Export only this portfolio, or 'none' for rows without one. If repeated, their rows are merged.",
    ),
]
# Read in the command, because --timezone is the zone of these times too.
Since = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Only rows from this time on, such as 2026-11-22T17:00, 7d or yesterday."),
]
Until = Annotated[
    str | None, typer.Option(metavar="TIME", help="Only rows before this time, such as 2026-11-22T17:00, 2h or today.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]


def export(
    directory: Directory,
    *,
    portfolio_id: Portfolios = None,
    since: Since = None,
    until: Until = None,
    timezone: Timezone = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the history as JSON files in the old controller's format.

    Example: trading-history export data/history --timezone Europe/Berlin --portfolio-id 1
    """
    from consumers.legacy.exporter import Selection, export_history
    from producers.settings import ZoneSettings
    from producers.times import localized

    zone = timezone or ZoneSettings.from_environment().timezone

    def aware(text: str | None, field: str) -> datetime | None:
        return None if text is None else localized(time_in_zone(text, zone, f"--{field}"), zone, field)

    selection = Selection(
        portfolio_ids=None if not portfolio_id else [_portfolio(one) for one in portfolio_id],
        since=aware(since, "since"),
        until=aware(until, "until"),
    )
    with stack(database=True), progress_bar() as on_progress:
        exported = export_history(directory, selection, zone=zone, overwrite=overwrite, on_progress=on_progress)
    values = asdict(exported) | {"entries": sum(one.entries for one in exported.files)}
    if as_json:
        print_json(values)
    else:
        print_exported(directory, values)
    for note in _notes(values):
        print(f"note: {note}", file=sys.stderr)


def _portfolio(name: str) -> int | None:
    try:
        return None if name == _NO_NUMBER else portfolio_number(name)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{error.message}, or '{_NO_NUMBER}'", param_hint="'--portfolio-id'") from None


def _notes(values: dict[str, Any]) -> Iterator[str]:
    if ambiguous := sum(one["ambiguous"] for one in values["files"]):
        yield (
            f"{ambiguous} entries are from an hour that the clock showed twice, and from its second time;"
            " the format has no offset, so an import reads them as the first time"
        )
    if values["untouched"]:
        yield f"left unchanged, because they are not part of this export: {', '.join(values['untouched'])}"
    if values["unfinished"]:
        yield f"temporary files of exports that were killed or are still running: {', '.join(values['unfinished'])}"
