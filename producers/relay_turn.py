"""Which relay of an outbox relays: one at a time, and a relay process before the threads of producers."""

from __future__ import annotations

import contextlib
import time

from redis import Redis

from producers.errors import HistoryError, RelayRefused
from producers.outbox import Outbox
from producers.outbox_header import RELAY_ALIVE_SECONDS, Header
from producers.redis_url import place_of
from producers.relay_lock import RelayLock

_HEARTBEAT_SECONDS = 2.0
_STANDBY_SECONDS = 1.0


class RelayTurn:
    """The turn of one relay, by a lock beside the outbox. With `process_name`, the relay's process has a heartbeat."""

    def __init__(self, outbox: Outbox, redis: Redis, queue: str, process_name: str | None) -> None:
        self._outbox = outbox
        self._redis = redis
        self._destination = (place_of(redis), queue)
        self._process_name = process_name
        self._lock: RelayLock = outbox.relay_lock()
        self._generation = outbox.generation
        self._heartbeat_at = 0.0
        self._alive_since: float | None = None  # the first heartbeat
        self._standby_since: float | None = None
        self.started = False  # set by the relay once it has prepared its turn
        self.failing_since: float | None = None  # set by the relay, while it cannot relay

    def take(self) -> bool:
        """Whether it is this relay's turn. Takes or releases the lock; gives a relay process its heartbeat.

        Raises:
            RelayRefused: the entries go to another Redis or queue.
        """
        if self._outbox.generation != self._generation:  # another file is at the path, and another lock beside it
            self._generation = self._outbox.generation
            self.end()
        header = self._outbox.header.read()
        try:
            self.check_destination(header)
        except RelayRefused:
            self.end()
            raise
        if header.redis is None and self._process_name is None:  # a new file, in the place of another one
            self._outbox.set_destination(*self._destination)
        process_lives = header.relay is not None and self._outbox.header.relay_is_alive()
        take = self._take_as_producer if self._process_name is None else self._take_as_process
        if not take(header, process_lives):
            self.started = False
            self._standby_since = self._standby_since or time.monotonic()
            return False
        self._standby_since = None
        return True

    @property
    def is_exclusive(self) -> bool:
        """False if another relay that does not answer keeps the lock: both may relay."""
        return self._lock.held

    @property
    def is_standby(self) -> bool:
        """Whether another process has relayed instead of this one for a second or more."""
        since = self._standby_since
        return since is not None and time.monotonic() - since >= _STANDBY_SECONDS

    def end(self) -> None:
        """Leave relaying to others."""
        self.started = False
        if self._process_name is not None and self._alive_since is not None:
            self._alive_since, self._heartbeat_at = None, 0.0
            with contextlib.suppress(HistoryError):  # the heartbeat expires in any case
                self._outbox.header.clear_heartbeat(self._process_name)
        self._lock.release()

    def heartbeat(self) -> None:
        """Renew the heartbeat of a relay process when that is due; it must not wait for Redis."""
        if self._process_name is not None and self._alive_since is not None:
            now = time.monotonic()
            if now >= self._heartbeat_at:
                self._heartbeat_at = now + _HEARTBEAT_SECONDS
                self._outbox.header.heartbeat(self._process_name)

    def check_destination(self, header: Header | None = None) -> None:
        """Raises RelayRefused when the outbox says that its entries go to another Redis or queue."""
        header = header or self._outbox.header.read()
        if (header.redis, header.queue) not in (self._destination, (None, None)):
            redis, queue = self._destination
            raise RelayRefused(
                f"outbox {self._outbox.path}: its entries go to {header.redis}, queue {header.queue}, and not to"
                f" {redis}, queue {queue}. Set REDIS_URL and HISTORY_QUEUE as for the producer that opened it last"
            )

    def _take_as_producer(self, header: Header, process_lives: bool) -> bool:
        if process_lives:
            self.end()
            return False
        if not self._take_lock():
            # A relay process without a heartbeat may be stopped and keep its lock: two relays only do things twice.
            return header.relay is not None
        if header.relay is not None:  # it was killed, or the lock would not be free
            self._outbox.header.clear_heartbeat(header.relay)
        return True

    def _take_as_process(self, header: Header, process_lives: bool) -> bool:
        if self.failing_since is not None and time.monotonic() - self.failing_since > RELAY_ALIVE_SECONDS:
            # Producers may reach Redis where this process cannot: it leaves relaying to them until it can.
            self.end()
            self._redis.ping()
            self.failing_since = None
        # If this one has started to relay and another process has the heartbeat, this one was stopped meanwhile. If
        # this one has not started, it waits for the other's lock, which is free as soon as that process has ended.
        if process_lives and header.relay != self._process_name and (self.started or not self._take_lock()):
            self.end()
            return False
        self._alive_since = self._alive_since or time.monotonic()
        self.heartbeat()
        # Producers release the lock when they see the heartbeat. One that is stopped, and another relay process, may
        # keep it.
        return self._take_lock() or time.monotonic() - self._alive_since > RELAY_ALIVE_SECONDS

    def _take_lock(self) -> bool:
        if not self._lock.held:
            if not self._lock.acquire():
                return False
            self.started = False  # another one may have relayed before
        return True
