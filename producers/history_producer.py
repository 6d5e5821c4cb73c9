"""The producer: records events in the outbox and lets a relay carry them to the workers."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.util import Finalize, register_after_fork
from pathlib import Path
from typing import Self
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from redis import Redis

from producers.entries import Accepted, OutboxStatus, State
from producers.errors import EventRejected, InvalidEvent, ProducerClosed, SettingsError
from producers.events import KINDS, Payload, SourceName
from producers.fields import type_name
from producers.outbox import Outbox, Position
from producers.redis_url import place_of
from producers.relay import STOP_SECONDS, Relay
from producers.settings import TransportSettings
from producers.times import localized

EXIT_SECONDS = 2.0
_LEAVE_SHARE = 0.05  # of the time of an exit is for relays to end; one that waits for Redis is left behind
_POLL_SECONDS = 0.02
_ASK_SECONDS = 1.0  # how often `settle` asks Redis about what is under way


@dataclass(frozen=True)
class Receipt:
    """Proof that an event is durable: it will become one row or one recorded rejection."""

    event_id: UUID
    source: str
    sequence: int
    _accepted: Accepted = field(repr=False, compare=False)
    _producer: HistoryProducer = field(repr=False, compare=False)

    @property
    def state(self) -> State:
        """`pending` until Redis has the event, then `sent`, in the end `stored` or `rejected`.

        Raises:
            OutboxError: the outbox cannot be read, or its entry was settled so long ago that it is no longer kept.
        """
        return self._producer._outbox.fate(self._accepted).state

    def wait(self, timeout: float | None = None) -> int:
        """Return the id of the event's row once it is stored; `timeout` in seconds, None waits for ever.

        Raises:
            EventRejected: a consumer refused it for good.
            TimeoutError: nothing is known yet; the event is still on its way and safe.
            OutboxError: the outbox cannot be read, or its entry was settled so long ago that it is no longer kept.
        """
        return self._producer._wait(self._accepted, timeout)


class HistoryProducer:
    """Records events, such as portfolio snapshots and signal archives, durably and without touching the network.

    `redis` is any redis-py client, `outbox` the path of the outbox file, `queue` the RQ queue; None takes
    each from the settings. All producers on one outbox must use the same Redis and queue, since any one of
    them may carry the entries of all. `name` is the part before the slash of the events' source.

    Threads may share one. A forked child may go on using it. Use it as a context manager, or leave closing to
    the interpreter's exit.

    Raises:
        SettingsError: neither `redis` nor REDIS_URL is given, or a setting is wrong.
        OutboxError: the outbox cannot be opened.
    """

    def __init__(
        self,
        redis: Redis | None = None,
        *,
        outbox: Path | str | None = None,
        name: str = "trading-controller",
        queue: str | None = None,
    ) -> None:
        settings = TransportSettings.from_environment()
        self._redis = settings.redis() if redis is None else redis
        self._name = _checked_name(name)
        self._queue = queue or settings.queue
        self._timezone = settings.timezone
        self._closed = False
        self._starting = threading.Lock()
        self._outbox = Outbox(settings.outbox if outbox is None else outbox, repair=True)
        self._outbox.set_destination(place_of(self._redis), self._queue)
        self._recorder = _new_recorder()
        self._inherited = self._recorded = False
        self._keep_seconds = settings.outbox_keep_seconds
        self._relay = self._new_relay()
        self._relay.start()
        _live.add(self)

    def record(self, event: Payload) -> Receipt:
        """Accept one event: when this returns it is on disk.

        Raises:
            InvalidEvent: the event is larger than an event may be.
            OutboxError: the outbox cannot be written; the event was not accepted.
            ProducerClosed: after close().
        """
        return self.record_many([event])[0]

    def record_many(self, events: Iterable[Payload]) -> list[Receipt]:
        """Accept all of `events` in one commit, or none of them; raises what `record` raises."""
        if self._closed:
            raise ProducerClosed("this HistoryProducer was closed")
        payloads = list(events)
        for payload in payloads:
            if not KINDS.has(payload):
                names = " or ".join(kind.payload.__name__ for kind in KINDS.values())
                raise InvalidEvent(f"event: must be a {names}, not {type_name(payload)}")
        accepted = self._outbox.append(self._name, payloads, self._recorder)
        self._recorded = True
        self._run_relay()
        return [Receipt(one.event_id, one.source, one.sequence, one, self) for one in accepted]

    @property
    def closed(self) -> bool:
        return self._closed

    def flush(self, timeout: float | None = EXIT_SECONDS) -> int:
        """Wait until Redis has everything recorded before this call, for at most `timeout` seconds (None: any time).

        Returns how many of these events it has not. They are safe in the outbox.
        """
        left = self._counter(self._outbox.pending_count)
        self._wait_for(lambda: not left(), _deadline(timeout))
        return left()

    def settle(self, timeout: float | None = None, *, progress: Callable[[int], None] | None = None) -> int:
        """Wait until everything recorded before this call is stored or rejected; returns how many events are not.

        What is under way is asked for at once, not when it is due. A damaged file that was set aside, and that no relay
        has salvaged yet, counts as one event. `progress` hears, now and then, how many are left.
        """
        ask_at = 0.0
        count = self._counter(lambda until: self._outbox.unsettled_count(until=until))

        def is_settled() -> bool:
            nonlocal ask_at
            left = count()
            if progress is not None:
                progress(left)
            if left and time.monotonic() >= ask_at:
                self._outbox.check_now(self._outbox.last_position())
                ask_at = time.monotonic() + _ASK_SECONDS
            return not left

        self._wait_for(is_settled, _deadline(timeout))
        return count()

    def _counter(self, count: Callable[[Position], int]) -> Callable[[], int]:
        """What `count` says of the entries that are there now, those in damaged files that were set aside included."""
        until, salvaging = self._outbox.last_position(), False

        def counted() -> int:
            nonlocal until, salvaging
            if self._outbox.rescue.damaged_files():
                salvaging = True
            elif salvaging:  # their entries have positions behind all others now
                salvaging, until = False, self._outbox.last_position()
            return count(until)

        return counted

    def _wait_for(self, condition: Callable[[], bool], deadline: float | None) -> None:
        while not condition():
            self._run_relay()
            if not self._relay.running or (deadline is not None and time.monotonic() >= deadline):
                break
            with self._relay.settled:
                self._relay.settled.wait(_POLL_SECONDS)

    def damaged_files(self) -> list[Path]:
        """Damaged files of the outbox that were set aside, and not salvaged yet."""
        return self._outbox.rescue.damaged_files()

    def status(self) -> OutboxStatus:
        return self._outbox.status()

    def localized(self, moment: datetime, field: str) -> datetime:
        """`moment`, or if it is naive, `moment` in the zone that HISTORY_TIMEZONE or this machine names.

        Raises:
            InvalidEvent: no event can have this time; the message begins with `field`.
        """
        return localized(moment, self._timezone, field)

    def resend(self, since: datetime) -> int:
        """Send again what was recorded since then and is settled; returns how many events.

        For a database that was restored from a backup. What it still has is absorbed, and what workers said before
        is forgotten: it is true of the old database only.

        Raises:
            RedisError: Redis cannot be reached, so that nothing can be sent again now.
        """
        self._relay.forget_acknowledgements()
        again = self._outbox.resend(since.timestamp())
        self._run_relay()
        return again

    def now(self) -> datetime:
        """This moment in the same zone, so that its date is the local one."""
        return datetime.now(UTC).astimezone(self._timezone)

    def close(self, timeout: float | None = None) -> None:
        """Hand over what is pending, wait until this producer's own events are stored or rejected, and stop.

        Takes at most `timeout` seconds (None: 2), and no time when a relay process looks after the outbox. What is
        left stays in the outbox, for the next producer or relay that opens it.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._finish(_deadline(EXIT_SECONDS if timeout is None else timeout))
        finally:
            self._stop()

    def _finish(self, deadline: float | None) -> None:
        if self._inherited and not self._recorded:  # a child that has recorded nothing: its parent goes on
            return
        with self._outbox.repaired():
            if self._outbox.identity.relay_is_alive():
                return
        self._wait_for(self._has_nothing_under_way, deadline)

    def _stop(self, deadline: float | None = None) -> None:
        """End the relay; one that waits for Redis longer than the deadline, or half a second, is left behind."""
        self._closed = True
        self._relay.stop(STOP_SECONDS if deadline is None else max(0.0, deadline - time.monotonic()))
        self._outbox.close()
        _live.discard(self)

    def _has_nothing_under_way(self) -> bool:
        return not self._outbox.pending_count() and not self._outbox.unsettled_count(recorder=self._recorder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_relay(self) -> Relay:
        return Relay(self._outbox, self._redis, self._queue, keep_seconds=self._keep_seconds)

    def _run_relay(self) -> None:
        if not self._relay.running:
            with self._starting:
                if not self._relay.running:
                    self._relay.start()
        self._relay.wake()

    def _wait(self, accepted: Accepted, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            fate = self._outbox.fate(accepted)
            if fate.state in ("stored", "rejected"):
                break
            left = _POLL_SECONDS if deadline is None else min(_POLL_SECONDS, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"event {accepted.event_id} is on its way; not acknowledged in {timeout} s")
            with self._relay.settled:
                self._relay.settled.wait(left)
        if fate.row_id is None:
            raise EventRejected(str(accepted.event_id), fate.reason or "no reason given")
        return fate.row_id

    def _after_fork(self) -> None:
        self._starting = threading.Lock()
        self._recorder = _new_recorder()
        self._inherited, self._recorded = True, False
        self._relay = self._new_relay()


def _checked_name(name: str) -> str:
    try:
        return TypeAdapter(SourceName).validate_python(name)
    except ValidationError:
        raise SettingsError("name: must be 1 to 100 of the characters A-Z a-z 0-9 . _ ~ -") from None


def _new_recorder() -> int:
    """A number that no other producer has, in this process or another one."""
    return secrets.randbits(62)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


# Strong references: a producer that nobody holds any more still has its entries to hand over at exit.
_live: set[HistoryProducer] = set()


def _close_all() -> None:
    deadline = time.monotonic() + EXIT_SECONDS  # for all of them together
    producers = list(_live)
    with ExitStack() as last, ExitStack() as first:  # each of them, also when one fails
        for producer in producers:
            last.callback(producer._stop, deadline)
        for producer in producers:  # before the first of them is waited for, all know that they end
            last.callback(producer._relay.stop, 0.0)
        for producer in producers:
            first.callback(producer._finish, deadline - _LEAVE_SHARE * EXIT_SECONDS)


def _reopen_all() -> None:
    for producer in list(_live):
        producer._after_fork()


def _close_all_at_exit(_: object = None) -> None:
    # Not by atexit: a child of multiprocessing ends without it. And children that are terminated when this process
    # ends are gone by then, which the priority is for: what they leave is handed over here.
    Finalize(None, _close_all, exitpriority=-100)


_close_all_at_exit()  # this may be a child, and this module imported only there
os.register_at_fork(after_in_child=_reopen_all)
os.register_at_fork(after_in_child=_close_all_at_exit)
register_after_fork(HistoryProducer, _close_all_at_exit)  # a child of multiprocessing forgets finalizers at its start
