"""Options that select rejected events, for the commands `trading-history failed`."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from consumers.cli.options import row_number, time_option

if TYPE_CHECKING:
    from consumers.ops.rejections import Selection

KindOption = Annotated[
    str | None,
    typer.Option("--kind", help="Only events of this kind: snapshot or archive; - for events of unknown kind."),
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--source",
        help="Only events of this source, such as bot, bot/4e1f or import; - for events of unknown source.",
    ),
]
ReasonOption = Annotated[
    str | None,
    typer.Option("--reason", metavar="TEXT", help="Only events whose reason, or that of their group, has this part."),
]
SinceOption = Annotated[
    datetime | None,
    typer.Option(
        "--since",
        parser=time_option,
        metavar="TIME",
        help="Only events rejected from this time on, such as 2026-11-22T17:00, 7d or yesterday.",
    ),
]
UntilOption = Annotated[
    datetime | None,
    typer.Option(
        "--until",
        parser=time_option,
        metavar="TIME",
        help="Only events rejected before this time, such as 2026-11-22T17:00, 2h or today.",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit", "-n", parser=row_number, metavar="NUMBER", help="At most this number of events, the oldest ones."
    ),
]


class Filters(NamedTuple):
    """Values of the options that select events."""

    reason: str | None
    source: str | None
    kind: str | None
    since: datetime | None
    until: datetime | None
    limit: int | None


def selection_of(filters: Filters) -> Selection:
    """Return the selection of these options, perhaps an empty one. Raises BadParameter if a value is wrong."""
    from consumers.ops.rejections import Selection
    from producers.settings import ZoneSettings
    from producers.times import localized

    _check_kind(filters.kind)
    _check_text("--reason", filters.reason)
    _check_text("--source", filters.source)
    zone = ZoneSettings.from_environment().timezone
    selection = Selection(
        kind=filters.kind,
        source=filters.source,
        reason=filters.reason,
        since=filters.since and localized(filters.since, zone, "--since"),
        until=filters.until and localized(filters.until, zone, "--until"),
        limit=filters.limit,
    )
    try:
        selection.values()
    except OverflowError:
        raise typer.BadParameter("is before the year 1 or after 9999 in UTC", param_hint="--since or --until") from None
    return selection


def selection_to_change(name: str | None, filters: Filters, *, every: bool) -> Selection:
    """Return the selection of a command that changes events: `every` says that --all was given.

    Raises BadParameter if a value is wrong, if name, options and --all contradict each other, or if nothing was given.
    """
    from consumers.ops.rejections import Selection

    selection = selection_of(filters)
    if name is None and selection.is_empty and not every:
        choices = "select some with --reason, --source, --kind, --since, --until or --limit, or all with --all"
        raise typer.BadParameter(f"give a job id or event id, {choices}", param_hint="NAME")
    if name is not None and (every or not selection.is_empty):
        raise typer.BadParameter("give either a job id or event id, or options that select events", param_hint="NAME")
    if every and not selection.is_empty:
        raise typer.BadParameter("cannot be used with options that select events", param_hint="--all")
    return selection if name is None else Selection(name=name)


def _check_kind(kind: str | None) -> None:
    from consumers.ops.rejections import NONE
    from producers.events import KINDS

    kinds = [known.name for known in KINDS.values()]
    if kind is not None and kind not in (*kinds, NONE):
        raise typer.BadParameter(f"must be one of {', '.join(kinds)}, or - for an unknown kind", param_hint="--kind")


def _check_text(option: str, text: str | None) -> None:
    if text is not None and not text.strip():
        raise typer.BadParameter("must not be empty", param_hint=option)
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise typer.BadParameter("must be UTF-8", param_hint=option)
