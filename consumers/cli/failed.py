"""The commands `trading-history failed`: list, show, requeue and discard rejected events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consumers.cli.options import AsJson, account_name, progress_bar
from consumers.cli.rejection_options import (
    Filters,
    KindOption,
    LimitOption,
    ReasonOption,
    SinceOption,
    SourceOption,
    UntilOption,
    selection_of,
    selection_to_change,
)
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
    from consumers.ops.rejections import Selection

failed_app = typer.Typer(
    help="List, show, requeue and discard rejected events.\n\nExample: trading-history failed list",
    no_args_is_help=True,
)

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="Job id or event id.")]
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
    from consumers.ops.rejections import as_dict, rejection_groups, rejections

    selection = selection_of(Filters(reason=reason, source=source, kind=kind, since=since, until=until, limit=limit))
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
    from consumers.ops.rejections import Selection, as_dict, rejected_text, rejections

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
    from consumers.ops.failed import requeue
    from consumers.ops.rejections import rejections

    filters = Filters(reason=reason, source=source, kind=kind, since=since, until=until, limit=limit)
    selection = selection_to_change(name, filters, every=every)
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
    from consumers.ops.failed import discard
    from consumers.ops.rejections import rejections

    filters = Filters(reason=reason, source=source, kind=kind, since=since, until=until, limit=limit)
    selection = selection_to_change(name, filters, every=every)
    if dry_run:
        _print_plan(selection, "discarded")
        return
    if because is None or not because.strip():
        raise typer.BadParameter("say why the events may be discarded", param_hint="--because")
    named = name is not None  # options may select what somebody else has just requeued
    actor = actor or account_name()
    with _action(selection) as (queue, total, on_progress):
        chosen = rejections(selection)
        count = discard(chosen, *queue, because, actor, even_waiting=named, on_progress=on_progress)
    _print_done(count, total, "discarded")


@contextmanager
def _action(selection: Selection) -> Iterator[tuple[tuple[Any, str], int, Callable[[int], object]]]:
    """Start the servers; yield Redis with the queue's name, the number of events, and a function for the progress.

    Raises:
        HistoryError: a job id or event id was given, and no rejection has it.
    """
    from consumers.ops.rejections import count_rejections
    from producers.settings import TransportSettings

    with stack(database=True, redis=True):
        settings = TransportSettings.from_environment()
        total = count_rejections(selection)
        if not total and selection.name is not None:
            raise _not_found(selection.name)
        with progress_bar() as progress:
            yield (settings.redis(), settings.queue), total, lambda done: progress(done, total)


def _print_done(count: int, total: int, done: str) -> None:
    left = total - count
    print(f"{count:,} {done}{f'; {left:,} left: queued or rejected again, or no longer rejected' if left > 0 else ''}")


def _print_plan(selection: Selection, done: str) -> None:
    """Print the groups of the selection, and what would be done with them."""
    from consumers.ops.rejections import rejection_groups

    with stack(database=True):
        groups = [asdict(group) for group in rejection_groups(selection)]
    if not groups and selection.name is not None:
        raise _not_found(selection.name)
    print_rejection_groups(groups, "No rejected event is selected.")
    count = sum(group["count"] for group in groups)
    print(f"At most {counted(count, 'event')} would be {done}; nothing was changed.")


def _not_found(name: str) -> HistoryError:
    return HistoryError(f"no rejection has the job id or event id {name}")
