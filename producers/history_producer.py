"""The producer: it appends events to the outbox, from which a relay sends them to Redis."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
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
from producers.redirection import Redirection, active_redirection, check_leftover_thread
from producers.relay import STOP_SECONDS
from producers.settings import TransportSettings
from producers.times import deadline_after, localized
from producers.trace_context import trace_context
from producers.transport import Transport

EXIT_SECONDS = 2.0
_STOP_SHARE = 0.05  # share of EXIT_SECONDS for stopping the relays; one that still waits for Redis is abandoned
_REDIRECTED_STOP_SECONDS = 5.0
_NO_PROCESS = 0  # not the id of any process that records


@dataclass(frozen=True)
class Receipt:
    """Proof that an event is on disk: it will become one row or one recorded rejection."""

    event_id: UUID
    source: str
    sequence: int
    _accepted: Accepted = field(repr=False, compare=False)
    _transport: Transport = field(repr=False, compare=False)

    @property
    def state(self) -> State:
        """State of the event: `pending` until Redis has it, then `sent`, and finally `stored` or `rejected`.

        Raises:
            OutboxError: the outbox cannot be read, or it no longer keeps the entry, which was settled long ago.
        """
        return self._transport.outbox.status_of(self._accepted).state

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the event is stored, for at most `timeout` seconds (None: no limit), and return the id of its row.

        Raises:
            EventRejected: the event was rejected and is not stored.
            TimeoutError: the outcome is not known yet. The event is safe in the outbox and is still being delivered.
            OutboxError: the outbox cannot be read, or it no longer keeps the entry, which was settled long ago.
        """
        return self._transport.wait(self._accepted, timeout)


