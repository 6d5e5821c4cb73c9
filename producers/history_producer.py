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
from functools import partial
from multiprocessing.util import Finalize, register_after_fork
from pathlib import Path
from typing import Self
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from redis import Redis

from producers.entries import Accepted, OutboxStatus, State
from producers.errors import InvalidEvent, ProducerClosed, SettingsError
from producers.events import KINDS, Payload, SourceName
from producers.fields import type_name
from producers.redirection import Redirection, active_redirection, refuse_leftover_thread
from producers.relay import STOP_SECONDS
from producers.settings import TransportSettings
from producers.times import localized
from producers.transport import Transport

EXIT_SECONDS = 2.0
_STOP_SHARE = 0.05  # of the time of an exit: for relays to end; one that waits for Redis is left behind
_REDIRECTED_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Receipt:
    """Proof that an event is durable: it will become one row or one recorded rejection."""

    event_id: UUID
    source: str
    sequence: int
    _accepted: Accepted = field(repr=False, compare=False)
    _transport: Transport = field(repr=False, compare=False)

    @property
    def state(self) -> State:
        """`pending` until Redis has the event, then `sent`, in the end `stored` or `rejected`.

        Raises:
            OutboxError: the outbox cannot be read, or its entry was settled so long ago that it is no longer kept.
        """
        return self._transport.outbox.status_of(self._accepted).state

    def wait(self, timeout: float | None = None) -> int:
        """Return the id of the event's row once it is stored; `timeout` in seconds, None waits for ever.

        Raises:
            EventRejected: a consumer rejected it; it is not stored.
            TimeoutError: no outcome is known yet; the event is still on its way and safe.
            OutboxError: the outbox cannot be read, or its entry was settled so long ago that it is no longer kept.
        """
        return self._transport.wait(self._accepted, timeout)


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
        refuse_leftover_thread()
        redirection = active_redirection()
        settings = TransportSettings.from_environment(dotenv=redirection is None)
        self._name = _checked_name(name)
        self._timezone = settings.timezone
        self._keep_seconds = settings.outbox_keep_seconds
        self._closed = False
        self._inherited = self._recorded = False
        self._producer_id = _new_producer_id()
        self._redirecting = threading.Lock()
        if redirection is None:
            own = Transport(
                settings.redis() if redis is None else redis,
                queue or settings.queue,
                settings.outbox if outbox is None else outbox,
                keep_seconds=self._keep_seconds,
            )
            self._transports: dict[Redirection | None, Transport] = {None: own}
        else:
            self._transports = {redirection: self._redirected(redirection)}
            redirection.at_end(partial(self._stop, _REDIRECTED_STOP_SECONDS))
        _live.add(self)

    @property
    def _transport(self) -> Transport:
        """This producer's own, or while tests redirect it, another one."""
        redirection = active_redirection()
        found = self._transports.get(redirection)
        if found is not None:
            return found
        if redirection is None:  # made in a redirection that has ended
            raise ProducerClosed("this HistoryProducer was closed")
        with self._redirecting:
            if redirection not in self._transports:
                self._transports[redirection] = self._redirected(redirection)
                redirection.at_end(lambda: self._transports.pop(redirection).stop(_REDIRECTED_STOP_SECONDS))
            return self._transports[redirection]

    def _redirected(self, to: Redirection) -> Transport:
        return Transport(
            to.redis,
            to.queue,
            to.outbox,
            keep_seconds=self._keep_seconds,
            last_backoff_seconds=to.last_backoff_seconds,
            relayed_by=to.pid,
        )

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
        refuse_leftover_thread()
        if self._closed:
            raise ProducerClosed("this HistoryProducer was closed")
        payloads = list(events)
        for payload in payloads:
            if not KINDS.has(payload):
                names = " or ".join(kind.payload.__name__ for kind in KINDS.values())
                raise InvalidEvent(f"event: must be a {names}, not {type_name(payload)}")
        transport = self._transport
        accepted = transport.outbox.append(self._name, payloads, self._producer_id)
        self._recorded = True
        transport.wake_relay()
        return [Receipt(one.event_id, one.source, one.sequence, one, transport) for one in accepted]

    @property
    def closed(self) -> bool:
        return self._closed

    def flush(self, timeout: float | None = EXIT_SECONDS) -> int:
        """Wait until Redis has everything recorded before this call, for at most `timeout` seconds (None: any time).

        Returns how many of these events it has not. They are safe in the outbox.
        """
        return self._transport.flush(_deadline(timeout))

    def settle(self, timeout: float | None = None, *, progress: Callable[[int], None] | None = None) -> int:
        """Wait until everything recorded before this call is stored or rejected; returns how many events are not.

        Redis is asked at once about events that were sent, not when their next check is due. A damaged file that no
        relay has salvaged yet counts as one event. `progress` is called now and then with how many are left.
        """
        return self._transport.settle(_deadline(timeout), progress)

    def damaged_files(self) -> list[Path]:
        """Quarantined files: damaged, moved away from the outbox's path, and not salvaged yet."""
        return self._transport.outbox.quarantine.damaged_files()

    def status(self) -> OutboxStatus:
        """Count the outbox's entries by state."""
        return self._transport.outbox.status()

    def localized(self, moment: datetime, field: str) -> datetime:
        """`moment`, or if it is naive, `moment` in the zone that HISTORY_TIMEZONE or this machine names.

        Raises:
            InvalidEvent: no event can have this time; the message begins with `field`.
        """
        return localized(moment, self._timezone, field)

    def now(self) -> datetime:
        """This moment in the same zone, so that its date is the local one."""
        return datetime.now(UTC).astimezone(self._timezone)

    def resend(self, since: datetime) -> int:
        """Send again the events that were recorded since then and are settled; returns how many.

        For a database that was restored from a backup. Rows that it still has become duplicates. Acknowledgements that
        wait in Redis are removed: they are about rows of the old database.

        Raises:
            RedisError: Redis cannot be reached, so that nothing can be sent again now.
        """
        transport = self._transport
        transport.relay.delete_acknowledgements()
        again = transport.outbox.resend(since.timestamp())
        transport.wake_relay()
        return again

    def close(self, timeout: float | None = None) -> None:
        """Send what is pending, wait until this producer's own events are stored or rejected, and stop.

        Takes at most `timeout` seconds (None: 2), and no time while a relay process has a heartbeat. Entries that are
        not settled by then stay in the outbox, for the next producer or relay that opens it.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._finish(time.monotonic() + (self._exit_seconds() if timeout is None else timeout))
        finally:
            self._stop(STOP_SECONDS)

    def _exit_seconds(self) -> float:
        redirection = active_redirection()
        return EXIT_SECONDS if redirection is None else redirection.exit_seconds

    def _finish(self, deadline: float) -> None:
        if self._inherited and not self._recorded:  # a child that has recorded nothing: its parent goes on
            return
        transport = self._transport
        with transport.outbox.repaired():
            if transport.outbox.header.relay_is_alive():
                return
        transport.settle_own(self._producer_id, deadline)

    def _stop(self, seconds: float) -> None:
        """End the relay; one that waits for Redis longer than this is left behind."""
        self._closed = True
        _live.discard(self)
        for transport in list(self._transports.values()):
            transport.stop(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _after_fork(self) -> None:
        self._redirecting = threading.Lock()
        self._producer_id = _new_producer_id()
        self._inherited, self._recorded = True, False
        for transport in self._transports.values():
            transport.after_fork()


def _checked_name(name: str) -> str:
    try:
        return TypeAdapter(SourceName).validate_python(name)
    except ValidationError:
        raise SettingsError("name: must be 1 to 100 of the characters A-Z a-z 0-9 . _ ~ -") from None


def _new_producer_id() -> int:
    """A number that no other producer has, in this process or another one."""
    return secrets.randbits(62)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


# Strong references: a producer that nothing refers to any more still has entries to send at exit.
_live: set[HistoryProducer] = set()


def _close_all() -> None:
    deadline = time.monotonic() + EXIT_SECONDS  # for all of them together
    producers = list(_live)
    with ExitStack() as last, ExitStack() as first:  # each of them, also when one fails
        for producer in producers:
            last.callback(lambda one: one._stop(max(0.0, deadline - time.monotonic())), producer)
        for producer in producers:  # all are asked to end before the first is waited for
            last.callback(producer._transport.relay.stop, 0.0)
        for producer in producers:
            first.callback(producer._finish, deadline - _STOP_SHARE * EXIT_SECONDS)


def _reopen_all() -> None:
    for producer in list(_live):
        producer._after_fork()


def _close_all_at_exit(_: object = None) -> None:
    # Not by atexit: a child of multiprocessing ends without it. And children that are terminated when this process
    # ends are gone by then, which the priority is for: entries that they leave are sent here.
    Finalize(None, _close_all, exitpriority=-100)


_close_all_at_exit()  # this may be a child, and this module imported only there
os.register_at_fork(after_in_child=_reopen_all)
os.register_at_fork(after_in_child=_close_all_at_exit)
register_after_fork(HistoryProducer, _close_all_at_exit)  # a child of multiprocessing forgets finalizers at its start
