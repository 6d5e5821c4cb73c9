"""Commands that run the pipeline: `demo`, `init-db`, `worker`, `relay`."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any

import typer

from consumers.embedded.stack import stack

_LAST_PORT = 65535


def demo() -> None:
    """Run simulated trading cycles through the whole pipeline, twice, in a folder of its own, and count."""
    from consumers.demo import run_demo
    from consumers.embedded.stack import embedded_home

    raise typer.Exit(run_demo(embedded_home() / "demo"))


def init_db(
    adopt_legacy: Annotated[
        bool, typer.Option("--adopt-legacy", help="Rename tables of the old shape to …_legacy first.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the SQL instead of running it.")] = False,
) -> None:
    """Make the tables and roles that are missing, and the logins whose passwords are set."""
    from consumers.db.engine import engine
    from consumers.db.logins import set_passwords
    from consumers.db.schema import apply_schema, schema_sql
    from consumers.legacy import adoption
    from consumers.settings import LoginSettings

    if dry_run and not adopt_legacy:
        print(schema_sql(), end="")
        return
    with stack(database=True):
        if dry_run:
            print(adoption.plan_adoption(engine()).script(), end="")
            return
        if adopt_legacy:
            _print_adoption(adoption.adopt_legacy(engine()))
        else:
            for note in apply_schema(engine()):
                print(f"Note: {note}.")
        print("The tables are there.")
        for login in set_passwords(engine(), LoginSettings.from_environment()):
            print(f"{login} may log in, with its password.")


def worker(
    context: typer.Context,
    burst: Annotated[bool, typer.Option("--burst", help="Stop when the queue is empty.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_LAST_PORT,
            help="Answer Prometheus here; with --processes also at the ports that follow. 0: any that are free.",
            show_default="HISTORY_METRICS_PORT, else nowhere",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="So many of them; one that dies is started again.")
    ] = 1,
    while_stdin: Annotated[bool, typer.Option("--while-stdin", hidden=True)] = False,
) -> None:
    """Store events from the queue until stopped."""
    from consumers.embedded.child_processes import stop_with_stdin
    from consumers.embedded.worker_pool import run_pool
    from consumers.settings import MetricsSettings
    from consumers.worker.history_worker import run_worker
    from producers.settings import TransportSettings

    if while_stdin:
        stop_with_stdin()
    metrics = MetricsSettings.from_environment()
    # A worker of another command (demo) would take the port of the one that the setting is meant for.
    port = metrics_port if metrics_port is not None or while_stdin else metrics.port
    if port and port + processes - 1 > _LAST_PORT:
        raise typer.BadParameter(
            f"{processes} processes from {port} on need ports above {_LAST_PORT}",
            param_hint="HISTORY_METRICS_PORT" if metrics_port is None else "--metrics-port",
        )
    with stack(database=True, redis=True):
        settings = TransportSettings.from_environment()
        redis = settings.redis()
        if processes > 1:
            raise typer.Exit(
                run_pool(processes, burst=burst, debug=context.find_root().params["debug"], metrics_port=port)
            )
        run_worker(redis, settings.queue, burst=burst, metrics=metrics.model_copy(update={"port": port}))


def relay(
    outboxes: Annotated[
        list[Path] | None,
        typer.Option("--outbox", help="File of an outbox; several may be given.", show_default="HISTORY_OUTBOX"),
    ] = None,
) -> None:
    """Carry events from outboxes to the queue until stopped: for controllers that cron starts."""
    from consumers.process_setup import on_stop_signals
    from producers.relay_process import run_relay
    from producers.settings import TransportSettings

    signals = SimpleQueue[int]()  # whose put() may be called by a signal's handler at any moment

    def stop(number: int, _: object) -> None:
        if not signals.empty():  # a second one ends it at once: what is in hand is sent again by the next relay
            raise SystemExit(128 + number)
        signals.put(number)

    def stopped(seconds: float) -> bool:
        with suppress(Empty):
            signals.put(signals.get(timeout=seconds))
        return not signals.empty()

    with stack(redis=True):
        settings = TransportSettings.from_environment()
        on_stop_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), stop)
        run_relay(
            outboxes or [settings.outbox],
            settings.redis(),
            settings.queue,
            keep_seconds=settings.outbox_keep_seconds,
            stopped=stopped,
        )


def _print_adoption(adoption: Any) -> None:
    for name, legacy in adoption.renamed:
        print(f"{name} is {legacy} now.")
    for note in adoption.notes:
        print(f"Note: {note}.")
    if not adoption.renamed:
        earlier = f"; {' and '.join(adoption.earlier)} came from an earlier run" if adoption.earlier else ""
        print(f"There are no tables of the old shape to rename{earlier}.")