class HistoryProducer:
    """Records events on local disk, without any network access, and sends them to Redis in the background.

    Threads may share a producer, and a forked child may continue to use it. Close it with `close()`, use it as a
    context manager, or leave it open: it is closed when the process exits.

    Args:
        redis: Any redis-py client; None makes one from REDIS_URL.
        outbox: Path of the outbox file; None takes HISTORY_OUTBOX. All producers that use one outbox must have the same
            Redis and queue, because any one of them may send the entries of all.
        name: The part of the events' `source` before the slash.
        queue: Name of the RQ queue; None takes HISTORY_QUEUE.
        relays: False if this producer starts no relay: another producer or `trading-history relay` sends its events.

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
        relays: bool = True,
    ) -> None:
        check_leftover_thread()
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
                relayed_by=None if relays else _NO_PROCESS,
            )
            self._transports: dict[Redirection | None, Transport] = {None: own}
        else:
            self._transports = {redirection: self._redirected(redirection)}
            redirection.at_end(partial(self._stop, _REDIRECTED_STOP_SECONDS))
        _live.add(self)

    @property
    def _transport(self) -> Transport:
        """The producer's transport, or the one of the active redirection."""
        redirection = active_redirection()
        found = self._transports.get(redirection)
        if found is not None:
            return found
        if redirection is None:  # the producer was made in a redirection that has ended
            raise _closed_error()
        with self._redirecting:
            if redirection not in self._transports:  # pragma: no branch - another thread may have made it meanwhile
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

    def record(self, event: Payload, *, traceparent: str | None = None) -> Receipt:
        """Record one event. When the call returns, the event is on disk.

        The worker's log lines about the event have the W3C `traceparent`, by default that of OpenTelemetry's current
        context, if the program uses OpenTelemetry.

        Raises:
            InvalidEvent: `event` is not a payload of a known kind, or is too large; or `traceparent` is not valid.
            OutboxError: the outbox cannot be written; nothing was recorded.
            ProducerClosed: the producer is closed; nothing was recorded.
        """
        return self.record_many([event], traceparent=traceparent)[0]

    def record_many(self, events: Iterable[Payload], *, traceparent: str | None = None) -> list[Receipt]:
        """Record all `events` in one commit, or none of them. `traceparent` and the errors are as for `record`."""
        check_leftover_thread()
        if self._closed:
            raise _closed_error()
        payloads = list(events)
        for payload in payloads:
            if not KINDS.has(payload):
                names = " or ".join(kind.payload.__name__ for kind in KINDS.values())
                raise InvalidEvent(f"event: must be a {names}, not {type_name(payload)}")
        trace = trace_context(traceparent)
        transport = self._transport
        accepted = transport.outbox.append(self._name, payloads, self._producer_id, trace)
        self._recorded = True
        transport.wake_relay()
        return [Receipt(one.event_id, one.source, one.sequence, one, transport) for one in accepted]

    @property
    def timezone(self) -> tzinfo | None:
        """The zone of naive times and of dates: HISTORY_TIMEZONE, or None for the machine's zone."""
        return self._timezone

    @property
    def closed(self) -> bool:
        """Whether the producer is closed."""
        return self._closed

    def flush(self, timeout: float | None = EXIT_SECONDS) -> int:
        """Wait until Redis has all events recorded before this call, for at most `timeout` seconds (None: no limit).

        Returns:
            The number of these events that Redis does not have yet. They are safe in the outbox.
        """
        return self._transport.flush(deadline_after(timeout))

    def settle(self, timeout: float | None = None, *, progress: Callable[[int], None] | None = None) -> int:
        """Wait until all events recorded before this call are settled, for at most `timeout` seconds (None: no limit).

        The jobs of sent events are checked at once, not when their next check is due. `progress` is called regularly
        with the number of events that are left.

        Returns:
            The number of events that are not settled. A damaged file that no relay has salvaged yet counts as one.
        """
        return self._transport.settle(deadline_after(timeout), progress)

    def damaged_files(self) -> list[Path]:
        """Quarantined files: damaged, moved away from the outbox's path, and not salvaged yet."""
        return self._transport.outbox.quarantine.damaged_files()

    def lossy_files(self) -> list[Path]:
        """Salvaged files of which entries may be lost: numbers were not found in them, or no entry at all."""
        return self._transport.outbox.quarantine.lossy_files()

    def relay_failure(self) -> str | None:
        """Return why this process cannot send entries now; None if it can, or if another process relays them."""
        return self._transport.relay.failure

    def status(self) -> OutboxStatus:
        """Count the outbox's entries by state."""
        return self._transport.outbox.status()

    def localized(self, moment: datetime, field: str) -> datetime:
        """Return `moment` with an offset. If it is naive, take it as local: in HISTORY_TIMEZONE, or the machine's zone.

        Raises:
            InvalidEvent: the time is out of range; the message begins with `field`.
        """
        return localized(moment, self._timezone, field)

    def now(self) -> datetime:
        """Return the current time in HISTORY_TIMEZONE, or the machine's zone; its date is the local date."""
        return datetime.now(UTC).astimezone(self._timezone)

    def resend(self, since: datetime) -> int:
        """Send the settled events that were recorded at or after `since` again. Call it after restoring the database.

        Events whose rows the database still has become duplicates. Acknowledgements that wait in Redis are deleted,
        because they describe rows of the database before the restore.

        Returns:
            The number of events that are sent again.

        Raises:
            RedisError: Redis cannot be reached; nothing is sent again.
        """
        transport = self._transport
        transport.relay.delete_acknowledgements()
        again = transport.outbox.resend(since.timestamp())
        transport.wake_relay()
        return again

    def close(self, timeout: float | None = None) -> None:
        """Send pending entries, wait until this producer's own events are settled, and stop the relay thread.

        The wait takes at most `timeout` seconds (None: 2), and is skipped while a relay process serves the outbox.
        Entries that are not settled by then stay in the outbox; the next producer or relay that opens it continues.
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
        if self._inherited and not self._recorded:  # a forked child that recorded nothing: the parent sends the entries
            return
        transport = self._transport
        with transport.outbox.repaired():
            if transport.outbox.header.relay_is_alive():
                return
        transport.settle_own(self._producer_id, deadline)

    def _stop(self, seconds: float) -> None:
        """Stop the relay thread. If it still waits for Redis after `seconds`, abandon it."""
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


def _closed_error() -> ProducerClosed:
    return ProducerClosed("the HistoryProducer is closed; make a new one")


def _new_producer_id() -> int:
    """Return a random number that identifies a producer among those of all processes."""
    return secrets.randbits(62)


# Strong references: a producer without any other reference still has entries to send at exit.
_live: set[HistoryProducer] = set()


def _close_all() -> None:
    deadline = time.monotonic() + EXIT_SECONDS  # for all producers together
    producers = list(_live)
    with ExitStack() as last, ExitStack() as first:  # an exit stack runs the other callbacks even if one fails
        for producer in producers:
            last.callback(lambda one: one._stop(max(0.0, deadline - time.monotonic())), producer)
        for producer in producers:  # ask all relays to stop before waiting for the first
            last.callback(producer._transport.relay.stop, 0.0)
        for producer in producers:
            first.callback(producer._finish, deadline - _STOP_SHARE * EXIT_SECONDS)


def _reopen_all() -> None:
    for producer in list(_live):
        producer._after_fork()


def _close_all_at_exit(_: object = None) -> None:
    # A finalizer, because child processes of multiprocessing do not run atexit functions. Its priority makes it run
    # after multiprocessing has terminated the daemonic children: the entries that they leave are sent here.
    Finalize(None, _close_all, exitpriority=-100)


_close_all_at_exit()  # here too: this process may be a child that imports the module itself
os.register_at_fork(after_in_child=_reopen_all)
os.register_at_fork(after_in_child=_close_all_at_exit)
register_after_fork(HistoryProducer, _close_all_at_exit)  # a multiprocessing child clears finalizers at its start
