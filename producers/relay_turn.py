"""Decides which relay of an outbox relays: one at a time, and a relay process rather than the producers' threads."""

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
    """Turn of one relay, guarded by a lock beside the outbox. With `process_name`, it sends heartbeats as well."""

    def __init__(self, outbox: Outbox, redis: Redis, queue: str, process_name: str | None) -> None:
        self._outbox = outbox
        self._redis = redis
        self._destination = (place_of(redis), queue)
        self._process_name = process_name
        self._lock: RelayLock = outbox.relay_lock()
        self._generation = outbox.generation
        self._heartbeat_at = 0.0
        self._alive_since: float | None = None  # time of the first heartbeat
        self._standby_since: float | None = None
        self.started = False  # the relay sets it when it has prepared its turn
        self.failing_since: float | None = None  # the relay sets it while it cannot relay

    def take(self) -> bool:
        """Take the turn if possible, and return whether this relay has it.

        Takes or releases the lock, and sends the heartbeat of a relay process.

        Raises:
            RelayRefused: the outbox belongs to another Redis or queue.
        """
        header = self._outbox.header.read()
        if self._outbox.generation != self._generation:  # reading found another file at the path
            self._generation = self._outbox.generation
            self.end()
        try:
            self.check_destination(header)
        except RelayRefused:
            self.end()
            raise
        if header.redis is None and self._process_name is None:  # a new file has replaced another one
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
        """Whether this relay has the lock. If not, an unresponsive relay has it, and both may relay."""
        return self._lock.held

    @property
    def is_standby(self) -> bool:
        """Whether another process has had the turn for at least one second."""
        since = self._standby_since
        return since is not None and time.monotonic() - since >= _STANDBY_SECONDS

    def end(self) -> None:
        """End the turn, so that another relay can take it."""
        self.started = False
        if self._alive_since is not None:
            assert self._process_name is not None
            self._alive_since, self._heartbeat_at = None, 0.0
            with contextlib.suppress(HistoryError):  # the heartbeat expires in any case
                self._outbox.header.clear_heartbeat(self._process_name)
        self._lock.release()

    def heartbeat(self) -> None:
        """Send the heartbeat of a relay process if it is due. This never waits for Redis."""
        if self._alive_since is not None:
            assert self._process_name is not None
            now = time.monotonic()
            if now >= self._heartbeat_at:
                self._heartbeat_at = now + _HEARTBEAT_SECONDS
                self._outbox.header.heartbeat(self._process_name)

    def check_destination(self, header: Header | None = None) -> None:
        """Raise RelayRefused if the outbox belongs to another Redis or queue."""
        header = header or self._outbox.header.read()
        if (header.redis, header.queue) not in (self._destination, (None, None)):
            redis, queue = self._destination
            raise RelayRefused(
                f"outbox {self._outbox.path}: its entries go to {header.redis}, queue {header.queue}, and not to"
                f" {redis}, queue {queue}. Set REDIS_URL and HISTORY_QUEUE to those of the producer that opened it"
                " last, or HISTORY_OUTBOX to another file"
            )

    def _take_as_producer(self, header: Header, process_lives: bool) -> bool:
        if process_lives:
            self.end()
            return False
        if not self._take_lock():
            # A stopped relay process sends no heartbeat but keeps its lock. Two relays at once only make duplicates.
            return header.relay is not None
        if header.relay is not None:  # the lock is free, so the relay process was killed
            self._outbox.header.clear_heartbeat(header.relay)
        return True

    def _take_as_process(self, header: Header, process_lives: bool) -> bool:
        if self.failing_since is not None and time.monotonic() - self.failing_since > RELAY_ALIVE_SECONDS:
            # Producers may reach Redis even if this process cannot: leave relaying to them until it can.
            self.end()
            self._redis.ping()
            self.failing_since = None
        # If this process has started to relay and another process sends the heartbeat, this one was stopped meanwhile.
        # If this process has not started, it waits for the lock, which is free as soon as the other process has ended.
        if process_lives and header.relay != self._process_name and (self.started or not self._take_lock()):
            self.end()
            return False
        self._alive_since = self._alive_since or time.monotonic()
        self.heartbeat()
        # Producers release the lock when they see the heartbeat. A stopped producer or another relay process may keep
        # it: then relay without it after RELAY_ALIVE_SECONDS.
        return self._take_lock() or time.monotonic() - self._alive_since > RELAY_ALIVE_SECONDS

    def _take_lock(self) -> bool:
        if not self._lock.held:
            if not self._lock.acquire():
                return False
            self.started = False  # another relay may have relayed in the meantime
        return True
