"""The commands `trading-history outbox`: status, flush, resend and salvage."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consumers.cli.options import AsJson, progress_bar, seconds_option, time_option
from consumers.cli.pinging import Ping, read_and_ping
from consumers.embedded.stack import stack
from consumers.ops.checks import counted
from consumers.settings import LogSettings
from consumers.terminal import print_json, print_values
from producers.errors import HistoryError, OutboxDamaged
from producers.settings import TransportSettings

if TYPE_CHECKING:
    from producers.entries import OutboxStatus
    from producers.history_producer import HistoryProducer

outbox_app = typer.Typer(
    help="Show, flush, resend and salvage the outbox of this machine.\n\nExample: trading-history outbox status",
    no_args_is_help=True,
)

_CHECK_SECONDS = 5.0
_SOUND: dict[str | None, str] = {None: "sound", "unfinished": f"no fault found in {_CHECK_SECONDS:.0f} s"}


@outbox_app.callback()
def _settings(context: typer.Context) -> None:
    if context.invoked_subcommand != "status":  # it reports a wrong setting to a monitoring service first
        LogSettings.from_environment()


@outbox_app.command("status")
def outbox_status(as_json: AsJson = False, ping: Ping = None) -> None:
    """Show the number of pending, sent, stored and rejected events, and problems; exit status 1 if there is one.

    Example: trading-history outbox status --json
    """
    from consumers.ops.outbox_health import INCLUDED

    values, is_well = read_and_ping(_read_status, ping)
    if as_json:
        print_json(values)
    else:
        rejected = f"{values['rejected']}{INCLUDED if values['rejected'] else ''}"
        problems = [("problem", problem) for problem in values.pop("problems")] or [("problems", None)]
        print_values([*(values | {"rejected": rejected}).items(), *problems])
    if values["check"] not in _SOUND.values():
        print(f"The file is damaged: {OutboxDamaged.advice}", file=sys.stderr)
    raise typer.Exit(0 if is_well else 1)


def _read_status() -> tuple[dict[str, Any], list[str]]:
    """Return the values of `outbox status`, and the problems. No database driver is needed."""
    from consumers.ops.outbox_health import oldest_unacknowledged_seconds, outbox_of_settings
    from producers.outbox import Outbox

    path, settings = _existing_outbox()
    no_redis = settings.redis_url is None
    with Outbox(path) as outbox, nullcontext() if no_redis else settings.redis() as redis:
        age = oldest_unacknowledged_seconds(outbox, redis)
        values = _status_values(outbox.path, outbox.status(), "unacknowledged", age)
        fault = outbox.quick_check(_CHECK_SECONDS)
        values["check"] = _SOUND.get(fault, fault)
        damaged = [str(file) for file in outbox.quarantine.damaged_files()]
        values |= {"damaged_files": damaged, "salvaged_files": [*map(str, outbox.quarantine.salvaged_files())]}
    health = outbox_of_settings(ask_relay=True) if fault in _SOUND else None
    problems = [] if fault in _SOUND else [f"outbox file: damaged: {fault}"]
    problems += [f"outbox file: damaged, and not salvaged yet: {', '.join(damaged)}"] if damaged else []
    problems += health.problems() if health is not None else ()
    return values | {"problems": problems}, problems


@outbox_app.command("flush")
def outbox_flush(
    timeout: Annotated[
        float, typer.Option(parser=seconds_option, metavar="SECONDS", help="Wait at most this many seconds.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Wait until every event in the outbox is stored or rejected; exit status 1 if one is not.

    Example: trading-history outbox flush --timeout 300
    """
    from consumers.ops.outbox_health import unsettled_reason

    path, _ = _existing_outbox()
    with _producer(path) as producer:
        waiting = producer.status().depth
        with progress_bar() as progress:
            left = producer.settle(timeout, progress=lambda left: progress(max(waiting - left, 0), waiting))
        status = producer.status()
        damaged = producer.damaged_files()
        reason = None
        if left:
            away = "The events are safe in the outbox; run this again when it is back."
            longer = "Run this again with a longer --timeout."
            reason = unsettled_reason(damaged, producer.relay_failure(), if_away=away, otherwise=longer)
        lossy = producer.lossy_files()
        producer.close(timeout=0)
    values = _status_values(path, status, "unsettled", status.oldest_unsettled_seconds)
    if as_json:
        print_json(values | {"unsettled": left, "waits_for": reason, "lossy_files": [str(file) for file in lossy]})
    elif left:
        print_values(values)
        found = f"{counted(left, 'event')} not settled: {status.pending} pending, {status.sent} sent."
        print(f"{found} {reason}", file=sys.stderr)
    elif status.depth:
        print(
            f"Every event that was in {path} is stored or rejected, but not the {counted(status.depth, 'event')}"
            " recorded since then. Stop the controllers and run this again before you delete the file.",
            file=sys.stderr,
        )
    elif not lossy:
        print(f"Every event in {path} is stored or rejected. Once no process uses the file, it may be deleted.")
    if lossy:
        names = shlex.join(map(str, lossy))
        print(
            f"Entries may be lost: not all of {names} could be read. Run trading-history audit, which names missing"
            f" events, then delete what you have examined: rm {names}; until then, this command ends with status 1.",
            file=sys.stderr,
        )
    raise typer.Exit(1 if left or status.depth or lossy else 0)


