"""The commands `api` and `dashboard`, which serve HTTP."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from consumers.embedded.stack import stack
from consumers.web.listening import DASHBOARD_PORT, PAGE_PORT, PORT_ADVICE, listen

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
