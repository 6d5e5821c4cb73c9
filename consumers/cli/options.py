"""Options and the progress bar that several commands share."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from typing import Annotated
from zoneinfo import ZoneInfo

import typer
from pydantic import TypeAdapter, ValidationError

from producers.errors import HistoryError
from producers.fields import LARGEST_BIGINT, SMALLEST_BIGINT
from producers.times import zone_named


def _zone(name: str) -> ZoneInfo:
    try:
        return zone_named(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


_MOMENT = TypeAdapter(datetime)


def time_option(text: str) -> datetime:
    """Read the value of an option that is a time, with or without an offset; the `parser` of such options."""
    try:
        return _MOMENT.validate_python(text)
    except ValidationError:
        raise typer.BadParameter(f"{text} is not a time such as 2026-11-22T17:00 or 2026-11-22T17:00+01:00") from None


def date_option(text: object) -> date:
    """Read the value of an option that is a date; the `parser` of such options."""
    try:
        return date.fromisoformat(str(text))
    except ValueError:
        raise typer.BadParameter(f"{text} is not a date such as 2026-11-22") from None


def _whole_number(smallest: int) -> Callable[[object], int]:
    """Return the `parser` of options that are whole numbers, at most the largest one that the database has."""

    def parse(text: object) -> int:
        try:
            number = int(str(text))
        except ValueError:
            number = smallest - 1
        if not smallest <= number <= LARGEST_BIGINT:
            raise typer.BadParameter(f"must be a whole number from {smallest} to {LARGEST_BIGINT}")
        return number

    return parse


portfolio_number = _whole_number(SMALLEST_BIGINT)
row_number = _whole_number(1)


def seconds_option(text: object) -> float:
    """Read the value of an option that is a limit of time in seconds; the `parser` of such options."""
    try:
        seconds = float(str(text))
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise typer.BadParameter("must be a finite number of seconds, at least 0")
    return seconds


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfPortfolio = Annotated[
    int | None,
    typer.Option("--portfolio-id", parser=portfolio_number, metavar="NUMBER", help="Only rows of this portfolio."),
]
Since = Annotated[
    datetime | None,
    typer.Option(
        parser=time_option,
        metavar="TIME",
        help="Only rows from this time on; a time without offset is in HISTORY_TIMEZONE.",
    ),
]
Until = Annotated[
    datetime | None,
    typer.Option(
        parser=time_option,
        metavar="TIME",
        help="Only rows before this time; a time without offset is in HISTORY_TIMEZONE.",
    ),
]
Timezone = Annotated[
    ZoneInfo | None,
    typer.Option(
        parser=_zone,
        metavar="NAME",
        help="Time zone of times without offset; by default HISTORY_TIMEZONE, else the machine's zone.",
    ),
]


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes the numbers of done and of all steps. It shows a bar on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def usual_or_free_port(what: str, port: int, host: str = "127.0.0.1") -> socket.socket:
    """Return a socket that listens at this port. If the port is taken, use any free one and say so on stderr."""
    from consumers.web.listening import listen

    try:
        return listen(host, port)
    except HistoryError as error:
        print(f"{what} uses another port this time: {error}", file=sys.stderr)
        return listen(host, 0)
