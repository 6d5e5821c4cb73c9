"""Where a server of ours listens, and under which names it may be asked."""

from __future__ import annotations

import ipaddress
import socket

from producers.errors import HistoryError

DASHBOARD_PORT = 9181  # where rq-dashboard is usually found


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any that is free.

    Raises:
        HistoryError: the address cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python repeats the address there
        raise HistoryError(f"cannot listen at {host} port {port}: {reason}") from error


def url_of(listening: socket.socket) -> str:
    """`http://127.0.0.1:8000/`"""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def is_local(listening: socket.socket) -> bool:
    """Only this machine can reach it."""
    return is_loopback(listening.getsockname()[0])


def is_loopback(host: str) -> bool:
    """`host` is an address that only this machine can reach."""
    name = host.partition("%")[0]
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def is_own_host(host: str) -> bool:
    """The Host header has an address or `localhost`.

    On loopback any other name was made to point here (DNS rebinding), so that a web page could ask as its own server.
    """
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name == "localhost" or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
