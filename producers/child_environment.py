"""Environment variables that keep the child processes of a test away from the real Redis and outbox."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

VARIABLES = ("REDIS_URL", "HISTORY_OUTBOX", "HISTORY_OUTBOX_KEEP", "HISTORY_QUEUE")

_REAP_POLLS, _REAP_POLL_SECONDS = 100, 0.005  # while it has children, the fork server ends later and is not reaped


@contextmanager
def redirected_children(outbox: Path, queue: str) -> Iterator[None]:
    """Make processes that are started in the block record to `outbox`, with a Redis that does not exist."""
    with _environment(outbox, queue), _fork_server():
        yield


@contextmanager
def _environment(outbox: Path, queue: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in VARIABLES}
    no_redis = f"unix://{outbox.parent}/no-redis"  # a socket that does not exist
    os.environ.update(zip(VARIABLES, (no_redis, str(outbox), "7", queue), strict=True))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _fork_server() -> Iterator[None]:
    """Use a new fork server in the block: the children of one that already runs have the environment from before.

    multiprocessing's own way to stop a fork server waits for all its children. This one is stopped by closing the pipe
    that the server and its children watch.
    """
    own = forkserver.ForkServer()
    own.set_forkserver_preload(list(forkserver._forkserver._preload_modules))  # type: ignore[attr-defined]  # not in its stubs
    names = ("ensure_running", "connect_to_new_process", "set_forkserver_preload")
    try:
        with patch.multiple(forkserver, **{name: getattr(own, name) for name in names}):
            yield
    finally:
        alive: int | None = own._forkserver_alive_fd  # type: ignore[attr-defined]  # likewise
        if alive is not None:
            os.close(alive)
            _reap(own._forkserver_pid)  # type: ignore[attr-defined]  # likewise


def _reap(pid: int) -> None:
    for _ in range(_REAP_POLLS):  # pragma: no branch - the server may end later than that
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:  # pragma: no cover - the program has already reaped it
            return
        time.sleep(_REAP_POLL_SECONDS)
