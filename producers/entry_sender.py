"""Enqueues the entries of an outbox: pending entries, and overdue sent entries whose job is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

from redis import Redis

from producers.entries import Entry, EntryHead
from producers.outbox import Outbox
from producers.outbox_deliveries import LAST_CHECK_SECONDS
from producers.rq_queue import (
    ACTIVE_STATUSES,
    AnyHead,
    enqueue,
    in_no_list,
    job_states,
    queue_named,
    without_acknowledgement,
)

# Beside a caller that never pauses, each step of a batch waits up to 5 ms for the interpreter. With batches of
# 250 entries, 8 % more events per second are stored than with batches of 100; with 500 there is no further gain.
_BATCH_ENTRIES = 250
_MOST_ENTRIES = 4 * _BATCH_ENTRIES
# A worker needs one to four seconds for these, depending on the machine. More would only use memory of Redis.
_FULL_QUEUE_JOBS = 20_000
_FIRST_CHECK_SECONDS = 5.0
_LAST_CHECK_SECONDS = LAST_CHECK_SECONDS
_SEARCHED_CHECKS = 3  # after about 35 seconds
_SEARCHED_ENTRIES = 20  # per sweep: Redis needs time to find a job in a long queue
_CLOCK_SECONDS = 60.0  # how often Redis' clock is read
_random = random.SystemRandom()  # leaves the state of `random` to the caller's program


def _check_interval(checks: int) -> float:
    return min(_FIRST_CHECK_SECONDS * 2.0 ** min(checks, 10), _LAST_CHECK_SECONDS)


class EntrySender:
    """Sends the entries of one outbox to one queue.

    Raises:
        RedisError: from every method, when Redis cannot be reached; the current batch is unchanged.
        OutboxError: from every method, when the outbox cannot be read or written; the current batch is unchanged.
    """

    def __init__(self, outbox: Outbox, redis: Redis, queue: str) -> None:
        self._deliveries = outbox.deliveries
        self._redis = redis
        self._queue = queue_named(queue, redis)
        # True if Redis may have jobs of entries that are not marked as sent (a send failed, or its relay ended). The
        # next send then asks Redis for the jobs' states first.
        self.in_doubt = True
        # Whether the last call of `send_pending` sent its maximum, so that more entries may be pending.
        self.has_more = False
        self._queued_jobs = 0  # after the last send
        self._clock_read_at = 0.0
        self._redis_ahead = 0.0

    def send_pending(self, *, probe: bool, stopped: Callable[[], bool]) -> int:
        """Send pending entries while the queue has room, at most _MOST_ENTRIES of them; return how many were sent.

        The limit lets the relay do its other work in between. A batch that its size in bytes cuts short also ends the
        call.

        With `probe`, after a failure, the first batch is one entry: if Redis is still away, preparing a whole batch
        would only take time from the caller's threads.
        """
        sent = 0
        limit = 1 if probe else _BATCH_ENTRIES
        while sent < _MOST_ENTRIES and self._queue_has_room() and (entries := self._deliveries.pending(limit)):
            may_be_sent = self.in_doubt or any(entry.checks for entry in entries)
            gone = self._gone(entries, job_states(self._redis, entries)) if may_be_sent else entries
            self.in_doubt = True
            self._send(gone)
            # After a failure, the batch that failed remains in doubt: the next one begins with its second entry.
            self.in_doubt = not self._deliveries.mark_sent(_next_checks(entries)) or limit == 1
            sent += len(entries)
            if len(entries) < limit or stopped():
                break
            limit = _BATCH_ENTRIES
        self.has_more = sent >= _MOST_ENTRIES
        return sent

    def send_overdue(self) -> int:
        """Send overdue entries again if their job is lost, and return how many were sent."""
        heads = self._deliveries.overdue(_BATCH_ENTRIES)
        if not heads:
            return 0
        states = job_states(self._redis, heads)
        gone = self._gone(heads, states)
        # A job keeps its status when its worker dies. If it has been active for long, search the lists of jobs for it.
        searched = [h for h in heads if h.checks >= _SEARCHED_CHECKS and states[h.position] in ACTIVE_STATUSES]
        gone += in_no_list(self._redis, self._queue, searched[:_SEARCHED_ENTRIES])
        entries = self._deliveries.with_events(gone)
        self._send(entries)
        # Entries that did not fit into the batch stay overdue, for the next sweep.
        left = {head.position for head in gone[len(entries) :]}
        self._deliveries.postpone(_next_checks(head for head in heads if head.position not in left))
        return len(entries)

    def _gone(self, entries: Sequence[AnyHead], states: Mapping[int, str | None]) -> list[AnyHead]:
        """Return the entries that have neither an active job nor an acknowledgement."""
        inactive = [entry for entry in entries if states[entry.position] not in ACTIVE_STATUSES]
        return without_acknowledgement(self._redis, inactive)

    def _queue_has_room(self) -> bool:
        if self._queued_jobs >= _FULL_QUEUE_JOBS:
            self._queued_jobs = self._redis.llen(self._queue.key)
        return self._queued_jobs < _FULL_QUEUE_JOBS

    def _send(self, entries: Sequence[Entry]) -> None:
        """Enqueue all entries in one transaction of Redis."""
        if not entries:
            return
        with self._redis.pipeline(transaction=True) as pipe:
            enqueue(pipe, self._queue, entries, self._redis_now())
            self._queued_jobs = pipe.execute()[-1]

    def _redis_now(self) -> datetime:
        """Return the time by Redis' clock, which is the same for all hosts."""
        if time.monotonic() >= self._clock_read_at:
            seconds, microseconds = self._redis.time()
            self._redis_ahead = seconds + microseconds / 1e6 - time.monotonic()
            self._clock_read_at = time.monotonic() + _CLOCK_SECONDS
        return datetime.fromtimestamp(time.monotonic() + self._redis_ahead, UTC)


def _next_checks(entries: Iterable[EntryHead]) -> dict[int, float]:
    factor = _random.uniform(0.9, 1.1)  # so that outboxes that were started together do not check together
    return {entry.position: factor * _check_interval(entry.checks) for entry in entries}
