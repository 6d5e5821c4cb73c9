"""The command `trading-history withdraw`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated
from uuid import UUID

import typer

from consumers.cli.options import AsJson, account_name
from consumers.embedded.stack import stack
from consumers.terminal import print_json, print_values

_STATEMENT_SECONDS = 20.0  # a lock is waited for at most 5 s


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
            withdrawn = withdraw_row(db, event_id, reason, actor or account_name())
            if dry_run:
                savepoint.rollback()
    if as_json:
        print_json(asdict(withdrawn))
        return
    content = {name: value for name, value in withdrawn.content.items() if not isinstance(value, list)}
    print_values({"event_id": withdrawn.event_id, "source": withdrawn.source, "sequence": withdrawn.sequence} | content)
    result = "would be withdrawn; nothing was changed" if dry_run else "was withdrawn"
    print(f"Row {withdrawn.row_id} of {withdrawn.table} {result}.")
