"""PostgreSQL and Valkey (a Redis-compatible server) for one machine, installed from wheels.

All files are in one folder, `home`: `postgres/`, `valkey/`, a log of each, and two lock files. A process locks `lock`
while it starts or stops the servers. Each `servers()` block has a shared lock on `users`; a block that can make this
lock exclusive is the last one, and stops the servers. The kernel releases the locks of a killed process, so the number
of users is never wrong.

Both servers listen on unix sockets only, which only their owner and root can open, so they need no passwords.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from consumers.embedded import postgres, valkey
from consumers.embedded.installation import Installation, installed, let_in
from consumers.embedded.server_process import Server, StillStarting
from consumers.errors import EmbeddedError


@dataclass(frozen=True)
class Addresses:
    """URLs of the running servers: for libpq and SQLAlchemy, and for redis-py and RQ."""

    database_url: str
    redis_url: str


def default_home() -> Path:
    """Return the folder of the embedded servers if HISTORY_HOME is not set."""
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root, and its account must reach the folder. /root should stay closed.
        return Path("/var/lib/trading-history")
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if os.path.isabs(data) else Path.home() / ".local/share") / "trading-history"


@contextlib.contextmanager
def servers(home: Path) -> Iterator[Addresses]:
    """Run both servers inside the block; the last such block of all processes stops them.

    `home` keeps the data and belongs to one user. If a process that uses the servers is killed, they continue, and the
    next block shares and stops them. As root, it opens folders above `home` and above the programs for search
    (chmod o+x) if PostgreSQL's account cannot enter them, and prints each of them on stderr.

    Raises:
        EmbeddedError: a server failed; the message has the last lines of its log.
    """
    home = home.expanduser().resolve()
    installation = installed()
    pair = (postgres.server(home), valkey.server(home))
    with _translated(home):
        home.mkdir(mode=0o711 if installation.account else 0o700, parents=True, exist_ok=True)
        users = _open(home / "users")
    owner = os.getpid()
    with users:
        with _translated(home), _locked(home / "lock") as lock:
            fcntl.flock(users, fcntl.LOCK_SH)
            try:
                addresses = _start(home, *pair, installation, lock)
            except StillStarting:
                raise
            except BaseException:
                _leave(users, pair)
                raise
        try:
            yield addresses
        finally:
            if os.getpid() == owner:  # a forked child (RQ's work horse) has the lock too, but must not stop the servers
                with _locked(home / "lock"):
                    _leave(users, pair)


def _start(home: Path, database: Server, transport: Server, installation: Installation, lock: IO[str]) -> Addresses:
    folder = _socket_folder(home)
    if installation.account:
        let_in(installation, home)
    return Addresses(
        database_url=postgres.start(database, folder, installation, lock),
        redis_url=valkey.start(transport, folder, installation, lock),
    )


def _leave(users: IO[str], pair: tuple[Server, Server]) -> None:
    """Stop the servers unless another process uses them. The caller has locked `lock`."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    try:
        for server in pair:
            server.stop()
    finally:
        fcntl.flock(users, fcntl.LOCK_UN)  # closing the file does not unlock it while a forked child has it open


def _socket_folder(home: Path) -> Path:
    """Return `home`, or a short link to it: a socket's path has at most 103 bytes, and libpq splits it at commas."""
    if len(os.fsencode(home / "postgres" / postgres.SOCKET)) < 100 and re.fullmatch(r"[\w./-]+", str(home), re.ASCII):
        return home
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    # PostgreSQL's account cannot enter root's runtime folder.
    base = runtime if os.geteuid() and os.path.isdir(runtime) else tempfile.gettempdir()
    link = Path(base, f"trading-history-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}")
    with contextlib.suppress(FileExistsError):
        link.symlink_to(home)
    if link.lstat().st_uid != os.geteuid() or not link.is_symlink() or link.readlink() != home:
        raise EmbeddedError(f"{link} is not our link to {home}: remove it, or set HISTORY_HOME to a shorter path")
    return link


def _open(path: Path) -> IO[str]:
    return open(path, "a", opener=lambda name, flags: os.open(name, flags, 0o600))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with _open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _translated(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedError(f"the embedded servers cannot use {home}: {error}") from error
