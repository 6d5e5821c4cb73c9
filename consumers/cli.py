"""The `trading-history` command: parses, delegates, prints. Errors are one line on stderr."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from redis import RedisError

from consumers import stop_signals
from consumers.cli_doctor import doctor
from consumers.cli_export import export
from consumers.cli_failed import failed_app
from consumers.cli_import import import_history, verify_history
from consumers.cli_options import AsJson, OfPortfolio, Since, Until
from consumers.cli_outbox import outbox_app
from consumers.cli_retire import retire
from consumers.cli_up import up
from consumers.cli_views import api, dashboard, status
from consumers.logs import write_logs
from consumers.stack import stack
from consumers.terminal import print_archives, print_audit, print_csv, print_json, print_snapshots
from producers.errors import HistoryError, SettingsError

app = typer.Typer(
    help="Portfolio snapshots and signal archives: from the controller through Redis Queue into PostgreSQL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_RUN, _RECORD, _LOOK, _MOVE = "Run it", "Record and read", "Look after it", "Move"

_debug = False
_NEWEST = 20
_LAST_PORT = 65535
_EXTRAS = {
    **dict.fromkeys(("sqlalchemy", "psycopg2", "prometheus_client"), "worker"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn"), "api"),
    **dict.fromkeys(("flask", "jinja2", "rq_dashboard", "six", "waitress", "werkzeug"), "dashboard"),
}

Limit = Annotated[
    int | None, typer.Option("--limit", "-n", min=1, help="At most so many, the newest; 20 unless --csv.")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV: all rows, amounts exact, times with offset.")]
ForPortfolio = Annotated[int | None, typer.Option("--portfolio-id", help="The portfolio's number.")]


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
) -> None:
    global _debug
    _debug = debug
    try:
        write_logs(logging.DEBUG if debug else logging.INFO)
    except SettingsError:
        if context.invoked_subcommand != "doctor":  # which tells of wrong settings itself
            raise


@app.command(rich_help_panel=_RUN)
def demo() -> None:
    """Run simulated trading cycles through the whole pipeline, twice, in a folder of its own, and count."""
    from consumers.demo import run_demo
    from consumers.stack import embedded_home

    raise typer.Exit(run_demo(embedded_home() / "demo"))


app.command(rich_help_panel=_RUN)(up)


@app.command("init-db", rich_help_panel=_RUN)
def init_db(
    adopt_legacy: Annotated[
        bool, typer.Option("--adopt-legacy", help="Rename tables of the old shape to …_legacy first.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the SQL instead of running it.")] = False,
) -> None:
    """Make the tables and roles that are missing, and the logins whose passwords are set."""
    from consumers import adoption
    from consumers.connection import apply_schema, engine, schema_sql
    from consumers.logins import set_passwords
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


@app.command(rich_help_panel=_RUN)
def worker(
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
    """Store events from the queue until told to stop."""
    from consumers.pool import run_pool
    from consumers.processes import stop_with_stdin
    from consumers.settings import MetricsSettings
    from consumers.worker import run_worker
    from producers.settings import TransportSettings

    if while_stdin:
        stop_with_stdin()
    metrics = MetricsSettings.from_environment()
    # A worker of another command (demo, import) would take the port of the one that the setting is meant for.
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
            raise typer.Exit(run_pool(processes, burst=burst, debug=_debug, metrics_port=port))
        run_worker(redis, settings.queue, burst=burst, metrics=metrics.model_copy(update={"port": port}))


app.command(rich_help_panel=_RUN)(api)
app.command(rich_help_panel=_RUN)(dashboard)


@app.command(rich_help_panel=_RECORD)
def snapshot(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The controller's portfolio as JSON; - reads standard input.")
    ],
    portfolio_id: ForPortfolio = None,
    timestamp: Annotated[datetime | None, typer.Option(help="Time of the snapshot; now by default.")] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until it is stored.")] = 0,
) -> None:
    """Record one portfolio snapshot, as the controller would."""
    from producers.history_producer import HistoryProducer
    from producers.trading_controller import create_daily_portfolio_snapshot

    portfolio = _read_portfolio(file)
    with stack(redis=True), HistoryProducer() as producer:
        receipt = create_daily_portfolio_snapshot(portfolio, portfolio_id, timestamp=timestamp, producer=producer)
        _print_receipt(receipt, wait)


@app.command(rich_help_panel=_RECORD)
def archive(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The current signals; data/trades/current_signals.json if it exists."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Read the signals from here instead.")] = None,
    portfolio_id: ForPortfolio = None,
    archived_at: Annotated[datetime | None, typer.Option(help="The cycle's time; now by default.")] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until it is stored.")] = 0,
) -> None:
    """Archive the current signals, as the controller would."""
    from producers.history_producer import HistoryProducer
    from producers.trading_controller import archive_current_signals

    if file is not None and not file.exists():
        raise HistoryError(f"{file}: No such file or directory")
    with stack(redis=True), HistoryProducer() as producer:
        chosen: dict[str, Any] = {} if file is None else {"signals_path": file}
        receipt = archive_current_signals(
            **chosen, signals_url=url, portfolio_id=portfolio_id, archived_at=archived_at, producer=producer
        )
        if receipt is None:
            print("There are no signals to archive.")
        else:
            _print_receipt(receipt, wait)


@app.command(rich_help_panel=_RECORD)
def history(
    *,
    limit: Limit = None,
    portfolio_id: OfPortfolio = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show the newest portfolio snapshots."""
    from consumers.operations import get_portfolio_history, stream_portfolio_history

    _one_format(as_json, as_csv)
    with stack(database=True):
        if as_csv:
            with stream_portfolio_history(limit, portfolio_id=portfolio_id, since=since, until=until) as exact:
                print_csv(exact.columns, exact.rows)
            return
        rows = get_portfolio_history(limit or _NEWEST, portfolio_id=portfolio_id, since=since, until=until)
    (print_json if as_json else print_snapshots)(rows)


