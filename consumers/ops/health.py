"""One model of the pipeline's health: database, queue and outbox, each read once per collection, side by side.

`status`, `/metrics`, `/readyz` and the page each pass their own database query; the queue and the outbox are read here.
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
    """Calls `read` in its own thread, one at a time: a server that hangs is not asked again meanwhile.

    The thread is a daemon, since a process that ends must not wait for it.
    """

    def __init__(self, name: str, read: Callable[[], Value]) -> None:
        self.name = name
        self._read = read
        self._lock = threading.Lock()
        self._reading: Future[Value] | None = None

    def start(self) -> Future[Value]:
        """A reading that ends from now on: a new one, or the one that is still under way."""
        with self._lock:
            if self._reading is None or self._reading.done():
                self._reading = Future()
                name = f"history-probe-{self.name}"
                threading.Thread(target=self._run, args=(self._reading,), name=name, daemon=True).start()
            return self._reading

    def _run(self, reading: Future[Value]) -> None:
        try:
            reading.set_result(self._read())
        except Exception as error:  # a defect too: the other probes are still read
            reading.set_exception(error)


@dataclass(frozen=True)
class Reading(Generic[Value]):
    """The value that a probe read; None if this machine has none, or if `error` says why it was not read."""

    value: Value | None = None
    error: BaseException | None = None


def read_side_by_side(probes: Sequence[Probe[Any]], seconds: float) -> list[Reading[Any]]:
    """A reading of each probe after `seconds` at most; one that takes longer has a TimeoutError."""
    started = [probe.start() for probe in probes]
    ended, _ = wait(started, seconds)
    late = TimeoutError(f"no answer within {seconds:g} s")
    return [_reading(future) if future in ended else Reading(error=late) for future in started]


def _reading(ended: Future[Any]) -> Reading[Any]:
    error = ended.exception()
    return Reading(ended.result()) if error is None else Reading(error=error)


@dataclass(frozen=True)
class Health(Generic[Rows]):
    """One collection. A server that fails does not hide the others."""

    database: Reading[Rows]
    queue: Reading[QueueHealth]
    outbox: Reading[OutboxHealth]


class HealthReader(Generic[Rows]):
    """Reads the database by `database`, and the queue and the outbox of the settings, side by side."""

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
# A lock that a thread of the parent held would stay locked in the child.
os.register_at_fork(after_in_child=_shared.clear)


def shared_reader(
    database: Callable[[], Rows], *, outbox: Callable[[], OutboxHealth | None] = outbox_of_settings
) -> HealthReader[Rows]:
    """The reader of this process for `database`, so that requests at the same time ask each server once."""
    return _shared.setdefault(database, HealthReader(database, outbox=outbox))
