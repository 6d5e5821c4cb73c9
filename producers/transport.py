"""An outbox and the relay thread that carries its entries to Redis: the part of a producer that tests redirect."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from redis import Redis

from producers.entries import Accepted
from producers.errors import EventRejected
from producers.outbox import Outbox, Position
from producers.redis_url import place_of
from producers.relay import LAST_BACKOFF_SECONDS, Relay

_POLL_SECONDS = 0.02
_CHECK_NOW_SECONDS = 1.0  # how often `settle` has Redis asked about what was sent


class Transport:
    """Opens the outbox and starts its relay.

    With `relayed_by`, the id of a process, the relay runs in that process only, and not in a forked child.

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
        """In a forked child: make a new relay, since threads of the parent do not exist here."""
        self._prepare_relay()

    def wake_relay(self) -> None:
        """Have the relay look for new entries at once; start its thread if it does not run."""
        if self._relayed_by not in (None, os.getpid()):
            return
        if not self.relay.running:
            with self._starting:
                if not self.relay.running:
                    self.relay.start()
        self.relay.wake()

    def stop(self, seconds: float) -> None:
        """End the relay, which gets so many seconds for its last round, and close the outbox."""
        self.relay.stop(seconds)
        self.outbox.close()

    def flush(self, deadline: float | None) -> int:
        """Wait until Redis has all entries that are there now; returns how many it has not at the deadline."""
        left = self._counter(lambda until: self.outbox.pending_count(until=until))
        self._wait_until(lambda: not left(), deadline)
        return left()

    def settle(self, deadline: float | None, progress: Callable[[int], None] | None) -> int:
        """Wait until all entries that are there now are settled; returns how many are not at the deadline."""
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
        """Wait until Redis has all entries, and those of this producer are settled."""

        def is_settled() -> bool:
            left = self.outbox.pending_count() or self.outbox.unsettled_count(producer_id=producer_id)
            return not left and not self.outbox.quarantine.damaged_files()

        self._wait_until(is_settled, deadline)

    def wait(self, accepted: Accepted, timeout: float | None) -> int:
        """Return the row id of one entry; see `Receipt.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            entry = self.outbox.status_of(accepted)
            if entry.state in ("stored", "rejected"):
                break
            left = _POLL_SECONDS if deadline is None else min(_POLL_SECONDS, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(
                    f"event {accepted.event_id} was not acknowledged within {timeout} s;"
                    " it stays in the outbox and is retried"
                )
            self.relay.wait_for_results(left)
        if entry.row_id is None:
            raise EventRejected(str(accepted.event_id), entry.reason or "no reason given")
        return entry.row_id

    def _counter(self, count: Callable[[Position], int]) -> Callable[[], int]:
        """A function that counts, of the entries that are there now, those that `count` counts.

        A damaged file that is not salvaged yet counts as one entry. Entries that are salvaged from it later count too.
        """
        until, salvaging = self.outbox.last_position(), False

        def counted() -> int:
            nonlocal until, salvaging
            if self.outbox.quarantine.damaged_files():
                salvaging = True
            elif salvaging:  # their entries have positions behind all others now
                salvaging, until = False, self.outbox.last_position()
            left = count(until)  # first: it may find the file damaged
            return left + len(self.outbox.quarantine.damaged_files())

        return counted

    def _wait_until(self, condition: Callable[[], bool], deadline: float | None) -> None:
        """Until the condition holds, the deadline has passed, or no relay can run here."""
        while not condition():
            self.wake_relay()
            if not self.relay.running or (deadline is not None and time.monotonic() >= deadline):
                break
            self.relay.wait_for_results(_POLL_SECONDS)
