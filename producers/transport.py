"""The part of a producer that tests can redirect: an outbox, and the relay thread that sends its entries to Redis."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from redis import Redis

from producers.entries import Accepted, EntryStatus
from producers.errors import EventRejected, HistoryError
from producers.outbox import Outbox, Position
from producers.redis_url import place_of
from producers.relay import LAST_BACKOFF_SECONDS, Relay
from producers.times import deadline_after

_POLL_SECONDS = 0.02
_CHECK_NOW_SECONDS = 1.0  # how often `settle` makes the relay check the jobs of sent entries


class Transport:
    """An open outbox and its relay thread.

    If `relayed_by` is a process id, the relay runs in that process only, and not in a forked child; 0 is no process.

    Raises:
        OutboxError: the outbox cannot be opened.
    """

    def __init__(
        self,
        redis: Redis,
        queue: str,
        outbox: Path | str,
        *,
        keep_seconds: float,
        last_backoff_seconds: float = LAST_BACKOFF_SECONDS,
        relayed_by: int | None = None,
    ) -> None:
        self._redis = redis
        self._queue = queue
        self._keep_seconds = keep_seconds
        self._last_backoff_seconds = last_backoff_seconds
        self._relayed_by = relayed_by
        self.outbox = Outbox(outbox, repair=True)
        self.outbox.set_destination(place_of(redis), queue)
        self._prepare_relay()
        self.wake_relay()

    def _prepare_relay(self) -> None:
        self._starting = threading.Lock()
        self.relay = Relay(
            self.outbox,
            self._redis,
            self._queue,
            keep_seconds=self._keep_seconds,
            last_backoff_seconds=self._last_backoff_seconds,
        )

    def after_fork(self) -> None:
        """Make a new relay in a forked child, where the threads of the parent do not exist."""
        self._prepare_relay()

    def wake_relay(self) -> None:
        """Make the relay read new entries at once. Start its thread if it does not run."""
        if self._relayed_by not in (None, os.getpid()):
            return
        if not self.relay.running:
            with self._starting:
                if not self.relay.running:  # pragma: no branch - another thread may have started it meanwhile
                    self.relay.start()
        self.relay.wake()

    def stop(self, seconds: float) -> None:
        """Stop the relay, waiting at most `seconds` for its last round, and close the outbox."""
        self.relay.stop(seconds)
        self.outbox.close()

    def flush(self, deadline: float | None) -> int:
        """Wait until Redis has all present entries. Return the number that it does not have at the deadline."""
        left = self._counter(lambda until: self.outbox.pending_count(until=until))
        self._wait_until(lambda: not left(), deadline)
        return left()

    def settle(self, deadline: float | None, progress: Callable[[int], None] | None) -> int:
        """Wait until all present entries are settled. Return the number of unsettled ones at the deadline."""
        check_at = 0.0
        count = self._counter(lambda until: self.outbox.unsettled_count(until=until))

        def is_settled() -> bool:
            nonlocal check_at
            left = count()
            if progress is not None:
                progress(left)
            if left and time.monotonic() >= check_at:
                self.outbox.check_now(self.outbox.last_position())
                check_at = time.monotonic() + _CHECK_NOW_SECONDS
            return not left

        self._wait_until(is_settled, deadline)
        return count()

    def settle_own(self, producer_id: int, deadline: float) -> None:
        """Wait until Redis has all entries and those of this producer are settled, or until the deadline."""

        def is_settled() -> bool:
            left = self.outbox.pending_count() or self.outbox.unsettled_count(producer_id=producer_id)
            return not left and not self.outbox.quarantine.damaged_files()

        self._wait_until(is_settled, deadline)

    def wait(self, accepted: Accepted, timeout: float | None) -> int:
        """Wait until one entry is stored and return the id of its row; see `Receipt.wait`."""
        deadline = deadline_after(timeout)
        while True:
            (outcome,) = self.outcomes([accepted])
            if isinstance(outcome, int):
                return outcome
            if outcome is not None:
                raise outcome
            left = _POLL_SECONDS if deadline is None else min(_POLL_SECONDS, deadline - time.monotonic())
            if left <= 0:
                raise late(accepted, timeout)
            self.relay.wait_for_results(left)

    def outcomes(self, accepted: Sequence[Accepted]) -> list[int | HistoryError | None]:
        """Return the row id of each event, the error that `wait` raises for it, or None if it is not settled."""
        return list(map(self._outcome, accepted, self.outbox.statuses_of(accepted)))

    def _outcome(self, accepted: Accepted, status: EntryStatus | None) -> int | HistoryError | None:
        if status is None:
            return self.outbox.no_longer_kept(accepted)
        if status.state not in ("stored", "rejected"):
            return None
        if status.row_id is None:
            return EventRejected(str(accepted.event_id), status.reason or "no reason given")
        return status.row_id

    def _counter(self, count: Callable[[Position], int]) -> Callable[[], int]:
        """Return a function that calls `count` with the position of the newest present entry.

        To its result, it adds one for each damaged file that is not salvaged yet. Entries that are salvaged from such a
        file later count too.
        """
        until, salvaging = self.outbox.last_position(), False

        def counted() -> int:
            nonlocal until, salvaging
            if self.outbox.quarantine.damaged_files():
                salvaging = True
            elif salvaging:  # the salvaged entries now have the highest positions
                salvaging, until = False, self.outbox.last_position()
            left = count(until)  # before counting damaged files, because it may find that the outbox is damaged
            return left + len(self.outbox.quarantine.damaged_files())

        return counted

    def _wait_until(self, condition: Callable[[], bool], deadline: float | None) -> None:
        """Wait until the condition is true, the deadline has passed, or no relay can run in this process."""
        while not condition():
            self.wake_relay()
            if not self.relay.running or (deadline is not None and time.monotonic() >= deadline):
                break
            self.relay.wait_for_results(_POLL_SECONDS)


def late(accepted: Accepted, timeout: float | None) -> TimeoutError:
    """Return the error of a wait that ends without an outcome."""
    return TimeoutError(
        f"event {accepted.event_id} was not acknowledged within {timeout} s; it stays in the outbox and is retried"
    )
