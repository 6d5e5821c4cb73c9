"""Debian's pgbouncer in front of a test's PostgreSQL: each transaction may run on another server connection."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import make_url

from consumers.embedded import Addresses

_CONFIGURATION = """\
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
auth_user = {owner}
pool_mode = transaction
max_client_conn = 200
default_pool_size = {pool_size}
{more}
"""


def free_port() -> int:
    """Return a port that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def pooler(addresses: Addresses, folder: Path, *, pool_size: int = 5, more: str = "") -> Iterator[Addresses]:
    """Yield addresses whose PostgreSQL is reached through pgbouncer in transaction mode.

    Each role that may log in needs no password. `more` is added to the configuration. PostgreSQL's account must be able
    to read `folder`.
    """
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    url, port = make_url(addresses.database_url), free_port()
    names, configuration = folder / "users", folder / "pgbouncer.ini"
    names.write_text(f'"{url.username}" ""\n')
    host, server_port = url.query.get("host", url.host), url.query.get("port", url.port) or 5432
    configuration.write_text(
        _CONFIGURATION.format(
            host=host,
            port=server_port,
            listen_port=port,
            users=names,
            owner=url.username,
            pool_size=pool_size,
            more=more,
        )
    )
    command = [program, "-q", str(configuration)]
    if os.geteuid() == 0:  # it refuses to run as root; only PostgreSQL's own account may use the socket
        command += ["-u", Path(str(host), f".s.PGSQL.{server_port}").owner()]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        wait_until_it_listens(process, port, folder / "log")
        through = make_url(addresses.database_url).set(host="127.0.0.1", port=port, query={})
        yield Addresses(through.render_as_string(hide_password=False), addresses.redis_url)
    finally:
        process.kill()
        process.wait()


def wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until a server that writes to `log` accepts connections.

    Raises:
        RuntimeError: It ended, or does not listen after 10 s.
    """
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not listen: {log.read_text()}")
