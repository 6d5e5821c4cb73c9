"""State that redirects all producers of this process to another Redis and outbox, set by `producers.testing.redirect`.

In production it is never set, and producers do not import the code for tests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakSet

from redis import Redis

from producers.errors import HistoryError


@dataclass(frozen=True, eq=False)
class Redirection:
    """The destination of every HistoryProducer of this process while the redirection is active.

    Attributes:
        redis, outbox, queue: They replace those of the producer's arguments and of the settings; `.env` is not read.
        exit_seconds: Limit of `HistoryProducer.close()`.
        last_backoff_seconds: Longest pause after a failed attempt to reach Redis.
        pid: The only process that runs a relay: in a forked child, a fake Redis is a copy that no other process sees.
    """

    redis: Redis
    outbox: Path
    queue: str
    exit_seconds: float
    last_backoff_seconds: float
    pid: int = field(default_factory=os.getpid)
    _at_end: ExitStack = field(default_factory=ExitStack)

    def at_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the redirection ends; the callback that was registered last is called first."""
        self._at_end.callback(callback)

    def end(self) -> None:
        """Call the registered callbacks."""
        self._at_end.close()


_active: Redirection | None = None
_activating = threading.Lock()
_leftover_threads: WeakSet[threading.Thread] = WeakSet()  # threads that were started in a redirection and outlived it


def active_redirection() -> Redirection | None:
    """Return the active redirection; None in production."""
    return _active


@contextmanager
def activate(redirection: Redirection) -> Iterator[None]:
    """Redirect all producers in the block. At its end, close those that were made in it.

    Raises:
        HistoryError: another redirection is active.
    """
    global _active
    if not _activating.acquire(blocking=False):
        raise HistoryError("another FakeHistory is active in this process")
    threads = set(threading.enumerate())
    _active = redirection
    try:
        yield
    finally:
        # Before the redirection ends: otherwise such a thread could record for real, with the developer's settings.
        _leftover_threads.update(set(threading.enumerate()) - threads)
        _active = None
        _activating.release()
        redirection.end()


def check_leftover_thread() -> None:
    """Raise HistoryError if this thread was started in a redirection that has ended, and none is active."""
    if _leftover_threads and _active is None and threading.current_thread() in _leftover_threads:
        raise HistoryError("this thread outlived the test that started it; join it in the test")
