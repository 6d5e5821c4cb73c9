"""The one place that can send all producers of this process elsewhere: `producers.testing.redirect` sets it.

In production nothing is redirected, and no producer imports code that is meant for tests.
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
    """Where every HistoryProducer of this process records while it is active.

    `redis`, `outbox` and `queue` take the place of those that a producer was given or finds in the settings. `.env` is
    not read. `exit_seconds` limits `close()`, `last_backoff_seconds` the pause after a failed try to reach Redis. Only
    the process `pid` relays: in a forked child, a fake Redis is a copy that no other process sees.
    """

    redis: Redis
    outbox: Path
    queue: str
    exit_seconds: float
    last_backoff_seconds: float
    pid: int = field(default_factory=os.getpid)
    _at_end: ExitStack = field(default_factory=ExitStack)

    def at_end(self, callback: Callable[[], object]) -> None:
        """Call this when the redirection ends, after what was registered later."""
        self._at_end.callback(callback)

    def end(self) -> None:
        self._at_end.close()


_active: Redirection | None = None
_activating = threading.Lock()
_refused: WeakSet[threading.Thread] = WeakSet()  # threads that were started in a redirection and outlive it


def active_redirection() -> Redirection | None:
    return _active


@contextmanager
def activate(redirection: Redirection) -> Iterator[None]:
    """Redirect all producers in the block; at its end, close those that were made in it.

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
        # First: such a thread would otherwise record for real from now on, with the settings of the developer.
        _refused.update(set(threading.enumerate()) - threads)
        _active = None
        _activating.release()
        redirection.end()


def refuse_leftover_thread() -> None:
    """Raise HistoryError in a thread that was started in a redirection and has outlived it."""
    if _refused and _active is None and threading.current_thread() in _refused:
        raise HistoryError("this thread outlived the test that started it; join it in the test")
