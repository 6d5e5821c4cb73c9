"""The commands `trading-history failed`: list, show, requeue and discard rejected events; and `withdraw`."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from consumers.cli.options import AsJson, progress_bar, row_number, time_option
from consumers.embedded.stack import stack
from consumers.ops.checks import counted
from consumers.terminal import (
    print_json,
    print_json_array,
    print_rejection_groups,
    print_rejections,
    print_text,
    print_values,
)
from producers.errors import HistoryError

if TYPE_CHECKING:
    from consumers.ops.failed import Selection

_STATEMENT_SECONDS = 20.0  # a lock is waited for at most 5 s

failed_app = typer.Typer(
    help="List, show, requeue and discard rejected events.\n\nExample: trading-history failed list",
    no_args_is_help=True,
)

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="Job id or event id.")]
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
All = Annotated[bool, typer.Option("--all", help="All rejected events; not with a name or options that select some.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, by group, but change nothing.")]


@failed_app.command("list")
def failed_list(
    *,
    reason: ReasonOption = None,
    source: SourceOption = None,
    kind: KindOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = None,
    each: Annotated[bool, typer.Option("--each", help="List each event, oldest first, instead of groups.")] = False,
    as_json: AsJson = False,
) -> None:
    """List rejected events, grouped by reason and source; exit status 1 if there are any.

    Example: trading-history failed list --since yesterday --source bot
    """
    from consumers.ops.failed import as_dict, rejection_groups, rejections

    selection = _selection(reason=reason, source=source, kind=kind, since=since, until=until, limit=limit)
    otherwise = "No event was rejected." if selection.is_empty else "No rejected event is selected."
    with stack(database=True):
        if each:
            chosen = map(as_dict, rejections(selection))
            count = print_json_array(chosen) if as_json else print_rejections(chosen, otherwise)
        else:
            groups = [asdict(group) for group in rejection_groups(selection)]
            count = len(groups)
            if as_json:
                print_json(groups)
            else:
                print_rejection_groups(groups, otherwise)
    raise typer.Exit(1 if count else 0)


@failed_app.command("show")
def failed_show(name: Annotated[str, typer.Argument(metavar="NAME", help="Job id or event id.")]) -> None:
    """Show a rejected event and its text as received; control characters are escaped.

    Example: trading-history failed show 7c1f366e-c9c3-5876-873e-6a33c29b098d
    """
    from consumers.ops.failed import Selection, as_dict, rejected_text, rejections

    found = False
    with stack(database=True):
        for rejection in rejections(Selection(name=name)):
            found = True
            print_values(as_dict(rejection))
            print_text(rejected_text(rejection.job_id) or "")
    if not found:
        raise _not_found(name)


@failed_app.command("requeue")
def failed_requeue(
    name: Name = None,
    *,
    reason: ReasonOption = None,
    source: SourceOption = None,
    kind: KindOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = None,
    every: All = False,
    dry_run: DryRun = False,
) -> None:
    """Requeue rejected events; an event that is then stored is no longer rejected.

    Example: trading-history failed requeue --reason "with other content" --dry-run
    """
    from consumers.ops.failed import rejections, requeue

    selection = _selection(
        name=name,
        reason=reason,
        source=source,
        kind=kind,
        since=since,
        until=until,
        limit=limit,
        every=every,
        required=True,
    )
    if dry_run:
        _print_plan(selection, "requeued")
        return
    with _action(selection) as (queue, total, on_progress):
        count = requeue(rejections(selection), *queue, on_progress=on_progress)
    _print_done(count, total, "requeued")


@failed_app.command("discard")
def failed_discard(
    name: Name = None,
    *,
    because: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Why the events may be discarded; recorded in event_outcomes. Required without --dry-run.",
        ),
    ] = None,
    actor: Annotated[
        str | None,
        typer.Option(help="Name of the person who discards them; by default the account that runs this command."),
    ] = None,
    reason: ReasonOption = None,
    source: SourceOption = None,
    kind: KindOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = None,
    every: All = False,
    dry_run: DryRun = False,
) -> None:
    """Discard rejected events; their text, the reason and the actor stay in event_outcomes.

    Example: trading-history failed discard 7c1f366e-c9c3-5876-873e-6a33c29b098d --because "test data"
    """
    from consumers.ops.failed import discard, rejections

    selection = _selection(
        name=name,
        reason=reason,
        source=source,
        kind=kind,
        since=since,
        until=until,
        limit=limit,
        every=every,
        required=True,
    )
    if dry_run:
        _print_plan(selection, "discarded")
        return
    if because is None or not because.strip():
        raise typer.BadParameter("say why the events may be discarded", param_hint="--because")
    named = name is not None  # options may select what somebody else has just requeued
    actor = actor or _account()
    with _action(selection) as (queue, total, on_progress):
        chosen = rejections(selection)
        count = discard(chosen, *queue, because, actor, even_waiting=named, on_progress=on_progress)
    _print_done(count, total, "discarded")


def _selection(
    *,
    name: str | None = None,
    reason: str | None,
    source: str | None,
    kind: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int | None,
    every: bool = False,
    required: bool = False,
) -> Selection:
    """Return the selection of the options. Raises BadParameter if they contradict each other, or select nothing."""
    from consumers.ops.failed import NONE, Selection
    from producers.events import KINDS
    from producers.settings import ZoneSettings
    from producers.times import localized

    kinds = [known.name for known in KINDS.values()]
    if kind is not None and kind not in (*kinds, NONE):
        raise typer.BadParameter(f"must be one of {', '.join(kinds)}, or - for an unknown kind", param_hint="--kind")
    for option, text in (("--reason", reason), ("--source", source)):
        if text is not None and not text.strip():
            raise typer.BadParameter("must not be empty", param_hint=option)
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise typer.BadParameter("must be UTF-8", param_hint=option)
    zone = ZoneSettings.from_environment().timezone
    selection = Selection(
        kind=kind,
        source=source,
        reason=reason,
        since=since and localized(since, zone, "--since"),
        until=until and localized(until, zone, "--until"),
        limit=limit,
    )
    try:
        selection.values()
    except OverflowError:
        raise typer.BadParameter("is before the year 1 or after 9999 in UTC", param_hint="--since or --until") from None
    if name is None and required and selection.is_empty and not every:
        choices = "select some with --reason, --source, --kind, --since, --until or --limit, or all with --all"
        raise typer.BadParameter(f"give a job id or event id, {choices}", param_hint="NAME")
    if name is not None and (every or not selection.is_empty):
        raise typer.BadParameter("give either a job id or event id, or options that select events", param_hint="NAME")
    if every and not selection.is_empty:
        raise typer.BadParameter("cannot be used with options that select events", param_hint="--all")
    return selection if name is None else Selection(name=name)


@contextmanager
def _action(selection: Selection) -> Iterator[tuple[tuple[Any, str], int, Callable[[int], object]]]:
    """Start the servers; yield Redis with the queue's name, the number of events, and a function for the progress.

    Raises:
        HistoryError: a job id or event id was given, and no rejection has it.
    """
    from consumers.ops.failed import count_rejections
    from producers.settings import TransportSettings

    with stack(database=True, redis=True):
        settings = TransportSettings.from_environment()
        total = count_rejections(selection)
        if not total and selection.name is not None:
            raise _not_found(selection.name)
        with progress_bar() as progress:
            yield (settings.redis(), settings.queue), total, lambda done: progress(done, total)


def _print_done(count: int, selected: int, done: str) -> None:
    left = selected - count
    print(f"{count:,} {done}{f'; {left:,} left: queued or rejected again, or no longer rejected' if left > 0 else ''}")


def _print_plan(selection: Selection, done: str) -> None:
    """Print the groups of the selection, and what would be done with them."""
    from consumers.ops.failed import rejection_groups

    with stack(database=True):
        groups = [asdict(group) for group in rejection_groups(selection)]
    if not groups and selection.name is not None:
        raise _not_found(selection.name)
    print_rejection_groups(groups, "No rejected event is selected.")
    count = sum(group["count"] for group in groups)
    print(f"At most {counted(count, 'event')} would be {done}; nothing was changed.")


def _not_found(name: str) -> HistoryError:
    return HistoryError(f"no rejection has the job id or event id {name}")


def _event_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text} is not an event id: history --json and archives --json show them") from None


def _not_empty(text: str | None) -> str | None:
    if text is not None and not text.strip():
        raise typer.BadParameter("must not be empty")
    return text


def withdraw(
    event_id: Annotated[UUID, typer.Argument(parser=_event_id, metavar="EVENT_ID", help="Event id of the row.")],
    reason: Annotated[str, typer.Option(callback=_not_empty, help="Why the row is wrong; recorded in withdrawals.")],
    actor: Annotated[
        str | None,
        typer.Option(
            callback=_not_empty,
            help="Name of the person who withdraws it; by default the account that runs this command.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the row, but change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a wrong row of history for good; its content, the reason and the actor are kept in withdrawals.

    Example: trading-history withdraw 7c1f366e-c9c3-5876-873e-6a33c29b098d --reason "wrong balance" --dry-run
    """
    from consumers.db.engine import get_db, limit_statements
    from consumers.db.withdrawals import withdraw as withdraw_row

    with stack(database=True):
        limit_statements(_STATEMENT_SECONDS)
        with get_db() as db:
            savepoint = db.begin_nested()
            withdrawn = withdraw_row(db, event_id, reason, actor or _account())
            if dry_run:
                savepoint.rollback()
    if as_json:
        print_json(asdict(withdrawn))
        return
    content = {name: value for name, value in withdrawn.content.items() if not isinstance(value, list)}
    print_values({"event_id": withdrawn.event_id, "source": withdrawn.source, "sequence": withdrawn.sequence} | content)
    result = "would be withdrawn; nothing was changed" if dry_run else "was withdrawn"
    print(f"Row {withdrawn.row_id} of {withdrawn.table} {result}.")


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # pragma: no cover - in a container, the user may have no name
        return f"uid {os.getuid()}"
