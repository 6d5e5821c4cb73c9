"""State that the threads of one worker share: the threads that work, the server that it waits for, its state in RQ."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from redis.exceptions import RedisError, ResponseError
from rq.suspension import is_suspended
from rq.worker import BaseWorker, WorkerStatus

from consumers.errors import StoreUnavailable
from consumers.ops.metrics import WAITED_FOR
from consumers.ops.redis_errors import is_unreachable, redis_problem
from producers.redis_url import redis_reason

logger = logging.getLogger(__name__)

DATABASE, REDIS = WAITED_FOR
_FORBIDDEN_SECONDS = 60


class SharedState:
    """The state of `worker`, whose threads may call every method at any time."""

    def __init__(self, worker: BaseWorker) -> None:
        self._worker = worker
        self._changed = threading.Condition()
        self._working = 0
        self._alone = False
        self._idle_since = time.monotonic()
        self._suspended = False
        self._waits_for: str | None = None
        self._waits_since = 0.0
        self._redis_is_unreachable = False
        self._forbidden_again_at: dict[str, float] = {}  # by error
        self._publishing = threading.Lock()
        self._published: str | None = None

    @contextmanager
    def working(self, *, alone: bool) -> Iterator[None]:
        """Mark the calling thread as working. If `alone`, wait until no other thread works, and let none begin."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = alone
            if alone:
                self._changed.wait_for(lambda: not self._working)
            self._working += 1
        try:
            self.publish()
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._alone = self._alone and not alone
                self._idle_since = time.monotonic()
                self._changed.notify_all()
        self.publish()  # not after an error: `note_outage` publishes the state if Redis can be reached

    def idle_seconds(self) -> float:
        """Return the seconds since a thread last worked."""
        with self._changed:
            return 0.0 if self._working else time.monotonic() - self._idle_since

    def suspended(self) -> bool:
        """Return whether RQ's workers are suspended (`rq suspend`) according to Redis, and publish a change."""
        before, self._suspended = self._suspended, bool(is_suspended(self._worker.connection, self._worker))
        if self._suspended != before:
            self.publish()
        return self._suspended

    def note_outage(self, error: RedisError | StoreUnavailable) -> None:
        """Note that a server failed. An outage is logged once, and published as the worker's state."""
        server = DATABASE if isinstance(error, StoreUnavailable) else REDIS
        with self._changed:
            self._redis_is_unreachable = is_unreachable(error)
            known, self._waits_for = self._waits_for, server
            if known is None:
                self._waits_since = time.monotonic()
        if known != server:
            reason = error.with_advice() if isinstance(error, StoreUnavailable) else redis_problem(error)
            logger.error("worker %s waits for %s and tries again: %s", self._worker.name, server, reason)
        if not is_unreachable(error):
            with suppress(RedisError):  # the outage is logged already
                self.publish()

    def note_forbidden(self, error: str) -> None:
        """Log that Redis forbids to write RQ's records of jobs: at most one line a minute for each error."""
        with self._changed:
            now = time.monotonic()
            if now < self._forbidden_again_at.get(error, now):
                return
            self._forbidden_again_at[error] = now + _FORBIDDEN_SECONDS
        logger.error(
            "worker %s stores the events, but cannot write RQ's records of their jobs: %s",
            self._worker.name, redis_reason(ResponseError(error)),
        )  # fmt: skip

    def note_progress(self, *, worked: bool) -> bool:
        """Note that a thread completed jobs (`worked`) or found nothing to do. Returns whether no outage is left.

        A thread that found nothing to do has not used the database. While another thread still works, it does not end
        an outage of the database.
        """
        with self._changed:
            if self._waits_for is None:
                return True
            if self._waits_for == DATABASE and self._working and not worked:
                return False
            self._waits_for = None
            self._redis_is_unreachable = False
            seconds = time.monotonic() - self._waits_since
        logger.warning("worker %s continues after %.0f s", self._worker.name, seconds)
        self.publish()
        return True

    @property
    def waits_for(self) -> str | None:
        """The server that the worker waits for: DATABASE, REDIS, or None."""
        return self._waits_for

    @property
    def redis_is_unreachable(self) -> bool:
        """Whether the last failure was that Redis did not answer."""
        return self._redis_is_unreachable

    def publish(self, *, always: bool = False) -> None:
        """Write the worker's state to its key in Redis, for RQ's commands, if it has changed or `always` is true."""
        with self._publishing:
            if self._waits_for is not None:
                state = f"waiting for {self._waits_for}"
            elif self._working:
                state = WorkerStatus.BUSY
            else:
                state = WorkerStatus.SUSPENDED if self._suspended else WorkerStatus.IDLE
            if always or state != self._published:
                self._published = None  # unknown if the next call fails
                self._worker.set_state(state)
                self._published = state
