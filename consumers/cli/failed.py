"""The commands `trading-history failed`: list, show, requeue and discard rejected events; and `withdraw`."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import Annotated, Any
from uuid import UUID

import typer

from consumers.cli.options import AsJson
from consumers.embedded.stack import stack
from consumers.terminal import print_json, print_json_array, print_rejections, print_text, print_values
from producers.errors import HistoryError

_STATEMENT_SECONDS = 20.0  # a lock is waited for at most 5 s

failed_app = typer.Typer(
    help="List, show, requeue and discard rejected events.\n\nExample: trading-history failed list",
    no_args_is_help=True,
)

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Job id or event id.")]
KindOption = Annotated[
    str | None, typer.Option("--kind", help="Only rejected events of this kind: snapshot or archive.")
]
All = Annotated[bool, typer.Option("--all", help="All rejections, or with --kind all of that kind.")]


@failed_app.command("list")
def failed_list(kind: KindOption = None, as_json: AsJson = False) -> None:
    """List rejected events, oldest first; exit status 1 if there are any.

    Example: trading-history failed list --kind snapshot
    """
    from consumers.ops.failed import as_dict, rejections

    _check_kind(kind)
    with stack(database=True):
        count = (print_json_array if as_json else print_rejections)(map(as_dict, rejections(kind=kind)))
    raise typer.Exit(1 if count else 0)


@failed_app.command("show")
def failed_show(name: Annotated[str, typer.Argument(metavar="NAME", help="Job id or event id.")]) -> None:
    """Show a rejected event and its text as received; control characters are escaped.

    Example: trading-history failed show 7c1f366e-c9c3-5876-873e-6a33c29b098d
    """
    from consumers.ops.failed import as_dict, rejected_text

    with stack(database=True):
        for rejection in _chosen(name, None):
            print_values(as_dict(rejection))
            print_text(rejected_text(rejection.job_id) or "")


@failed_app.command("requeue")
def failed_requeue(name: Name = None, kind: KindOption = None, every: All = False) -> None:
    """Requeue rejected events; an event that is then stored is no longer rejected.

    Example: trading-history failed requeue --kind snapshot
    """
    from consumers.ops.failed import requeue
    from producers.settings import TransportSettings

    _check_choice(name, kind, every)
    with stack(database=True, redis=True):
        settings = TransportSettings.from_environment()
        count = requeue(_chosen(name, kind), settings.redis(), settings.queue)
    print(f"{count} requeued")


@failed_app.command("discard")
def failed_discard(
    reason: Annotated[str, typer.Option(help="Why the event may be discarded; recorded in event_outcomes.")],
    name: Name = None,
    kind: KindOption = None,
    every: All = False,
    actor: Annotated[
        str | None,
        typer.Option(help="Name of the person who discards it; by default the account that runs this command."),
    ] = None,
) -> None:
    """Discard rejected events; their text, the reason and the actor stay in event_outcomes.

    Example: trading-history failed discard 7c1f366e-c9c3-5876-873e-6a33c29b098d --reason "test data"
    """
    from consumers.ops.failed import discard
    from producers.settings import TransportSettings

    _check_choice(name, kind, every)
    with stack(database=True, redis=True):
        settings = TransportSettings.from_environment()
        count = discard(_chosen(name, kind), settings.redis(), settings.queue, reason, actor or _account())
    print(f"{count} discarded")


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
    except (KeyError, OSError):  # in a container, the user may have no name
        return f"uid {os.getuid()}"


def _check_kind(kind: str | None) -> None:
    from producers.events import KINDS

    names = [known.name for known in KINDS.values()]
    if kind is not None and kind not in names:
        raise typer.BadParameter(f"must be one of {', '.join(names)}", param_hint="--kind")


def _check_choice(name: str | None, kind: str | None, every: bool) -> None:
    _check_kind(kind)
    if (name is None) == (kind is None and not every):
        raise typer.BadParameter("give a job id or event id, or choose with --kind or --all", param_hint="NAME")


def _chosen(name: str | None, kind: str | None) -> Iterator[Any]:
    """Yield the chosen rejections. Raises HistoryError if no rejection has the given name."""
    from consumers.ops.failed import rejections

    found = rejections(name, kind=kind)
    first = next(found, None)
    if first is None and name is not None:
        raise HistoryError(f"no rejection has the job id or event id {name}")
    return found if first is None else chain([first], found)
