"""Kinds of Redis outages: each is a context manager that yields a client for a producer and ends the outage."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.faults.proxy import Mode, Proxy

ANSWER_SECONDS = 0.5  # time limit of these clients for an answer; a real producer's client waits longer


def _client(**target: object) -> Redis:
    limits = {"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": ANSWER_SECONDS}
    return Redis(**target, **limits, retry=Retry(NoBackoff(), 0))  # type: ignore[arg-type]  # keyword arguments


def _socket_of(redis_url: str) -> str:
    return str(Redis.from_url(redis_url).connection_pool.connection_kwargs["path"])


@contextmanager
def refused(redis_url: str, folder: Path) -> Iterator[Redis]:
    """Refuse connections: no server listens."""
    yield _client(host="127.0.0.1", port=1)


@contextmanager
def hanging(redis_url: str, folder: Path) -> Iterator[Redis]:
    """Accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield _client(host="127.0.0.1", port=server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def _through_proxy(mode: Mode) -> Callable[[str, Path], Iterator[Redis]]:
    def outage(redis_url: str, folder: Path) -> Iterator[Redis]:
        proxy = Proxy(folder / "proxy.sock", Path(_socket_of(redis_url)))
        with proxy.running():
            proxy.set_mode(mode)
            yield _client(unix_socket_path=str(folder / "proxy.sock"))
            proxy.set_mode("pass")

    return outage


slow = contextmanager(_through_proxy("delay"))
slow.__doc__ = "Delay each piece of data by 50 ms."


@contextmanager
def read_only(redis_url: str, folder: Path) -> Iterator[Redis]:
    """Make the server a replica of a master that is unreachable."""
    with Redis.from_url(redis_url) as administrator, ExitStack() as stack:
        administrator.replicaof("127.0.0.1", 1)
        stack.callback(administrator.replicaof, "no", "one")
        yield _client(unix_socket_path=_socket_of(redis_url))


@contextmanager
def out_of_memory(redis_url: str, folder: Path) -> Iterator[Redis]:
    """Reject writes: `maxmemory` is reached and no key may be evicted."""
    with Redis.from_url(redis_url) as administrator, ExitStack() as stack:
        administrator.config_set("maxmemory", 1)
        stack.callback(administrator.config_set, "maxmemory", 0)
        yield _client(unix_socket_path=_socket_of(redis_url))


@contextmanager
def wrong_password(redis_url: str, folder: Path) -> Iterator[Redis]:
    """Make the server require another password."""
    with Redis.from_url(redis_url) as administrator, ExitStack() as stack:
        administrator.config_set("requirepass", "right")  # this connection stays authenticated
        stack.callback(administrator.config_set, "requirepass", "")
        yield _client(unix_socket_path=_socket_of(redis_url), password="wrong")


@contextmanager
def unresolvable(redis_url: str, folder: Path) -> Iterator[Redis]:
    """Use a host name that does not exist."""
    yield _client(host="no-such-host.invalid")


OUTAGES = {
    "refused": refused,
    "hanging": hanging,
    "slow": slow,
    "read-only": read_only,
    "out of memory": out_of_memory,
    "wrong password": wrong_password,
    "unresolvable name": unresolvable,
}
