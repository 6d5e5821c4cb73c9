"""Options that several commands share, and their progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated
from zoneinfo import ZoneInfo

import typer

from producers.times import zone_named


def _zone(name: str) -> ZoneInfo:
    try:
        return zone_named(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfPortfolio = Annotated[int | None, typer.Option("--portfolio-id", help="Only of this portfolio.")]
Since = Annotated[datetime | None, typer.Option(help="From this time on (local unless it has an offset).")]
Until = Annotated[datetime | None, typer.Option(help="Before this time (local unless it has an offset).")]
Timezone = Annotated[
    ZoneInfo | None,
    typer.Option(parser=_zone, metavar="NAME", help="The files' zone; HISTORY_TIMEZONE or the machine's by default."),
]


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A function to call with what is done and all; it shows a bar on a terminal and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
