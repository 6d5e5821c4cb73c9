"""Options, the progress bar and the name of the account, which several commands share."""

from __future__ import annotations

import getpass
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Annotated
from zoneinfo import ZoneInfo

import typer
from pydantic import TypeAdapter, ValidationError

from producers.errors import InvalidEvent
from producers.fields import LARGEST_BIGINT, NUMBER, SMALLEST_BIGINT
from producers.settings import ZoneSettings
from producers.times import localized, wall_clock, zone_named


def _zone(name: str) -> ZoneInfo:
    try:
        return zone_named(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


_MOMENT = TypeAdapter(datetime)
_AGO = re.compile(r"([0-9]{1,7})([mhdw])")
_DAYS_AGO = {"today": 0, "yesterday": 1}
_DAYS = {"d": 1, "w": 7}
_MINUTES = {"m": 1, "h": 60}


def read_time(text: str, zone: tzinfo | None, *, now: datetime | None = None) -> datetime:
    """Read a time: RFC 3339, with or without an offset, or relative to `now` (an aware time, by default the present).

    `30m` and `2h` are that long ago. `7d` and `2w` are the same time of the day in `zone` (None: this machine's zone),
    that many days or weeks ago. `today` and `yesterday` are the beginning of that day in `zone`. A time without offset
    stays without one, since not every caller takes it to be in the same zone.

    Raises:
        ValueError: the text has none of these forms; the message gives examples.
    """
    now = now or datetime.now(UTC)
    word = text.strip().casefold()
    try:
        if word in _DAYS_AGO:
            day = wall_clock(now, zone).date() - timedelta(days=_DAYS_AGO[word])
            return localized(datetime.combine(day, time()), zone, "")
        if ago := _AGO.fullmatch(word):
            number, unit = int(ago[1]), ago[2]
            if unit in _DAYS:
                return localized(wall_clock(now, zone) - timedelta(days=number * _DAYS[unit]), zone, "")
            return now - timedelta(minutes=number * _MINUTES[unit])
        if not NUMBER.fullmatch(word):  # Pydantic would take it for seconds since 1970
            return _MOMENT.validate_python(text)
    except (InvalidEvent, OverflowError, ValidationError):
        pass
    raise ValueError(
        f"{text} is not a time: write for example 2026-11-22T17:00, 2026-11-22T17:00+01:00, 7d, 2h, 30m, today or"
        " yesterday"
    )


def time_option(text: str) -> datetime:
    """Read the value of an option that is a time; the `parser` of such options. The zone is HISTORY_TIMEZONE."""
    return time_in_zone(text, ZoneSettings.from_environment().timezone)


def time_in_zone(text: str, zone: tzinfo | None, option: str | None = None) -> datetime:
    """Read a time for `option`, relative to the present in `zone`; see `read_time`."""
    try:
        return read_time(text, zone)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def read_date(text: str, today: date) -> date:
    """Read a date: ISO 8601, or relative to `today`: `7d` and `2w` ago, `today`, `yesterday`.

    Raises:
        ValueError: the text has none of these forms; the message gives examples.
    """
    word = text.strip().casefold()
    try:
        if word in _DAYS_AGO:
            return today - timedelta(days=_DAYS_AGO[word])
        if (ago := _AGO.fullmatch(word)) and ago[2] in _DAYS:
            return today - timedelta(days=int(ago[1]) * _DAYS[ago[2]])
        return date.fromisoformat(text)
    except (OverflowError, ValueError):
        raise ValueError(f"{text} is not a date: write for example 2026-11-22, 7d, 2w, today or yesterday") from None


def date_option(text: object) -> date:
    """Read the value of an option that is a date; the `parser` of such options. The zone is HISTORY_TIMEZONE."""
    try:
        return read_date(str(text), wall_clock(datetime.now(UTC), ZoneSettings.from_environment().timezone).date())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


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
        help="Only rows from this time on, such as 2026-11-22T17:00, 7d or yesterday, in HISTORY_TIMEZONE.",
    ),
]
Until = Annotated[
    datetime | None,
    typer.Option(
        parser=time_option,
        metavar="TIME",
        help="Only rows before this time, such as 2026-11-22T17:00, 2h or today, in HISTORY_TIMEZONE.",
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


def account_name() -> str:
    """Return the name of the account that runs this command."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # pragma: no cover - in a container, the user may have no name
        return f"uid {os.getuid()}"