@app.command(rich_help_panel=_RECORD)
def archives(
    *,
    limit: Limit = None,
    portfolio_id: OfPortfolio = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show the newest signal archives."""
    from consumers.operations import get_recent_signal_archives, stream_signal_archives

    _one_format(as_json, as_csv)
    with stack(database=True):
        if as_csv:
            with stream_signal_archives(limit, portfolio_id=portfolio_id, since=since, until=until) as exact:
                print_csv(exact.columns, exact.rows)
            return
        rows = get_recent_signal_archives(limit or _NEWEST, portfolio_id=portfolio_id, since=since, until=until)
    (print_json if as_json else print_archives)(rows)


app.command(rich_help_panel=_LOOK)(status)
app.command(rich_help_panel=_LOOK)(doctor)


@app.command(rich_help_panel=_LOOK)
def audit(as_json: AsJson = False) -> None:
    """Account for every number of every source; exit status 1 if one is missing."""
    from consumers.audit import audit as account
    from producers.outbox import Outbox
    from producers.settings import TransportSettings

    with stack(database=True):
        settings = TransportSettings.from_environment()
        redis = None if settings.redis_url is None else settings.redis()
        with Outbox(settings.outbox) if settings.outbox.is_file() else nullcontext() as outbox:
            audits = account(redis, outbox)
    (print_json if as_json else print_audit)([asdict(one) for one in audits])
    raise typer.Exit(0 if all(one.complete for one in audits) else 1)


@app.command(rich_help_panel=_RECORD)
def schema() -> None:
    """Print the JSON Schema of the events."""
    from producers.events import json_schema

    print(json.dumps(json_schema(), indent=2))


app.add_typer(failed_app, name="failed", rich_help_panel=_LOOK)
app.add_typer(outbox_app, name="outbox", rich_help_panel=_LOOK)
app.command("import", rich_help_panel=_MOVE)(import_history)
app.command("verify", rich_help_panel=_MOVE)(verify_history)
app.command(rich_help_panel=_MOVE)(export)
app.command(rich_help_panel=_MOVE)(retire)


def _one_format(as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise typer.BadParameter("print JSON or CSV, not both", param_hint="--csv")


def _print_adoption(adoption: Any) -> None:
    for name, legacy in adoption.renamed:
        print(f"{name} is {legacy} now.")
    for note in adoption.notes:
        print(f"Note: {note}.")
    if not adoption.renamed:
        earlier = f"; {' and '.join(adoption.earlier)} came from an earlier run" if adoption.earlier else ""
        print(f"There are no tables of the old shape to rename{earlier}.")


def _read_portfolio(file: Path) -> Any:
    try:
        # Decimal keeps every digit that a binary float would drop.
        return json.loads(sys.stdin.read() if str(file) == "-" else file.read_text("utf-8-sig"), parse_float=Decimal)
    except OSError as error:
        raise HistoryError(f"{file}: {error.strerror or error}") from error
    except (ArithmeticError, RecursionError, ValueError) as error:
        raise HistoryError(f"{file}: not JSON: {error}") from None


def _print_receipt(receipt: Any, wait_seconds: float) -> None:
    print(f"accepted event {receipt.event_id} as {receipt.source} {receipt.sequence}")
    if wait_seconds:
        try:
            print(f"stored as row {receipt.wait(wait_seconds)}")
        except TimeoutError as error:
            raise HistoryError(str(error)) from None


def _terminate(number: int, _: object) -> NoReturn:
    # Like Ctrl-C: servers and workers that this command started are stopped on the way out.
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point. Exit status 0 fine, 1 found or failed, 2 wrong usage, 130 and 143 ended by a signal."""
    stop_signals.handle((signal.SIGTERM, signal.SIGHUP), _terminate)
    # Started with a closed stdout or stderr: the work goes on, unseen.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until the process ends
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        message = _readable(error)
        if message is None or _debug:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def _readable(error: Exception) -> str | None:
    """What to tell about an error that is not a defect of ours; None for any other."""
    if isinstance(error, HistoryError):
        return str(error)
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, RedisError):
        return f"Redis: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        return f"this command needs more: pip install '.[{extra}]' in a clone of trading-history" if extra else None
    return None


if __name__ == "__main__":
    main()
