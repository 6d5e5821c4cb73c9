"""The embedded PostgreSQL: data directory, start, and database."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import quote

from consumers.embedded.installation import Installation
from consumers.embedded.server_process import START_SECONDS, Server, checked, run
from consumers.errors import EmbeddedError

DATABASE = "trading_history"
SOCKET = ".s.PGSQL.5432"
_CONNECT_SECONDS = "2"  # a frozen server accepts connections and sends nothing


def server(home: Path) -> Server:
    """Return the PostgreSQL server whose files are in `home`."""
    data = home / "postgres"
    # SIGINT is the fast shutdown, SIGQUIT the immediate one. SIGTERM would wait until all clients disconnect.
    fast = ((signal.SIGINT, 60), (signal.SIGQUIT, 5), (signal.SIGKILL, 5))
    return Server("PostgreSQL", "postgres", data / "postmaster.pid", data, home / "postgres.log", fast)


def start(postgres: Server, folder: Path, installation: Installation, lock: IO[str]) -> str:
    """Start PostgreSQL if necessary, with its data and our database, and return its URL.

    `folder` is its home, or a link to it with a short, plain path.
    """
    _ensure_data(postgres.argument, installation, lock)
    url = "postgresql://postgres@/{}?host=" + quote(str(folder / "postgres"), safe="")
    psql = functools.partial(run, installation.postgres_bin / "psql", "-XAtqd", url.format("postgres"), "-c")
    launch = functools.partial(_launch, postgres, folder, installation, lock)
    postgres.bring_up(lambda: psql("select 1", PGCONNECT_TIMEOUT=_CONNECT_SECONDS).returncode == 0, launch)
    if DATABASE not in psql("select datname from pg_database").stdout.split():
        checked(psql(f"create database {DATABASE}"))
    return url.format(DATABASE)


def _launch(postgres: Server, folder: Path, installation: Installation, lock: IO[str]) -> None:
    # If any process has the pid in these files, PostgreSQL takes it for a running server. Without them, its shared
    # memory, whose key depends on the data directory, still prevents a second server.
    for stale in (postgres.pid_file, postgres.argument / f"{SOCKET}.lock"):
        stale.unlink(missing_ok=True)
    postgres.log.touch(mode=0o600)
    if installation.account:  # pragma: no branch - the gate runs as root
        os.chown(postgres.log, installation.account.pw_uid, installation.account.pw_gid)
    # pg_ctl passes -D and -l to a shell without escaping. PGDATA, -o and the plain `folder` avoid unusual paths there.
    data, sockets = shlex.quote(str(postgres.argument)), shlex.quote(str(folder / "postgres"))
    options = f"-D {data} -h '' -p 5432 -k {sockets} -c unix_socket_permissions=0700"
    command = ("start", "-w", "-t", START_SECONDS, "-l", folder / postgres.log.name, "-o", options)
    deadline = time.monotonic() + START_SECONDS
    while True:
        result = run(
            installation.postgres_bin / "pg_ctl", *command,
            account=installation.account, keep=lock, PGDATA=str(postgres.argument),
        )  # fmt: skip
        if result.returncode == 0 or postgres.process():  # the second: it is still recovering
            return
        # The children of a killed server need a moment to notice that and to detach its shared memory.
        if "still in use" not in postgres.last_lines(4) or time.monotonic() > deadline:
            raise postgres.error("did not start")
        time.sleep(0.1)


def _ensure_data(data: Path, installation: Installation, lock: IO[str]) -> None:
    """Create the data directory atomically, or check that its version is the installed one."""
    if data.exists():
        found = (data / "PG_VERSION").read_text().strip()
        if found != installation.postgres_version:
            raise EmbeddedError(
                f"{data} was written by PostgreSQL {found}, but PostgreSQL {installation.postgres_version} is"
                " installed: dump it with the old version, or set HISTORY_HOME to another folder"
            )
        return
    new = data.with_name("postgres.new")  # initdb cannot continue where a killed one stopped
    while new.exists():
        with suppress(FileNotFoundError):  # processes that the killed initdb started may still delete their files
            shutil.rmtree(new)
    new.mkdir(mode=0o700)
    if installation.account:  # pragma: no branch - the gate runs as root
        os.chown(new, installation.account.pw_uid, installation.account.pw_gid)
    initdb = ("-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "-D", new)
    checked(run(installation.postgres_bin / "initdb", *initdb, account=installation.account, keep=lock))
    new.rename(data)
