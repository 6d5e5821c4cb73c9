"""`trading-history export`: the way back to the files of the old controller."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from consumers.cli.options import AsJson, Since, Timezone, Until, progress_bar
from consumers.embedded.stack import stack
from consumers.terminal import print_exported, print_json

_NO_NUMBER = "none"

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder for the files; made if it is missing.", file_okay=True)
]
Portfolios = Annotated[
    list[str] | None,
    typer.Option(
        "--portfolio-id",
        metavar="ID",
        help="Only of this portfolio; 'none' are rows without one. Given again, their rows become one history.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files that are there.")]


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
    """Write the history as the old controller's JSON files."""
    from consumers.legacy.exporter import Selection, export_history
    from producers.settings import ZoneSettings
    from producers.times import localized

    zone = timezone or ZoneSettings.from_environment().timezone

    def aware(moment: datetime | None, field: str) -> datetime | None:
        return None if moment is None else localized(moment, zone, field)

    selection = Selection(
        portfolio_ids=None if not portfolio_id else [_portfolio(one) for one in portfolio_id],
        since=aware(since, "since"),
        until=aware(until, "until"),
    )
    with stack(database=True), progress_bar() as on_progress:
        exported = export_history(directory, selection, zone=zone, overwrite=overwrite, on_progress=on_progress)
    facts = asdict(exported) | {"entries": sum(one.entries for one in exported.files)}
    if as_json:
        print_json(facts)
    else:
        print_exported(directory, facts)
    for note in _notes(facts):
        print(f"note: {note}", file=sys.stderr)


def _portfolio(name: str) -> int | None:
    try:
        return None if name == _NO_NUMBER else int(name)
    except ValueError:
        raise typer.BadParameter(f"must be an integer or '{_NO_NUMBER}'", param_hint="--portfolio-id") from None


def _notes(facts: dict[str, Any]) -> Iterator[str]:
    if ambiguous := sum(one["ambiguous"] for one in facts["files"]):
        yield (
            f"{ambiguous} entries are of the second of two equal hours, as the clock was set back:"
            " the format cannot tell, and an import takes them for the first"
        )
    if facts["untouched"]:
        yield f"not of this export, and left as they were: {', '.join(facts['untouched'])}"
    if facts["unfinished"]:
        yield f"left by exports that were killed, or still run: {', '.join(facts['unfinished'])}"
