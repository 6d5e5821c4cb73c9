"""Options that several commands share."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from zoneinfo import ZoneInfo

import typer


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise typer.BadParameter("is not a time zone of the IANA database, such as Europe/Berlin") from None


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfPortfolio = Annotated[int | None, typer.Option("--portfolio-id", help="Only of this portfolio.")]
Since = Annotated[datetime | None, typer.Option(help="From this time on (local unless it has an offset).")]
Until = Annotated[datetime | None, typer.Option(help="Before this time (local unless it has an offset).")]
Timezone = Annotated[
    ZoneInfo | None,
    typer.Option(parser=_zone, metavar="NAME", help="The files' zone; HISTORY_TIMEZONE or the machine's by default."),
]
