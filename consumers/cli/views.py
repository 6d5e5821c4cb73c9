"""The commands `api` and `dashboard`, which serve HTTP."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from consumers.embedded.stack import stack
from consumers.web.listening import DASHBOARD_PORT

Host = Annotated[str, typer.Option(help="Address to listen at; the default is reachable from this machine only.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes any free port.")]


def api(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Serve the history page and the read-only HTTP API until Ctrl-C.

    Example: trading-history api --port 8000
    """
    from consumers.web.api.api_server import serve

    with stack(database=True):
        serve(host, port)


def dashboard(
    host: Host = "127.0.0.1",
    port: Port = DASHBOARD_PORT,
    fd: Annotated[int | None, typer.Option("--fd", hidden=True)] = None,
    while_stdin: Annotated[bool, typer.Option("--while-stdin", hidden=True)] = False,
) -> None:
    """Serve RQ Dashboard behind a login until Ctrl-C.

    Example: trading-history dashboard --port 9181
    """
    from consumers.embedded.child_processes import stop_with_stdin
    from consumers.web.dashboard.dashboard_server import serve
    from consumers.web.listening import PORT_ADVICE, listen

    if while_stdin:
        stop_with_stdin()
    with (
        stack(redis=True),
        listen(host, port, advice=PORT_ADVICE) if fd is None else socket.socket(fileno=fd) as listening,
    ):
        serve(listening)
