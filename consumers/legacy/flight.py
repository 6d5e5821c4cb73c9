"""Deliveries on their way through the queue, few enough that live events hardly wait behind them.

What a relay does for an outbox, for a source that can be read again: it needs no file of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from redis import Redis, RedisError
from rq import Queue, Worker
from rq.serializers import JSONSerializer

from producers.acknowledgements import Outcome, read_acknowledgements
from producers.entries import Entry
from producers.redis_keys import acknowledgement_key
from producers.rq_queue import UNDER_WAY, enqueue, in_no_list, job_states, unanswered
from producers.times import backoff_seconds

FEWEST_JOBS, MOST_JOBS = 50, 4000
_WORK_SECONDS = 0.5  # of the workers, waiting in the queue
_MEASURED_SECONDS = 1.0
_MOST_CHARACTERS = 2 * 1024 * 1024  # of events under way: as many large ones take the workers longer
_BATCH_JOBS = 200
_PAUSE_SECONDS = 0.01
_CHECK_SECONDS = 5.0
_DOUBTED_CHECKS = 6
_DOUBTED_JOBS = 20  # a check: finding one in a long queue takes Redis a while
_FIRST_BACKOFF_SECONDS = 0.02
_LAST_BACKOFF_SECONDS = 2.0


class Window:
    """How many jobs may be under way: what the workers have lately done in half a second."""

    def __init__(self, now: float) -> None:
        self._settled = 0
        self._marks = deque([(now, 0)])
        self.jobs = FEWEST_JOBS

    def settled(self, count: int, now: float) -> None:
        """So many more were acknowledged by `now`, in seconds of any clock."""
        self._settled += count
        self._marks.append((now, self._settled))
        while len(self._marks) > 2 and self._marks[1][0] < now - _MEASURED_SECONDS:
            self._marks.popleft()
        since, before = self._marks[0]
        rate = (self._settled - before) / max(now - since, _PAUSE_SECONDS)
        self.jobs = max(FEWEST_JOBS, min(MOST_JOBS, round(rate * _WORK_SECONDS)))


class Flight:
    """Carries the entries of one source. `settled` hears each entry's outcome once; `say` what hinders it.

    Redis and workers may be away for any time: it waits, says so once, and goes on.
    """

    def __init__(
        self,
        redis: Redis,
        queue: str,
        source: str,
        *,
        settled: Callable[[int, Outcome], None],
        say: Callable[[str], None],
    ) -> None:
        self._redis = redis
        self._queue = Queue(queue, connection=redis, serializer=JSONSerializer)
        self._source = source
        self._key = acknowledgement_key(source)
        self._settled = settled
        self._say = say
        self._under_way: dict[int, Entry] = {}
        self._checks: dict[int, int] = {}
        self._characters = 0
        self._sent = 0
        self._window = Window(time.monotonic())
        self._check_at = time.monotonic() + _CHECK_SECONDS
        self._failures = 0
        self._complained = False
        self._cleared = False

    def send(self, entries: Iterable[Entry]) -> None:
        """Hand over all of them, as fast as there is room; returns while the last ones are still under way."""
        waiting = deque(entries)
        while waiting:
            batch: list[Entry] = []
            while waiting and len(batch) < _BATCH_JOBS and self._has_room():
                entry = waiting.popleft()
                self._under_way[entry.sequence] = entry
                self._characters += len(entry.event)
                batch.append(entry)
            self._sweep(batch)

    def drain(self) -> None:
        """Wait until all are settled. Nothing is left in Redis of this source then."""
        while self._under_way:
            self._sweep([])

    def _has_room(self) -> bool:
        return not self._under_way or (len(self._under_way) < self._window.jobs and self._characters < _MOST_CHARACTERS)

    def _sweep(self, batch: Sequence[Entry]) -> None:
        try:
            taken = self._exchange(batch)
        except RedisError as error:
            self._wait_for_redis(error)
            return
        if self._failures:
            self._failures = 0
            self._say("Redis is back, going on")
        if not taken and not batch:
            time.sleep(_PAUSE_SECONDS)

    def _exchange(self, batch: Sequence[Entry]) -> int:
        if not self._cleared:
            # Words on deliveries to an earlier database. What this one has was read from it, later than these.
            self._redis.delete(self._key)
            self._cleared = True
        taken = self._take_acknowledgements()
        if self._failures:
            self._check()  # the batch that failed included: it may have arrived, or not
        elif batch:
            self._enqueue(self._not_left_over(batch))
        if time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + _CHECK_SECONDS
            self._look_after_overdue()
        return taken

    def _enqueue(self, entries: Sequence[Entry]) -> None:
        for first in range(0, len(entries), _BATCH_JOBS):
            with self._redis.pipeline(transaction=True) as pipe:
                enqueue(pipe, self._queue, entries[first : first + _BATCH_JOBS])
                pipe.execute()

    def _not_left_over(self, batch: Sequence[Entry]) -> Sequence[Entry]:
        """Without those that an import which died has left in the queue: at most a full window of them."""
        self._sent += len(batch)
        if self._sent > MOST_JOBS + _BATCH_JOBS:
            return batch
        states = job_states(self._redis, batch)
        return [entry for entry in batch if states[entry.position] not in UNDER_WAY]

    def _take_acknowledgements(self) -> int:
        told: dict[Any, Any] = self._redis.hgetall(self._key)
        found = read_acknowledgements(told, self._source).values()
        taken = sum(self._settle(one.sequence, one.outcome) for one in found if one is not None)
        if told:
            self._redis.hdel(self._key, *told)
        if taken:
            self._complained = False
            self._check_at = time.monotonic() + _CHECK_SECONDS
        self._window.settled(taken, time.monotonic())
        return taken

    def _settle(self, sequence: int, outcome: Outcome) -> bool:
        """Whether it is the first word on an entry under way."""
        entry = self._under_way.pop(sequence, None)
        if entry is None:
            return False
        self._checks.pop(sequence, None)
        self._characters -= len(entry.event)
        self._settled(sequence, outcome)
        return True

    def _look_after_overdue(self) -> None:
        """Nothing was acknowledged for long: is it still on its way, and does anybody work on it?"""
        for sequence in self._under_way:
            self._checks[sequence] = self._checks.get(sequence, 0) + 1
        self._check()
        if self._under_way and not self._complained and not Worker.count(queue=self._queue):
            self._say("no worker is running: waiting for one (trading-history worker)")
            self._complained = True

    def _check(self) -> None:
        """Send again what is no longer on its way, whatever became of its job."""
        entries = list(self._under_way.values())
        states = job_states(self._redis, entries)
        gone = unanswered(self._redis, [entry for entry in entries if states[entry.position] not in UNDER_WAY])
        # A status outlives its worker: what has been under way for long must also be somewhere.
        doubted = [
            entry
            for entry in entries
            if states[entry.position] in UNDER_WAY and self._checks.get(entry.sequence, 0) >= _DOUBTED_CHECKS
        ]
        self._enqueue([*gone, *in_no_list(self._redis, self._queue, doubted[:_DOUBTED_JOBS])])

    def _wait_for_redis(self, error: RedisError) -> None:
        self._failures += 1
        if self._failures == 1:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._say(f"waiting for Redis: {reason}")
        time.sleep(backoff_seconds(self._failures, first=_FIRST_BACKOFF_SECONDS, last=_LAST_BACKOFF_SECONDS))
