"""Readings of servers in separate threads, each bounded in time: one that hangs does not hide the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


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
    return readings([probe.start() for probe in probes], seconds)


def readings(started: Sequence[Future[Any]], seconds: float) -> list[Reading[Any]]:
    """Wait for these started probes for at most `seconds`, see `read_side_by_side`."""
    ended, _ = wait(started, seconds)
    late = TimeoutError(f"no answer within {seconds:g} s")
    return [_reading(future) if future in ended else Reading(error=late) for future in started]


def _reading(ended: Future[Any]) -> Reading[Any]:
    error = ended.exception()
    return Reading(ended.result()) if error is None else Reading(error=error)
