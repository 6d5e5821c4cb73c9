"""Time limits for waits for PostgreSQL.

A frozen server keeps its connections but sends nothing, not even the error of a statement timeout. libpq would wait
without limit, and a worker could not stop meanwhile.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from psycopg2 import extensions

from consumers.db.engine import CONNECT_TIMEOUT_SECONDS

_POLL_SECONDS = 0.5
_STOPPING_SECONDS = 5.0  # limit of all waits together after a request to stop


class DatabaseWaits:
    """Limit for every wait of this process for PostgreSQL; a longer wait raises OperationalError.

    `answer_seconds` should be longer than the statement timeout, because the server's error names the cause.
    """

    def __init__(self, answer_seconds: float, stopping: threading.Event) -> None:
        self._answer_seconds = answer_seconds
        self._stopping = stopping
        self._since: dict[int, float] = {}  # by thread
        self._stop_requested_at: float | None = None

    def seconds(self, thread: int | None) -> float:
        """Return the seconds for which this thread has been waiting for PostgreSQL; 0 if it does not wait."""
        since = self._since.get(thread) if thread is not None else None
        return 0.0 if since is None else time.monotonic() - since

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Apply the limit to all threads of the process inside the block. psycopg2's COPY does not work there."""
        extensions.set_wait_callback(self._wait)
        try:
            yield
        finally:
            extensions.set_wait_callback(None)

    def _wait(self, connection: extensions.connection) -> None:
        # With a wait callback, libpq's connect_timeout has no effect.
        connecting = connection.status == extensions.STATUS_SETUP
        limit = CONNECT_TIMEOUT_SECONDS if connecting else self._answer_seconds
        self._since[threading.get_ident()] = started = time.monotonic()
        try:
            while (state := connection.poll()) != extensions.POLL_OK:
                poller = select.poll()
                poller.register(connection.fileno(), select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
                if poller.poll(_POLL_SECONDS * 1000):
                    continue
                now = time.monotonic()
                if self._stopping.is_set():
                    # One limit for all waits together, because a wait that fails may be followed by another.
                    self._stop_requested_at = self._stop_requested_at or now
                    limit = min(limit, self._stop_requested_at - started + _STOPPING_SECONDS)
                if now - started > limit:
                    raise psycopg2.OperationalError(f"no answer from the server in {now - started:.0f} s")
        finally:
            del self._since[threading.get_ident()]
