"""Debian's pgbouncer in front of a test's PostgreSQL: each transaction may run on another server connection."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import make_url

from consumers.embedded import Addresses
from tests.ports import free_port, wait_until_it_listens

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


@contextmanager
def pooler(addresses: Addresses, folder: Path, *, pool_size: int = 5, more: str = "") -> Iterator[Addresses]:
    """Yield addresses whose PostgreSQL is reached through pgbouncer in transaction mode.

    No role needs a password. `more` is added to the configuration. PostgreSQL's account must be able
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
