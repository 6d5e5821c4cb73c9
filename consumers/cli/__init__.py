"""The `trading-history` command: its subcommands, exit statuses and error messages (one line on stderr)."""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from consumers.cli import (
    audit,
    doctor,
    export,
    failed,
    legacy,
    outbox,
    reading,
    recording,
    running,
    serving,
    status,
    up,
    withdrawing,
)
from consumers.cli.error_messages import error_message
from consumers.process_setup import exit_on_signal, on_stop_signals, write_logs
from consumers.terminal import escaped, print_any_character
from producers.errors import SettingsError

app = typer.Typer(
    help="Store portfolio snapshots and signal archives of a trading controller in PostgreSQL, through Redis Queue.\n\n"
    "Example: trading-history demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_READ_LOG_SETTINGS = ("doctor", "status", "outbox")  # they report wrong settings themselves
_debug = False
_program = "trading-history"
_UsageError: Any = typer.BadParameter.__bases__[0]  # typer exports only this subclass
_PLAIN_REASONS = {
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "must be a number",
}


def _print_versions(is_wanted: bool) -> None:
    if not is_wanted:
        return
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(package)}" for name, package in (("rq", "rq"), ("redis-py", "redis")))
    print(f"trading-history {version('trading-history')}, Python {platform.python_version()}, {packages}")
    raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug log lines.")] = False,
    version: Annotated[  # noqa: ARG001  # its callback prints them
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_versions, help="Print the versions of this program and exit."
        ),
    ] = False,
    while_stdin: Annotated[bool, typer.Option("--while-stdin", hidden=True)] = False,
    embedded_home: Annotated[Path | None, typer.Option("--embedded-home", hidden=True)] = None,
) -> None:
    """Read the options of the program itself. The hidden ones are for its child processes."""
    global _debug, _program
    _debug, _program = debug, context.command_path
    if embedded_home is not None:
        from consumers.embedded import counted_as_user

        # Before the next step, so that this process stops the servers.
        context.with_resource(counted_as_user(embedded_home))
    if while_stdin:
        from consumers.embedded.child_processes import stop_with_stdin

        stop_with_stdin()
    try:
        write_logs(logging.DEBUG if debug else logging.INFO)
    except SettingsError:
        if context.invoked_subcommand not in _READ_LOG_SETTINGS:
            raise


# In the order of `--help`.
_COMMANDS: dict[str, dict[str, Callable[..., Any] | typer.Typer]] = {
    "Run": {
        "demo": running.demo,
        "up": up.up,
        "init-db": running.init_db,
        "worker": running.worker,
        "relay": running.relay,
        "api": serving.api,
        "dashboard": serving.dashboard,
    },
    "Record and read": {
        "snapshot": recording.snapshot,
        "archive": recording.archive,
        "history": reading.history,
        "archives": reading.archives,
        "performance": reading.performance,
        "schema": recording.schema,
    },
    "Monitor and repair": {
        "status": status.status,
        "doctor": doctor.doctor,
        "audit": audit.audit,
        "failed": failed.failed_app,
        "withdraw": withdrawing.withdraw,
        "outbox": outbox.outbox_app,
    },
    "Import and export": {
        "import": legacy.import_history,
        "verify": legacy.verify_history,
        "export": export.export,
    },
}
for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, name=_name, rich_help_panel=_panel)
        else:
            app.command(_name, rich_help_panel=_panel)(_command)


def main() -> None:
    """Run the command. Exit status: 0 fine, 1 failed or found something, 2 wrong usage, 128 + number of a signal."""
    on_stop_signals((signal.SIGTERM, signal.SIGHUP), exit_on_signal)
    # Some supervisors close stdout or stderr: the command must work without them.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until the process ends
    print_any_character()
    try:
        # Not standalone: typer would print a usage error as a box of five lines.
        sys.exit(app(standalone_mode=False))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except _UsageError as error:
        sys.exit(_show_usage_error(error))
    except Exception as error:
        message = error_message(error)
        if message is None or _debug:
            raise
        print(f"error: {escaped(message)}", file=sys.stderr)
        sys.exit(1)


def _show_usage_error(error: Any) -> int:
    """Print a usage error in one line, or the help if a group of commands was called without a command."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        message = " ".join(error.format_message().split()).rstrip(".")
        for reason, plain in _PLAIN_REASONS.items():
            message = message.replace(reason, plain)
        joint = " See" if message.endswith("?") else "; see"
        command = error.ctx.command_path if error.ctx else _called_command()
        print(f"error: {escaped(message)}{joint} {command} --help", file=sys.stderr)
    return int(error.exit_code)


def _called_command() -> str:
    """Return the program and the subcommand that was called, as in `trading-history outbox flush`."""
    command: Any = typer.main.get_command(app)
    path = [_program]
    for argument in sys.argv[1:]:
        if argument in (commands := getattr(command, "commands", {})):
            command = commands[argument]
            path.append(argument)
    return " ".join(path)
