"""How long a worker waits for an answer of PostgreSQL.

A server that is frozen but connected sends nothing, not even its own time limits: libpq would wait for ever, and a
worker could not stop meanwhile.
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

_LOOK_SECONDS = 0.5
_STOPPING_SECONDS = 5.0  # for answers, once the worker is asked to stop


class DatabaseWaits:
    """A limit on every wait of this process for PostgreSQL; longer ones end in an OperationalError.

    `answer_seconds` should be longer than the server's statement_timeout, whose error names the cause.
    """

    def __init__(self, answer_seconds: float, stopping: threading.Event) -> None:
        self._answer_seconds = answer_seconds
        self._stopping = stopping
        self._since: dict[int, float] = {}  # by thread
        self._stop_requested_at: float | None = None

    def seconds(self, thread: int | None) -> float:
        """Seconds that this thread has waited for PostgreSQL by now; 0 if it does not wait."""
        since = self._since.get(thread) if thread is not None else None
        return 0.0 if since is None else time.monotonic() - since

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Apply the limit to all threads of this process inside the block."""
        extensions.set_wait_callback(self._wait)
        try:
            yield
        finally:
            extensions.set_wait_callback(None)

    def _wait(self, connection: extensions.connection) -> None:
        # Connecting is waiting too; libpq's own limit does not hold here.
        connecting = connection.status == extensions.STATUS_SETUP
        limit = CONNECT_TIMEOUT_SECONDS if connecting else self._answer_seconds
        self._since[threading.get_ident()] = started = time.monotonic()
        try:
            while (state := connection.poll()) != extensions.POLL_OK:
                poller = select.poll()
                poller.register(connection.fileno(), select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
                if poller.poll(_LOOK_SECONDS * 1000):
                    continue
                now = time.monotonic()
                if self._stopping.is_set():
                    # For all waits together: one that fails may only lead to the next.
                    self._stop_requested_at = self._stop_requested_at or now
                    limit = min(limit, self._stop_requested_at - started + _STOPPING_SECONDS)
                if now - started > limit:
                    raise psycopg2.OperationalError(f"no answer from the server in {now - started:.0f} s")
        finally:
            del self._since[threading.get_ident()]
