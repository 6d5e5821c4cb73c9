"""`trading-history outbox`: what this machine has accepted and not yet seen stored or refused."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from consumers.cli.options import AsJson
from consumers.stack import stack
from consumers.terminal import print_facts, print_json
from producers.errors import HistoryError

outbox_app = typer.Typer(
    help="The events that this machine has accepted and not yet seen stored or refused.", no_args_is_help=True
)


@outbox_app.command("status")
def outbox_status(as_json: AsJson = False) -> None:
    """Show how many events are pending, sent, confirmed and rejected."""
    from producers.outbox import Outbox

    with Outbox(_existing_outbox()) as outbox:
        facts = {"path": str(outbox.path)} | _outbox_facts(outbox.status())
    (print_json if as_json else print_facts)(facts)


@outbox_app.command("flush")
def outbox_flush(
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to try.")] = 10.0, as_json: AsJson = False
) -> None:
    """Hand everything pending to Redis; exit status 1 if something could not be."""
    from producers.history_producer import HistoryProducer

    path = _existing_outbox()
    with stack(redis=True), HistoryProducer(outbox=path) as producer:
        pending = producer.flush(timeout)
        facts = {"path": str(path)} | _outbox_facts(producer.status())
    (print_json if as_json else print_facts)(facts)
    raise typer.Exit(1 if pending else 0)


@outbox_app.command("resend")
def outbox_resend(
    since: Annotated[
        datetime, typer.Option(help="What was recorded from this time on (local unless it has an offset).")
    ],
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to try.")] = 60.0,
) -> None:
    """Send stored and refused events again, for a database restored from a backup; what it still has is a duplicate."""
    from producers.history_producer import HistoryProducer

    path = _existing_outbox()
    with stack(redis=True), HistoryProducer(outbox=path) as producer:
        again = producer.resend(producer.localized(since, "--since"))
        pending = producer.flush(timeout)
    print(f"{again} events to send again, {pending} still pending")
    raise typer.Exit(1 if pending else 0)


def _outbox_facts(status: Any) -> dict[str, Any]:
    facts = asdict(status)
    oldest = facts.pop("oldest_unsettled")
    facts["oldest_unsettled_at"] = (
        None if oldest is None else datetime.fromtimestamp(oldest, UTC).isoformat(" ", "seconds")
    )
    facts["oldest_unsettled_seconds"] = None if oldest is None else round(time.time() - oldest)
    return facts


def _existing_outbox() -> Path:
    from producers.settings import TransportSettings

    path = TransportSettings.from_environment().outbox
    if not path.is_file():
        raise HistoryError(f"there is no outbox at {path.absolute()}; HISTORY_OUTBOX names another place")
    return path