@outbox_app.command("resend")
def outbox_resend(
    since: Annotated[
        datetime,
        typer.Option(
            parser=time_option,
            metavar="TIME",
            help="Resend events recorded from this time on, such as 2026-11-22T17:00, 7d or yesterday.",
        ),
    ],
    timeout: Annotated[
        float, typer.Option(parser=seconds_option, metavar="SECONDS", help="Try for at most this many seconds.")
    ] = 60.0,
) -> None:
    """Send settled events again, after the database was restored from a backup; existing rows are kept.

    Example: trading-history outbox resend --since 2026-11-22T17:00
    """
    path, _ = _existing_outbox()
    with _producer(path) as producer:
        again = producer.resend(producer.localized(since, "--since"))
        pending = producer.flush(timeout)
    print(f"{counted(again, 'event')} sent again, {pending} not sent yet")
    raise typer.Exit(1 if pending else 0)


@contextmanager
def _producer(path: Path) -> Iterator[HistoryProducer]:
    """Open a producer on this outbox.

    Raises:
        RelayRefused: the outbox's events go to another Redis or queue than those of the settings. The producer would
            redirect them, and those of a running controller.
    """
    from producers.history_producer import HistoryProducer
    from producers.outbox import Outbox
    from producers.relay import Relay

    with stack(redis=True):
        settings = TransportSettings.from_environment()
        # The producer repairs a damaged file.
        with suppress(OutboxDamaged), Outbox(path) as outbox, settings.redis() as redis:
            Relay(outbox, redis, settings.queue, keep_seconds=settings.outbox_keep_seconds).turn.check_destination()
        with HistoryProducer(outbox=path) as producer:
            yield producer


@outbox_app.command("salvage")
def outbox_salvage(
    file: Annotated[Path, typer.Argument(help="Damaged outbox file.")],
) -> None:
    """Copy the readable entries of a damaged outbox file into the outbox; running it twice is safe.

    Example: trading-history outbox salvage data/outbox.db.damaged-1
    """
    from producers.outbox import Outbox

    if not file.is_file():
        raise HistoryError(f"{file}: {'Is a directory' if file.is_dir() else 'No such file or directory'}")
    path = TransportSettings.from_environment().outbox
    if file.resolve() == path.resolve():
        raise HistoryError(
            f"{file} is the outbox itself: if it is damaged, a producer or relay quarantines and salvages it"
        )
    with Outbox(path, repair=True) as outbox:
        found = outbox.quarantine.salvage(file)
    print(found.summary())


def _status_values(path: Path, status: OutboxStatus, oldest: str, age: float | None) -> dict[str, Any]:
    """Return the status for printing. `age` is that of the oldest `oldest` entry: unacknowledged or unsettled."""
    at = None if age is None else datetime.now(UTC) - timedelta(seconds=age)
    return {
        "path": str(path.absolute()),
        "pending": status.pending,
        "sent": status.sent,
        "stored": status.stored,
        "rejected": status.rejected,
        f"oldest_{oldest}_at": None if at is None else at.isoformat(" ", "seconds"),
        f"oldest_{oldest}_seconds": None if age is None else round(age),
    }


def _existing_outbox() -> tuple[Path, TransportSettings]:
    settings = TransportSettings.from_environment()
    path = settings.outbox.absolute()
    if not path.is_file():
        raise HistoryError(f"there is no outbox at {path}; set HISTORY_OUTBOX to its path")
    return path, settings
