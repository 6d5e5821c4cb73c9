"""Listening sockets of the web servers, and the host names that they accept."""

from __future__ import annotations

import ipaddress
import socket
import sys

from producers.errors import HistoryError

PAGE_PORT = 8000
DASHBOARD_PORT = 9181  # rq-dashboard's own default
PORT_ADVICE = "choose another address with --host and --port"


def listen(host: str, port: int, *, advice: str = "") -> socket.socket:
    """Return a listening TCP socket. Port 0 takes any free port. An error ends with `advice`.

    Raises:
        HistoryError: The address cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python appends the address
        raise HistoryError(f"cannot listen at {host} port {port}: {reason}{advice and '; '}{advice}") from error


def usual_or_free_port(what: str, port: int, host: str = "127.0.0.1") -> socket.socket:
    """Return a socket that listens at this port. If the port is taken, use any free one and say so on stderr."""
    try:
        return listen(host, port)
    except HistoryError as error:
        sys.stderr.write(f"{what} uses another port this time: {error}\n")
        return listen(host, 0)


def url_of(listening: socket.socket) -> str:
    """Return the address of a listening socket, such as `http://127.0.0.1:8000/`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def is_local(listening: socket.socket) -> bool:
    """Return whether only this machine can reach the socket."""
    return is_loopback(listening.getsockname()[0])


def is_loopback(host: str) -> bool:
    """Return whether `host` is a loopback address."""
    name = host.partition("%")[0]
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def is_own_host(host: str) -> bool:
    """Return whether a Host header contains an IP address or `localhost`.

    On loopback, any other name is one that somebody pointed at this machine (DNS rebinding): their web page could then
    read this server as if it were its own.
    """
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name == "localhost" or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
