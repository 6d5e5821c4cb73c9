"""`trading-history outbox`: what this machine has accepted and not yet seen stored or rejected."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from consumers.cli.options import AsJson
from consumers.cli.progress import progress_bar
from consumers.stack import stack
from consumers.terminal import print_facts, print_json
from producers.errors import HistoryError

outbox_app = typer.Typer(
    help="The events that this machine has accepted and not yet seen stored or rejected.", no_args_is_help=True
)

_CHECK_SECONDS = 5.0


@outbox_app.command("status")
def outbox_status(as_json: AsJson = False) -> None:
    """Show how many events are pending, sent, stored and rejected, and whether the file is sound."""
    from producers.outbox import Outbox

    with Outbox(_existing_outbox()) as outbox:
        facts = {"path": str(outbox.path)} | _outbox_facts(outbox.status())
        fault = outbox.quick_check(_CHECK_SECONDS)
        facts["check"] = {None: "sound", "unfinished": f"no fault found in {_CHECK_SECONDS:.0f} s"}.get(fault, fault)
        facts["damaged_files"] = [str(file) for file in outbox.rescue.damaged_files()]
    (print_json if as_json else print_facts)(facts)
    raise typer.Exit(1 if fault not in (None, "unfinished") else 0)


@outbox_app.command("flush")
def outbox_flush(
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait.")] = 60.0, as_json: AsJson = False
) -> None:
    """Wait until every event that is in the outbox now is stored or rejected; exit status 1 if one is not."""
    from producers.history_producer import HistoryProducer

    path = _existing_outbox()
    with stack(redis=True), HistoryProducer(outbox=path) as producer:
        waiting = producer.status().depth
        with progress_bar() as progress:
            left = producer.settle(timeout, progress=lambda left: progress(waiting - left, waiting))
        facts = {"path": str(path.absolute())} | _outbox_facts(producer.status())
        reason = _what_it_waits_for(producer.status()) if left else None
        producer.close(timeout=0)
    if as_json:
        print_json(facts | {"unsettled": left, "waits_for": reason})
    elif left:
        print_facts(facts)
        print(f"{left} events are not settled. {reason}", file=sys.stderr)
    else:
        print(f"Every event in {path.absolute()} is stored or rejected: once no process uses it, it may be deleted.")
    raise typer.Exit(1 if left else 0)


def _what_it_waits_for(status: Any) -> str:
    """For a person: why entries are pending or sent, and what to do."""
    from redis import RedisError
    from rq import Queue
    from rq.worker_registration import WORKERS_BY_QUEUE_KEY

    from producers.settings import TransportSettings

    settings = TransportSettings.from_environment()
    found = f"{status.pending} are pending and {status.sent} sent"
    try:
        with settings.redis() as redis:
            queued = Queue(settings.queue, connection=redis).count
            workers = redis.scard(WORKERS_BY_QUEUE_KEY % settings.queue)
    except RedisError as error:
        return f"{found}: Redis cannot be reached ({type(error).__name__}). Run this again when it is back."
    if not workers:
        return f"{found}: {queued} jobs wait in the queue, and no worker runs. Start one: trading-history worker"
    return (
        f"{found}: {queued} jobs wait in the queue of {workers} workers. Look at the workers' log, or run this again"
        " with a longer --timeout."
    )


@outbox_app.command("resend")
def outbox_resend(
    since: Annotated[
        datetime, typer.Option(help="What was recorded from this time on (local unless it has an offset).")
    ],
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to try.")] = 60.0,
) -> None:
    """Send stored and rejected events again, for a database restored from a backup; rows it still has are kept."""
    from producers.history_producer import HistoryProducer

    path = _existing_outbox()
    with stack(redis=True), HistoryProducer(outbox=path) as producer:
        again = producer.resend(producer.localized(since, "--since"))
        pending = producer.flush(timeout)
    print(f"{again} events to send again, {pending} still pending")
    raise typer.Exit(1 if pending else 0)


@outbox_app.command("salvage")
def outbox_salvage(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A damaged outbox file.")],
) -> None:
    """Carry what can be read in a damaged outbox file over into the outbox; it may be done again."""
    from producers.outbox import Outbox
    from producers.settings import TransportSettings

    with Outbox(TransportSettings.from_environment().outbox) as outbox:
        if file.resolve() == outbox.path.resolve():
            raise HistoryError(f"{file} is the outbox itself: its producers set it aside when they find it damaged")
        found = outbox.rescue.salvage(file)
    print(found.summary())


def _outbox_facts(status: Any) -> dict[str, Any]:
    facts = asdict(status)
    age = facts.pop("oldest_unsettled_seconds")
    at = None if age is None else datetime.now(UTC) - timedelta(seconds=age)
    facts["oldest_unsettled_at"] = None if at is None else at.isoformat(" ", "seconds")
    facts["oldest_unsettled_seconds"] = None if age is None else round(age)
    return facts


def _existing_outbox() -> Path:
    from producers.settings import TransportSettings

    path = TransportSettings.from_environment().outbox
    if not path.is_file():
        raise HistoryError(f"there is no outbox at {path.absolute()}; HISTORY_OUTBOX names another place")
    return path
