"""What the lanes of one worker have in common: who of them works now, what they wait for, what operators see of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq.suspension import is_suspended
from rq.worker import BaseWorker, WorkerStatus

from consumers.errors import StoreUnavailable

logger = logging.getLogger(__name__)

# What they may wait for.
DATABASE, REDIS = "the database", "Redis"


def is_away(error: Exception) -> bool:
    """Redis did not answer: asking it for more would only take as long again."""
    return isinstance(error, RedisConnectionError | RedisTimeoutError)


class Crew:
    """The lanes of `worker`, for as long as it runs; any thread of it may call any of its methods."""

    def __init__(self, worker: BaseWorker) -> None:
        self._worker = worker
        self._changed = threading.Condition()
        self._working = 0
        self._alone = False
        self._idle_since = time.monotonic()
        self._suspended = False
        self._trouble: str | None = None
        self._trouble_since = 0.0
        self._redis_is_away = False
        self._showing = threading.Lock()
        self._shown: str | None = None

    @contextmanager
    def working(self, *, alone: bool) -> Iterator[None]:
        """Inside the block the caller works, beside others or while no other does."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = alone
            if alone:
                self._changed.wait_for(lambda: not self._working)
            self._working += 1
        try:
            self.show()
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._alone = self._alone and not alone
                self._idle_since = time.monotonic()
                self._changed.notify_all()
        self.show()  # not after an error: `failed` shows more, if Redis can be asked at all

    def idle_seconds(self) -> float:
        """For how long none of them has worked."""
        with self._changed:
            return 0.0 if self._working else time.monotonic() - self._idle_since

    def suspended(self) -> bool:
        """Whether somebody has told RQ's workers to take nothing new."""
        before, self._suspended = self._suspended, bool(is_suspended(self._worker.connection, self._worker))
        if self._suspended != before:
            self.show()
        return self._suspended

    def failed(self, error: RedisError | StoreUnavailable) -> None:
        """Say it once and wherever operators look."""
        trouble = DATABASE if isinstance(error, StoreUnavailable) else REDIS
        with self._changed:
            self._redis_is_away = is_away(error)
            known, self._trouble = self._trouble, trouble
            if known is None:
                self._trouble_since = time.monotonic()
        if known != trouble:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.error("worker %s waits for %s and tries again: %s", self._worker.name, trouble, reason)
        if not is_away(error):
            with suppress(RedisError):  # whatever it refuses, the log has it
                self.show()

    def passed(self, *, worked: bool) -> bool:
        """One of them has done its work, or found nothing to do; then nobody may know yet that the database is back.

        Whether nothing is waited for any more.
        """
        with self._changed:
            if self._trouble is None:
                return True
            if self._trouble == DATABASE and self._working and not worked:
                return False
            self._trouble = None
            self._redis_is_away = False
            seconds = time.monotonic() - self._trouble_since
        logger.warning("worker %s goes on after %.0f s", self._worker.name, seconds)
        self.show()
        return True

    @property
    def waits_for(self) -> str | None:
        """`the database`, `Redis`, or nothing."""
        return self._trouble

    @property
    def redis_is_away(self) -> bool:
        """As far as the last of them to ask it knows."""
        return self._redis_is_away

    def show(self, *, again: bool = False) -> None:
        """Write the worker's state where RQ has it, if it has changed; `again`: in any case."""
        with self._showing:
            if self._trouble is not None:
                state = f"waiting for {self._trouble}"
            elif self._working:
                state = WorkerStatus.BUSY
            else:
                state = WorkerStatus.SUSPENDED if self._suspended else WorkerStatus.IDLE
            if again or state != self._shown:
                self._shown = None  # unknown, should this fail
                self._worker.set_state(state)
                self._shown = state
