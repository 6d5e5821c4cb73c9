"""PostgreSQL and Valkey (a Redis-compatible server) for one machine, installed from wheels.

All files are in one folder, `home`: `postgres/`, `valkey/`, a log of each, and two lock files. A process locks `lock`
while it starts or stops the servers. Each `servers()` and `counted_as_user()` block has a shared lock on `users`; a
block that can make this lock exclusive is the last one, and stops the servers. The kernel releases the locks of a
killed process, so the number of users is never wrong.

Both servers listen on unix sockets only, which only their owner and root can open, so they need no passwords.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from consumers.embedded import postgres, valkey
from consumers.embedded.installation import Installation, installed, let_in
from consumers.embedded.server_process import Server, StillStarting
from consumers.errors import EmbeddedError

_Start = Callable[[Server, Path, Installation, IO[str]], str]
_SERVERS: tuple[tuple[Callable[[Path], Server], _Start], ...] = (
    (postgres.server, postgres.start),
    (valkey.server, valkey.start),
)


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
    with _translated(home):
        home.mkdir(mode=0o711 if installation.account else 0o700, parents=True, exist_ok=True)
    with counted_as_user(home):
        with _translated(home), _locked(home / "lock") as lock:
            folder = _socket_folder(home)
            if installation.account:  # pragma: no branch - the gate runs as root
                let_in(installation, home)
            database, transport = (start(make(home), folder, installation, lock) for make, start in _SERVERS)
        yield Addresses(database, transport)


@contextlib.contextmanager
def counted_as_user(home: Path) -> Iterator[None]:
    """Be a user of the servers in `home` inside the block, without starting them.

    A child process of a `servers()` block is one if they must stop with it after its parent was killed.
    """
    owner = os.getpid()
    with _translated(home):
        users = _open(home / "users")
    with users:
        fcntl.flock(users, fcntl.LOCK_SH)
        is_left_running = False
        try:
            yield
        except StillStarting:
            is_left_running = True
            raise
        finally:
            # A forked child (RQ's work horse) has the lock too, but must not stop the servers.
            if os.getpid() == owner and not is_left_running:
                with _locked(home / "lock"):
                    _leave(users, home)


def restart_functions(home: Path) -> Iterator[tuple[Server, Callable[[], None]]]:
    """Yield each server of a `servers()` block with the function that starts it, unless it runs, at the same address.

    The function raises EmbeddedError if the server does not start.
    """
    home = home.expanduser().resolve()
    for make, start in _SERVERS:
        yield make(home), functools.partial(_start_again, home, make, start)


def _start_again(home: Path, make: Callable[[Path], Server], start: _Start) -> None:
    with _translated(home), _locked(home / "lock") as lock:
        start(make(home), _socket_folder(home), installed(), lock)


def _leave(users: IO[str], home: Path) -> None:
    """Stop the servers unless another process uses them. The caller has locked `lock`."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    try:
        for make, _ in _SERVERS:
            make(home).stop()
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
