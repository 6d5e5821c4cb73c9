"""The commands `api` and `dashboard`, which serve HTTP, and `status`."""

from __future__ import annotations

import socket
import sys
import time
from typing import Annotated, Any

import typer

from consumers.cli.options import AsJson
from consumers.embedded.stack import stack
from consumers.terminal import json_text, print_json, print_values, values_table
from consumers.web.listening import DASHBOARD_PORT, PAGE_PORT, PORT_ADVICE, listen

_WATCH_SECONDS = 2.0


Host = Annotated[str, typer.Option(help="Address to listen at; the default is reachable from this machine only.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes any free port.")]
ListeningFd = Annotated[int | None, typer.Option("--fd", hidden=True)]


def api(host: Host = "127.0.0.1", port: Port = PAGE_PORT, fd: ListeningFd = None) -> None:
    """Serve the history page and the read-only HTTP API until Ctrl-C.

    Example: trading-history api --port 8000
    """
    from consumers.web.api.api_server import serve

    with stack(database=True), _listening(host, port, fd) as listening:
        serve(listening)


def dashboard(host: Host = "127.0.0.1", port: Port = DASHBOARD_PORT, fd: ListeningFd = None) -> None:
    """Serve RQ Dashboard behind a login until Ctrl-C.

    Example: trading-history dashboard --port 9181
    """
    from consumers.web.dashboard.dashboard_server import serve

    with stack(redis=True), _listening(host, port, fd) as listening:
        serve(listening)


def _listening(host: str, port: int, fd: int | None) -> socket.socket:
    """Listen at the address, or take over the listening socket of the parent process."""
    return listen(host, port, advice=PORT_ADVICE) if fd is None else socket.socket(fileno=fd)


def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat every 2 s until Ctrl-C.")] = False,
) -> None:
    """Show row counts, queue, workers and outbox; exit status 1 if a part cannot be read or no worker runs.

    Example: trading-history status --watch
    """
    from consumers.ops.status import pipeline_status

    with stack(database=True, redis=True):
        if watch:
            _watch(as_json)
        values, healthy = pipeline_status()
    (print_json if as_json else print_values)(values)
    raise typer.Exit(0 if healthy else 1)


def _watch(as_json: bool) -> None:
    """Show the status every 2 s, for ever: in place on a terminal, otherwise as one block or JSON line each."""
    from consumers.ops.status import pipeline_status

    if as_json or not sys.stdout.isatty():
        while True:
            values, _ = pipeline_status()
            _print_block(values, as_json)
            time.sleep(_WATCH_SECONDS)
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            live.update(values_table({"at": time.strftime("%H:%M:%S"), **pipeline_status()[0]}), refresh=True)
            time.sleep(_WATCH_SECONDS)


def _print_block(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_text(values))
    else:
        print_values(values)
        print()
    sys.stdout.flush()
