"""Keeps the child processes of a test away from the real Redis and outbox, by the environment that they inherit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

VARIABLES = ("REDIS_URL", "HISTORY_OUTBOX", "HISTORY_OUTBOX_KEEP", "HISTORY_QUEUE")

_REAP_POLLS, _REAP_POLL_SECONDS = 100, 0.005  # with children that live on it ends later, unreaped


@contextmanager
def redirected_children(outbox: Path, queue: str) -> Iterator[None]:
    """Have processes that are started in the block record to `outbox`, and find no Redis."""
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
    """A fork server for the block: one that runs already would give its children the environment from before.

    It is not stopped by multiprocessing's own means, which wait for all its children, but as they are: by closing the
    pipe that it and they watch.
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
    for _ in range(_REAP_POLLS):
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:  # the program waits for all children of this process
            return
        time.sleep(_REAP_POLL_SECONDS)
