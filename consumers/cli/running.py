"""The commands that run the pipeline: `demo`, `init-db`, `worker` and `relay`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any
from urllib.parse import quote

import typer

from consumers.embedded.stack import stack
from consumers.web.listening import PAGE_PORT, url_of, usual_or_free_port

_LAST_PORT = 65535


def demo(
    opens_page: Annotated[
        bool, typer.Option("--open", help="Then serve the history page on the data until Ctrl-C, and open it.")
    ] = False,
) -> None:
    """Run simulated trading cycles through the pipeline, twice, and count the rows; deletes data of an earlier demo.

    Example: trading-history demo --open
    """
    if opens_page:
        from consumers.web.api import api_server  # noqa: F401  # if the extra is missing, say so before the demo runs
    from consumers.demo import run_demo
    from consumers.embedded.stack import embedded_home

    raise typer.Exit(run_demo(embedded_home() / "demo", _show_page if opens_page else None))


def _show_page(outbox: Path) -> None:
    """Serve the history page until Ctrl-C, with the state of this outbox, and open it in a browser."""
    from consumers.web.api.api_server import serve

    os.environ["HISTORY_OUTBOX"] = str(outbox)
    with usual_or_free_port("The history page", PAGE_PORT) as listening:
        threading.Thread(target=open_browser, args=[url_of(listening)], name="browser", daemon=True).start()
        serve(listening)


def open_browser(url: str) -> None:
    """Open the address in a graphical browser. Print a line if there is none."""
    import webbrowser

    # Without a display, the standard library would start a browser for terminals in this terminal.
    can_show = any(os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))
    if not (can_show and webbrowser.open(url)):
        print("No browser was found on this machine: open the address yourself.", file=sys.stderr)


def init_db(
    adopt_legacy: Annotated[
        bool, typer.Option("--adopt-legacy", help="First rename tables of the old shape to …_legacy.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the SQL without running it.")] = False,
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Schema of the tables, created if missing.", show_default="the current schema"
        ),
    ] = None,
) -> None:
    """Create the missing tables and roles, and the logins whose passwords are set.

    Example: trading-history init-db
    """
    from consumers.db import logins
    from consumers.db.database_url import schema_name_problem
    from consumers.db.engine import create_store_engine, translated_errors
    from consumers.db.schema import apply_schema, other_tables, place_of_tables, schema_script
    from consumers.legacy import adoption
    from consumers.settings import LoginSettings, StoreSettings

    if schema is not None and (problem := schema_name_problem(schema)):
        raise typer.BadParameter(problem, param_hint="--schema")
    search_path = () if schema is None else (schema,)
    if dry_run and not adopt_legacy:
        print(schema_script(search_path), end="")
        return
    with stack(database=True):
        url = StoreSettings.from_environment().url()
        store = create_store_engine(url, search_path=search_path, long_transactions=True)
        try:
            others = other_tables(store)
            if dry_run:
                print(adoption.plan_adoption(store).script(), end="")
                return
            notes = _adopted(adoption.adopt_legacy(store)) if adopt_legacy else apply_schema(store)
            with translated_errors(store), store.begin() as db:
                print(f"The tables are ready in schema {place_of_tables(db).schema}.")
            for note in [*notes, *others, *logins.set_search_paths(store)]:
                print(f"Note: {note}")
            for login in logins.set_passwords(store, LoginSettings.from_environment()):
                print(f"Login {login} is ready, with the password from the settings.")
            if schema is not None:
                print(f"Add ?schema={quote(schema, safe='')} to the DATABASE_URL of other logins.")
        finally:
            store.dispose()


def worker(
    context: typer.Context,
    burst: Annotated[bool, typer.Option("--burst", help="Stop when the queue is empty.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_LAST_PORT,
            help="Port for Prometheus; with --processes, also the ports after it. 0: any free port.",
            show_default="HISTORY_METRICS_PORT, otherwise no metrics",
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, help="Number of worker processes; a process that dies is started again."),
    ] = 1,
) -> None:
    """Store events from the queue until stopped.

    Example: trading-history worker --processes 2 --metrics-port 9464
    """
    from consumers.embedded.supervisor import run_pool
    from consumers.settings import MetricsSettings
    from consumers.worker.history_worker import run_worker
    from producers.settings import TransportSettings

    program = context.find_root().params
    metrics = MetricsSettings.from_environment()
    # The setting is for a worker that an operator starts: a worker of another command (demo) must not take its port.
    port = metrics_port if metrics_port is not None or program["while_stdin"] else metrics.port
    if port and port + processes - 1 > _LAST_PORT:
        raise typer.BadParameter(
            f"{processes} processes from port {port} on need ports above {_LAST_PORT}",
            param_hint="HISTORY_METRICS_PORT" if metrics_port is None else "--metrics-port",
        )
    with stack(database=True, redis=True):
        settings = TransportSettings.from_environment()
        redis = settings.redis()
        if processes > 1:
            raise typer.Exit(run_pool(processes, burst=burst, debug=program["debug"], metrics_port=port))
        run_worker(redis, settings.queue, burst=burst, metrics=metrics.model_copy(update={"port": port}))


def relay(
    outboxes: Annotated[
        list[Path] | None,
        typer.Option("--outbox", help="Outbox file; may be repeated.", show_default="HISTORY_OUTBOX"),
    ] = None,
) -> None:
    """Send events from outboxes to the queue until stopped, for example for controllers that cron starts.

    Example: trading-history relay --outbox /var/lib/bot/outbox.db
    """
    from consumers.process_setup import on_stop_signals
    from producers.relay_process import run_relay
    from producers.settings import TransportSettings

    signals = SimpleQueue[int]()  # its put() is safe in a signal handler

    def stop(number: int, _: object) -> None:
        # A second signal ends the relay at once. The next relay sends unacknowledged events again.
        if not signals.empty():
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


def _adopted(adoption: Any) -> list[str]:
    """Print the result of an adoption, and return its notes."""
    for name, legacy in adoption.renamed:
        print(f"Table {name} was renamed to {legacy}.")
    if not adoption.renamed:
        earlier = f"; {' and '.join(adoption.earlier)} are from an earlier run" if adoption.earlier else ""
        print(f"There are no tables of the old shape to rename{earlier}.")
    return list(adoption.notes)
