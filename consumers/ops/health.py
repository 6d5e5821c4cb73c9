"""One model of the pipeline's health: database, queue and outbox, each read once per collection, side by side.

`status`, `/metrics`, `/readyz` and the page each pass their own database query. The queue and the outbox are read here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from consumers.ops.outbox_health import OutboxHealth, outbox_of_settings
from consumers.ops.queue_health import QueueHealth, queue_of_settings

Value = TypeVar("Value")
Rows = TypeVar("Rows")


class Probe(Generic[Value]):
    """Call `read` in a separate thread, at most once at a time: while a server hangs, it is not asked again.

    The thread is a daemon, so that it does not keep the process alive.
    """

    def __init__(self, name: str, read: Callable[[], Value]) -> None:
        self.name = name
        self._read = read
        self._lock = threading.Lock()
        self._reading: Future[Value] | None = None

    def start(self) -> Future[Value]:
        """Start a reading, or return the one that is still running."""
        with self._lock:
            if self._reading is None or self._reading.done():
                self._reading = Future()
                name = f"history-probe-{self.name}"
                threading.Thread(target=self._run, args=(self._reading,), name=name, daemon=True).start()
            return self._reading

    def _run(self, reading: Future[Value]) -> None:
        try:
            reading.set_result(self._read())
        except Exception as error:  # a defect too: it must not stop the other probes
            reading.set_exception(error)


@dataclass(frozen=True)
class Reading(Generic[Value]):
    """Value that a probe has read. It is None if this machine has none, or if reading failed with `error`."""

    value: Value | None = None
    error: BaseException | None = None


def read_side_by_side(probes: Sequence[Probe[Any]], seconds: float) -> list[Reading[Any]]:
    """Read all probes at the same time. The error of a probe that takes longer than `seconds` is a TimeoutError."""
    started = [probe.start() for probe in probes]
    ended, _ = wait(started, seconds)
    late = TimeoutError(f"no answer within {seconds:g} s")
    return [_reading(future) if future in ended else Reading(error=late) for future in started]


def _reading(ended: Future[Any]) -> Reading[Any]:
    error = ended.exception()
    return Reading(ended.result()) if error is None else Reading(error=error)


@dataclass(frozen=True)
class Health(Generic[Rows]):
    """Health of the three parts at one moment. If one part cannot be read, the others are still there."""

    database: Reading[Rows]
    queue: Reading[QueueHealth]
    outbox: Reading[OutboxHealth]


class HealthReader(Generic[Rows]):
    """Read the database (by calling `database`), the queue and the outbox at the same time."""

    def __init__(
        self,
        database: Callable[[], Rows],
        queue: Callable[[], QueueHealth | None] = queue_of_settings,
        outbox: Callable[[], OutboxHealth | None] = outbox_of_settings,
    ) -> None:
        self._probes: list[Probe[Any]] = [Probe("database", database), Probe("redis", queue), Probe("outbox", outbox)]

    def read(self, seconds: float) -> Health[Rows]:
        return Health(*read_side_by_side(self._probes, seconds))


_shared: dict[Callable[[], Any], HealthReader[Any]] = {}
# If a thread of the parent has a lock at the fork, it stays locked in the child for ever.
os.register_at_fork(after_in_child=_shared.clear)


def shared_reader(
    database: Callable[[], Rows], *, outbox: Callable[[], OutboxHealth | None] = outbox_of_settings
) -> HealthReader[Rows]:
    """Return this process's reader for `database`: concurrent requests share it and read each server once."""
    return _shared.setdefault(database, HealthReader(database, outbox=outbox))
