"""Carries entries from the outbox to the queue, and acknowledgements back.

A sweep takes what consumers acknowledged, hands over what is pending, and looks after what has been under way
for long: it reads the states of those jobs and sends again only what is no longer on its way. Of all threads
and processes on one outbox, one relays at a time; when it ends or dies, the next one takes over. While a relay process
(`trading-history relay`) has a heartbeat, the threads of producers leave relaying to it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from redis import Redis, RedisError, WatchError
from redis.exceptions import ResponseError
from rq import Queue
from rq.serializers import JSONSerializer

from producers.acknowledgements import ACKNOWLEDGEMENT_TTL_SECONDS, Acknowledgement, read_acknowledgements, shown
from producers.backoff import backoff_seconds
from producers.copies import CopyGuard
from producers.entries import Entry, EntryHead, source_of
from producers.errors import HistoryError, OutboxDamaged, OutboxError, RelayRefused
from producers.outbox import LAST_CHECK_SECONDS, Outbox
from producers.outbox_identity import RELAY_ALIVE_SECONDS, Identity
from producers.redis_keys import acknowledgement_key, delivery_of, job_id_of
from producers.redis_url import place_of
from producers.relay_lock import RelayLock
from producers.rq_queue import UNDER_WAY, enqueue, in_no_list, job_states, unanswered

logger = logging.getLogger(__name__)

_BATCH_ENTRIES = 100  # what a caller's thread may have to wait for: some 5 ms of the interpreter
_SWEEP_ENTRIES = 10 * _BATCH_ENTRIES
# One to four seconds of a worker's work, as the machine goes; more would only fill Redis with what the outbox holds.
_FULL_QUEUE_JOBS = 20_000
_IDLE_SECONDS = 0.05  # how soon entries of other processes are noticed
_FIRST_LOOK_SECONDS = 0.005  # how soon after a send the first acknowledgement is looked for
_FIRST_CHECK_SECONDS = 5.0
_LAST_CHECK_SECONDS = LAST_CHECK_SECONDS
_DOUBTED_CHECKS = 3  # after about 35 seconds
_DOUBTED_ENTRIES = 20  # a sweep: finding one in a long queue takes Redis a while
_FIRST_BACKOFF_SECONDS = 0.2
_LAST_BACKOFF_SECONDS = 5.0
_PRUNE_SECONDS = 60.0
_REJECTED_SECONDS = 5.0
STOP_SECONDS = 0.5
_ASK_TIME_SECONDS = 60.0
_HEARTBEAT_SECONDS = 2.0
_SALVAGE_PAUSE_SECONDS = 10.0
_STANDS_BY_SECONDS = 1.0
_CHECK_FILE_SECONDS = 0.2  # for about 100 MB; calls to `record` wait meanwhile
# An acknowledgement of an entry that was settled before: another copy of the outbox may still wait for it.
_LEFT_FOR_COPIES_SECONDS = 60


def _check_interval(checks: int) -> float:
    return min(_FIRST_CHECK_SECONDS * 2.0 ** min(checks, 10), _LAST_CHECK_SECONDS) * random.uniform(0.9, 1.1)


class Relay:
    """Relays one outbox to one queue, in a daemon thread once started, or by calling `sweep`.

    With `process_name` it is that of a relay process, which announces itself in the outbox.
    """

    def __init__(
        self, outbox: Outbox, redis: Redis, queue: str, *, keep_seconds: float, process_name: str | None = None
    ) -> None:
        self._outbox = outbox
        self._keep_seconds = keep_seconds
        self._prune_at = 0.0
        self._redis = redis
        self._destination = (place_of(redis), queue)
        self._queue = Queue(queue, connection=redis, serializer=JSONSerializer)
        self._lock: RelayLock = outbox.relay_lock()
        self._guard = CopyGuard(outbox, redis)
        self._process_name = process_name
        self._announce_at = 0.0
        self._announcing_since: float | None = None
        self._stands_by_since: float | None = None
        self._relaying = False
        self._generation = outbox.generation
        self._salvaging: Iterator[None] | None = None
        self._salvage_at = 0.0
        self._failing_since: float | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # A send that failed, that could not be marked, or whose sender died may have arrived: ask Redis first.
        self._doubtful = True
        self._failures = 0
        self._rejected_at = 0.0
        self._ask_time_at = 0.0
        self._redis_ahead = 0.0
        self._queued = 0  # length of the queue after the last send
        self.settled = threading.Condition()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin to relay. At the interpreter's end no thread can start: entries then wait for the next process."""
        thread = threading.Thread(target=self._run, name="history-relay", daemon=True)
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def wake(self) -> None:
        """Something was appended; no need to wait for the next look."""
        self._wake.set()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the thread after the sweep it is in; one that waits for Redis longer than this is left behind."""
        self._stop.set()
        self._wake.set()
        if self._thread is None:
            self._end()
        else:
            self._thread.join(seconds)

    def sweep(self) -> bool:
        """One round over what there is to do; True when it got something done. When another one relays: False.

        Raises:
            RedisError: Redis cannot be reached or refuses; nothing is lost, entries stay as they were.
            OutboxError: the outbox cannot be read or written.
            RelayRefused: the entries go to another Redis or queue.
        """
        with self._outbox.repaired():
            return self._sweep()
        return True  # a damaged file was set aside: go on in the new one

    def _sweep(self) -> bool:
        if not self._may_relay():
            return False
        salvaged = self._salvage()  # first: it does not need Redis
        settled = self._take_acknowledgements()
        self._guard.check()
        sent = self._send_pending()
        resent = self._look_after_overdue()
        self._prune()
        return bool(settled or sent or resent or salvaged)

    def _may_relay(self) -> bool:
        """Whether it is this one's turn. Takes or releases the lock, and announces a relay process."""
        if self._outbox.generation != self._generation:  # another file is at the path, and another lock beside it
            self._generation = self._outbox.generation
            self._stand_back()
        identity = self._outbox.identity.read()
        try:
            self.check_destination(identity)
        except RelayRefused:
            self._stand_back()
            raise
        if identity.redis is None and self._process_name is None:  # a new file, in the place of another one
            self._outbox.set_destination(*self._destination)
        process_lives = identity.relay is not None and self._outbox.identity.relay_is_alive()
        turn = self._turn_of_producer if self._process_name is None else self._turn_of_process
        if not turn(identity, process_lives):
            self._relaying = False
            self._stands_by_since = self._stands_by_since or time.monotonic()
            return False
        self._stands_by_since = None
        if not self._lock.held:
            self._doubtful = True  # whether another one sends the same just now
        if not self._relaying:
            self._check_file()
            # Whichever relayed before may have sent what is not marked.
            self._relaying = self._doubtful = True
            self._guard.begin()
            self._salvaging = None
        return True

    def _turn_of_producer(self, identity: Identity, process_lives: bool) -> bool:
        if process_lives:
            self._stand_back()
            return False
        if not self._take_lock():
            # A relay process without a heartbeat may be stopped and keep its lock: two relays only do things twice.
            return identity.relay is not None
        if identity.relay is not None:  # it has ended without a word, or the lock would not be free
            self._outbox.identity.forget_relay(identity.relay)
        return True

    def _turn_of_process(self, identity: Identity, process_lives: bool) -> bool:
        if self._failing_since is not None and time.monotonic() - self._failing_since > RELAY_ALIVE_SECONDS:
            # Producers may reach Redis where this process cannot: it leaves relaying to them until it can.
            self._stand_back()
            self._redis.ping()
            self._failing_since = None
        # One that has relayed and finds another process announced was stopped meanwhile. One that has not waits for
        # the other's lock, which is free as soon as that has ended.
        if process_lives and identity.relay != self._process_name and (self._relaying or not self._take_lock()):
            self._stand_back()
            return False
        self._announcing_since = self._announcing_since or time.monotonic()
        self.announce()
        # Producers release the lock when they see that. One that is stopped, and another relay process, may keep it.
        return self._take_lock() or time.monotonic() - self._announcing_since > RELAY_ALIVE_SECONDS

    def _take_lock(self) -> bool:
        if not self._lock.held:
            if not self._lock.acquire():
                return False
            self._relaying = False  # another one may have relayed before
        return True

    def check_destination(self, identity: Identity | None = None) -> None:
        """Raises RelayRefused when the outbox says that its entries go to another Redis or queue."""
        identity = identity or self._outbox.identity.read()
        if (identity.redis, identity.queue) not in (self._destination, (None, None)):
            redis, queue = self._destination
            raise RelayRefused(
                f"outbox {self._outbox.path}: its entries go to {identity.redis}, queue {identity.queue}, and not to"
                f" {redis}, queue {queue}. Set REDIS_URL and HISTORY_QUEUE as for the producer that opened it last"
            )

    def _check_file(self) -> None:
        """Raise OutboxDamaged if a fault is found soon: of an older file that was put back beside a newer log, much is
        never read while events come and go, and the file would stay as it is.
        """
        fault = self._outbox.quick_check(_CHECK_FILE_SECONDS)
        if fault not in (None, "unfinished"):
            raise OutboxDamaged(f"outbox {self._outbox.path}: {' '.join(str(fault).split())}")

    def _stand_back(self) -> None:
        self._relaying = False
        if self._process_name is not None and self._announcing_since is not None:
            self._announcing_since, self._announce_at = None, 0.0
            with contextlib.suppress(HistoryError):  # its heartbeat ends in any case
                self._outbox.identity.forget_relay(self._process_name)
        self._lock.release()

    @property
    def stands_by(self) -> bool:
        """Whether another process has relayed in place of this one for a second or more."""
        since = self._stands_by_since
        return since is not None and time.monotonic() - since >= _STANDS_BY_SECONDS

    def announce(self) -> None:
        """Of a relay process, whose heartbeat must not wait for Redis: announce it again when that is due."""
        if self._process_name is not None and self._announcing_since is not None:
            now = time.monotonic()
            if now >= self._announce_at:
                self._announce_at = now + _HEARTBEAT_SECONDS
                self._outbox.identity.announce_relay(self._process_name)

    def _salvage(self) -> bool:
        """Carry over a little from a damaged file that was set aside; whether there is more."""
        if self._salvaging is None:
            self._salvaging = self._salvage_all()
        if time.monotonic() < self._salvage_at:
            return False
        try:
            next(self._salvaging)
        except StopIteration:
            self._salvaging = iter(())
            return False
        except OutboxDamaged:
            raise
        except (OutboxError, OSError) as error:  # it is begun again, and does not hold up what is sound
            logger.warning("cannot salvage a damaged file of %s now, trying again: %s", self._outbox.path, error)
            self._salvaging, self._salvage_at = None, time.monotonic() + _SALVAGE_PAUSE_SECONDS
            return False
        return True

    def _salvage_all(self) -> Iterator[None]:
        self._outbox.rescue.finish_renames()
        for file in self._outbox.rescue.damaged_files():
            yield from self._outbox.rescue.salvaging(file)

    def _run(self) -> None:
        pause = _IDLE_SECONDS
        while not self._stop.is_set():
            try:
                # Look often right after something moved, then less and less.
                pause = _FIRST_LOOK_SECONDS if self.sweep() else min(pause * 1.5, _IDLE_SECONDS)
                self._recovered()
            except Exception as error:
                # Whatever it is, a defect of ours included, must not end the thread: entries wait and the log says so.
                self._stop.wait(self._back_off(error))
            else:
                if self._wake.wait(pause):
                    pause = _FIRST_LOOK_SECONDS
            self._wake.clear()
        self._end()

    def _end(self) -> None:
        self._stand_back()

    def _back_off(self, error: Exception) -> float:
        """Say what is wrong, once; returns the seconds to pause, which new entries do not shorten."""
        self._failures += 1
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        if self._failures == 1:
            logger.warning(
                "cannot relay %s: %s; events stay in the outbox, trying again",
                self._outbox.path,
                _brief(error),
                exc_info=not isinstance(error, (RedisError, HistoryError, OSError)),
            )
        return backoff_seconds(self._failures, first=_FIRST_BACKOFF_SECONDS, last=_LAST_BACKOFF_SECONDS)

    def _recovered(self) -> None:
        if self._failures:
            logger.warning("relaying %s again after %d failed tries", self._outbox.path, self._failures)
            self._failures, self._failing_since = 0, None

    def _take_acknowledgements(self) -> int:
        sources = self._outbox.awaiting("sent")
        # What an operator requeues can still be stored; nobody waits for it in a hurry.
        if time.monotonic() >= self._rejected_at:
            self._rejected_at = time.monotonic() + _REJECTED_SECONDS
            sources = list({*sources, *self._outbox.awaiting("rejected")})
        taken = sum(self._take_from(source_id, source_of(name, source_id), n) for source_id, name, n in sources)
        if taken:
            with self.settled:
                self.settled.notify_all()
        return taken

    def _take_from(self, source_id: str, source: str, resends: int) -> int:
        taken, cursor, key = 0, 0, acknowledgement_key(source)
        while True:
            try:
                cursor, page = self._redis.hscan(key, cursor, count=2 * _BATCH_ENTRIES)
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                # Workers do the same, but may have nothing to acknowledge there any more.
                self._redis.rename(key, f"{key}:harmed")
                logger.error(
                    "%s is no hash: moved to %s:harmed. Entries without acknowledgement are sent again", key, key
                )
                return taken
            if page:
                fields: dict[Any, Any] = dict(page)  # type: ignore[arg-type]  # RESP2 and RESP3 answer a dict
                taken += self._settle(source_id, source, resends, fields)
            if not cursor:
                return taken

    def _settle(self, source_id: str, source: str, resends: int, fields: Mapping[Any, Any]) -> int:
        """Settle the entries that these fields acknowledge, and remove the fields; how many were new."""
        found = read_acknowledgements(fields, source)
        told = {field: one for field, one in found.items() if one is not None}
        settled = self._outbox.settle(source_id, resends, told)
        # Only after the outbox has them: a crash in between reads them once more.
        done = {field for field, one in found.items() if one is None}.union(settled.changed)
        if len(done) < len(fields):
            done |= self._expired(told, set(settled.known))
        self._forget(acknowledgement_key(source), {field: fields[field] for field in done}, told)
        for field in settled.changed:
            _log_rejection(source, told[field])
        return len(settled.changed)

    def _expired(self, told: Mapping[Any, Acknowledgement], known: set[Any]) -> set[Any]:
        """Of fields that have settled nothing here, those that no copy of this outbox waits for any more."""
        now, _ = self._redis.time()
        return {
            field
            for field, one in told.items()
            if now - one.at > (_LEFT_FOR_COPIES_SECONDS if field in known else ACKNOWLEDGEMENT_TTL_SECONDS)
        }

    def forget_acknowledgements(self) -> None:
        """Remove those of this outbox's entries that wait in Redis: they were given by a database that is no more."""
        for source in self._outbox.sources():
            key = acknowledgement_key(source.full_name)
            fields: Any = self._redis.hkeys(key)
            if own := [field for field in fields if self._outbox.has(delivery_of(shown(field)))]:
                self._redis.hdel(key, *own)

    def _forget(self, key: str, fields: Mapping[Any, Any], told: Mapping[Any, Acknowledgement]) -> None:
        """Remove what was read; a rejection only if it is still what was read: a requeue may have ended since."""
        rejected = [field for field in fields if field in told and told[field].outcome.kind == "rejected"]
        if final := [field for field in fields if field not in rejected]:
            self._redis.hdel(key, *final)
        if rejected:
            with self._redis.pipeline() as pipe, contextlib.suppress(WatchError):  # then it is read once more
                pipe.watch(key)  # type: ignore[no-untyped-call]  # redis-py annotates it by half
                values = zip(rejected, pipe.hmget(key, rejected), strict=True)
                same = [field for field, value in values if value == fields[field]]
                pipe.multi()
                if same:
                    pipe.hdel(key, *same)
                pipe.execute()

    def _send_pending(self) -> int:
        """Hand over what is pending, as long as the queue has room for it; but not without end.

        Workers as fast as this would keep it from their acknowledgements, until the outbox is full of what is done.
        A batch that its bytes cut short ends it as well.
        """
        sent = 0
        # The first one after a failure is a probe: a hundred jobs made in vain would take the caller's time.
        limit = 1 if self._failures else _BATCH_ENTRIES
        while sent < _SWEEP_ENTRIES and self._has_room() and (entries := self._outbox.pending(limit)):
            states = job_states(self._redis, entries) if self._doubtful else {}
            self._doubtful = True
            self._send([entry for entry in entries if states.get(entry.position) not in UNDER_WAY])
            self._outbox.mark_sent(_next_checks(entries))
            self._doubtful = False
            sent += len(entries)
            if len(entries) < limit or self._stop.is_set():
                break
            limit = _BATCH_ENTRIES
        return sent

    def _has_room(self) -> bool:
        if self._queued >= _FULL_QUEUE_JOBS:
            self._queued = self._redis.llen(self._queue.key)
        return self._queued < _FULL_QUEUE_JOBS

    def _prune(self) -> None:
        """A little at a time: at once while there is more, else every minute."""
        if time.monotonic() >= self._prune_at and not self._outbox.prune(self._keep_seconds):
            self._prune_at = time.monotonic() + _PRUNE_SECONDS

    def _look_after_overdue(self) -> int:
        heads = self._outbox.overdue(_BATCH_ENTRIES)
        if not heads:
            return 0
        states = job_states(self._redis, heads)
        gone = unanswered(self._redis, [head for head in heads if states[head.position] not in UNDER_WAY])
        # A status outlives its worker: what has been under way for long must also be somewhere.
        doubted = [h for h in heads if h.checks >= _DOUBTED_CHECKS and states[h.position] in UNDER_WAY]
        gone += in_no_list(self._redis, self._queue, doubted[:_DOUBTED_ENTRIES])
        entries = self._outbox.with_texts(gone)
        self._send(entries)
        # What is gone and was too much for one batch stays overdue: the next sweep goes on with it.
        left = {head.position for head in gone[len(entries) :]}
        self._outbox.postpone(_next_checks(head for head in heads if head.position not in left))
        return len(entries)

    def _send(self, entries: Sequence[Entry]) -> None:
        """Enqueue all in one transaction."""
        if not entries:
            return
        with self._redis.pipeline(transaction=True) as pipe:
            enqueue(pipe, self._queue, entries, self._redis_now())
            self._queued = pipe.execute()[-1]

    def _redis_now(self) -> datetime:
        """By Redis' clock, asked now and then: how long a job has waited is told by it, on whichever host."""
        if time.monotonic() >= self._ask_time_at:
            seconds, microseconds = self._redis.time()
            self._redis_ahead = seconds + microseconds / 1e6 - time.monotonic()
            self._ask_time_at = time.monotonic() + _ASK_TIME_SECONDS
        return datetime.fromtimestamp(time.monotonic() + self._redis_ahead, UTC)


def _log_rejection(source: str, one: Acknowledgement) -> None:
    if one.outcome.kind == "rejected":
        fields: dict[str, Any] = {"event_id": one.event_id, "source": source, "sequence": one.sequence}
        fields |= {"job_id": job_id_of(one.source_id, one.sequence, one.nonce), "outcome": one.outcome.kind}
        logger.warning("event %s was rejected: %s", one.event_id, one.outcome.reason, extra=fields)


def _next_checks(entries: Iterable[EntryHead]) -> dict[int, float]:
    return {entry.position: _check_interval(entry.checks) for entry in entries}


def _brief(error: Exception) -> str:
    """The first line, without what a driver may append."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
