"""Readings of what may hang, for somebody who will not wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from redis import RedisError

from producers.errors import HistoryError

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


class Probe(Generic[Found]):
    """Calls `read` in a thread of its own, in one at a time: a server that hangs is not asked again meanwhile.

    The thread is a daemon, since a process that ends must not wait for it. A failure is logged once, and so is its end.
    """

    def __init__(self, name: str, read: Callable[[], Found]) -> None:
        self.name = name
        self._read = read
        self._lock = threading.Lock()
        self._reading: Future[Found] | None = None
        self._failing = False

    def start(self) -> Future[Found]:
        """A reading that ends from now on: a new one, or the one that is still under way."""
        with self._lock:
            if self._reading is None or self._reading.done():
                self._reading = Future()
                name = f"history-probe-{self.name}"
                threading.Thread(target=self._run, args=(self._reading,), name=name, daemon=True).start()
            return self._reading

    def _run(self, reading: Future[Found]) -> None:
        try:
            found = self._read()
        except Exception as error:  # also a defect: whoever asks is told that there is nothing
            if not self._failing:
                expected = isinstance(error, RedisError | HistoryError | OSError)
                reason = (str(error).splitlines() or [""])[0]
                logger.warning("cannot read %s: %s: %s", self.name, type(error).__name__, reason, exc_info=not expected)
            self._failing = True
            reading.set_exception(error)
        else:
            if self._failing:
                logger.warning("%s can be read again", self.name)
            self._failing = False
            reading.set_result(found)
