"""A fork closes the connections of every outbox; parent and child, and all their threads, go on with new ones."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from producers.outbox import Outbox
from tests.factories import a_snapshot
from tests.forking import in_child

NAME = "trading-controller"
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def _append(outbox: Outbox, after: int = 0) -> int:
    """Append an event and return its number."""
    (accepted,) = outbox.append(NAME, [a_snapshot(after=timedelta(after))])
    return accepted.sequence


def _in_thread(function: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result(20)


def test_other_threads_can_append_after_a_fork_in_parent_and_child(path: Path) -> None:
    """A lock that the forking thread took before the fork would make them wait for ever."""
    outbox = Outbox(path)
    assert _append(outbox) == 1

    def append() -> None:
        assert _in_thread(lambda: _append(outbox)) == 2

    assert in_child(append) == 0
    assert _in_thread(lambda: _append(outbox)) == 3


def test_a_fork_waits_until_a_thread_has_recorded(path: Path) -> None:
    """Otherwise the child would have half of a transaction, and a lock that no thread of it releases."""
    outbox = Outbox(path)
    is_recording, forks = threading.Event(), threading.Event()

    def record() -> None:
        with outbox._file.transaction():
            is_recording.set()
            assert not forks.wait(0.2)

    def fork() -> int:
        is_recording.wait(20)
        code = in_child(lambda: _append(outbox))
        forks.set()
        return code

    with ThreadPoolExecutor(2) as threads:
        recording, forking = threads.submit(record), threads.submit(fork)
        recording.result(20)
        assert forking.result(20) == 0
    assert _append(outbox) == 2


def test_threads_that_fork_at_the_same_time_can_record(path: Path) -> None:
    outboxes = [Outbox(path.with_name(f"{number}.db")) for number in range(4)]

    def fork(outbox: Outbox) -> int:
        codes = [in_child(lambda: _append(outbox)) for _ in range(5)]
        return _append(outbox) if codes == [0] * 5 else 0

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(fork, outboxes)) == [6] * 4


@pytest.mark.parametrize("place", ["parent", "child"])
def test_a_fork_does_not_keep_an_outbox_that_is_no_longer_used(path: Path, place: str) -> None:
    """Its file would stay open until the process ends."""
    outboxes = [Outbox(path)]

    def is_freed() -> bool:
        found = weakref.ref(outboxes.pop())
        gc.collect()
        return found() is None

    def check_freed() -> None:
        assert is_freed()

    assert in_child(check_freed if place == "child" else lambda: None) == 0
    assert is_freed()
