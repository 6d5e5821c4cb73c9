"""Cluster of a master, replicas and three Sentinels, as processes on loopback, with passwords."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from consumers.embedded.installation import installed
from producers.redis_url import redis_client

SERVICE = "history"
_PASSWORD, _SENTINEL_PASSWORD = "of the/data", "of the@sentinels"
_SENTINELS = 3
_DOWN_AFTER_MILLISECONDS = 1000
_START_SECONDS = 30.0


class Cluster:
    """Cluster of `servers` data servers, known by port; the first one is the initial master."""

    def __init__(self, folder: Path, servers: int = 3) -> None:
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        ports = _free_ports(servers + _SENTINELS)
        self._servers, self._sentinels = ports[:servers], ports[servers:]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._sentinels)
        login = f":{_PASSWORD.replace('/', '%2F')}"
        password = _SENTINEL_PASSWORD.replace("@", "%40")
        return f"redis+sentinel://{login}@{hosts}/{SERVICE}/0?sentinel_password={password}"

    def rq_settings(self) -> str:
        """Return the connection settings as a Python module for the `--config` option of RQ's commands."""
        instances = [("127.0.0.1", port) for port in self._sentinels]
        return (
            f"SENTINEL = {{'INSTANCES': {instances}, 'MASTER_NAME': {SERVICE!r},"
            f" 'PASSWORD': {_PASSWORD!r}, 'SOCKET_TIMEOUT': 5,"
            f" 'SENTINEL_KWARGS': {{'password': {_SENTINEL_PASSWORD!r}, 'socket_timeout': 1}}}}\n"
        )

    def master(self) -> int:
        """Return the port of the server that Sentinel names as the master."""
        with redis_client(self.url) as client:
            return int(client.info("server")["tcp_port"])

    def client(self, port: int) -> Redis:
        """Return a client of one server, without asking Sentinel."""
        return Redis(port=port, password=_PASSWORD, socket_timeout=2, retry=Retry(NoBackoff(), 0))

    def kill(self, port: int) -> None:
        process = self._processes.pop(port)
        process.kill()
        process.wait()

    def pause(self, port: int) -> None:
        self._processes[port].send_signal(signal.SIGSTOP)

    def resume(self, port: int) -> None:
        self._processes[port].send_signal(signal.SIGCONT)

    def wait_for_failover(self, before: int) -> None:
        """Wait until Sentinel names another master than `before`."""
        _until(lambda: self.master() != before)

    def wait_for_replica(self, port: int) -> None:
        """Wait until this server is a replica that is connected to its master."""
        _until(lambda: self.client(port).info("replication").get("master_link_status") == "up")

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            for port in self._servers:
                self._start(port, self._server_settings(port))
            for port in self._servers[1:]:
                self.wait_for_replica(port)
            for port in self._sentinels:
                self._start(port, self._sentinel_settings(port), "--sentinel")
            for port in self._sentinels:
                _until(lambda port=port: self._sees_all(port))  # type: ignore[misc]  # a default binds the loop's port
            yield
        finally:
            for process in self._processes.values():
                process.kill()  # works for a paused process too
            for process in self._processes.values():
                process.wait()

    def _start(self, port: int, settings: str, *arguments: str) -> None:
        home = self._folder / str(port)
        home.mkdir()
        conf = home / "server.conf"
        common = f"bind 127.0.0.1\nport {port}\ndir {home}\nlogfile {home / 'log'}\n"
        conf.write_text(common + settings)
        self._processes[port] = subprocess.Popen([str(installed().valkey), str(conf), *arguments])

    def _server_settings(self, port: int) -> str:
        master = self._servers[0]
        return (
            f'requirepass "{_PASSWORD}"\nmasterauth "{_PASSWORD}"\nappendonly yes\nsave ""\n'
            "maxmemory-policy noeviction\nrepl-diskless-sync-delay 0\n"
            + (f"replicaof 127.0.0.1 {master}\n" if port != master else "")
        )

    def _sentinel_settings(self, port: int) -> str:
        return (
            f'requirepass "{_SENTINEL_PASSWORD}"\n'
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._servers[0]} {_SENTINELS // 2 + 1}\n"
            f'sentinel auth-pass {SERVICE} "{_PASSWORD}"\n'
            f"sentinel down-after-milliseconds {SERVICE} {_DOWN_AFTER_MILLISECONDS}\n"
            f"sentinel failover-timeout {SERVICE} 5000\n"
        )

    def _sees_all(self, port: int) -> bool:
        with Redis(port=port, password=_SENTINEL_PASSWORD) as sentinel:
            known = sentinel.sentinel_master(SERVICE)
        return (known["num-slaves"], known["num-other-sentinels"]) == (len(self._servers) - 1, _SENTINELS - 1)


def _until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` is true; an error of Redis counts as false."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            if condition():
                return
        except RedisError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"condition not met in {_START_SECONDS:.0f} s: {error}") from error
        if time.monotonic() > deadline:
            raise TimeoutError(f"condition not met in {_START_SECONDS:.0f} s")
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in listening]
    for one in listening:
        one.close()
    return ports
