"""Options that several commands share."""

from __future__ import annotations

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
