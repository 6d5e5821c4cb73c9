"""A fork closes the connections of every outbox; parent and child, and all their threads, continue with new ones."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
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


def _in_threads(*functions: Callable[[], int]) -> list[int]:
    """Run each function in a thread, and return the results of the threads that end."""
    results: dict[int, int] = {}
    threads = [
        threading.Thread(target=lambda n=n, one=one: results.update({n: one()}), daemon=True)
        for n, one in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return [results[n] for n in sorted(results)]


def test_other_threads_can_append_after_a_fork_in_parent_and_child(path: Path) -> None:
    """A lock that the forking thread took before the fork would make them wait for ever."""
    outbox = Outbox(path)
    assert _append(outbox) == 1

    def append() -> None:
        assert _in_threads(lambda: _append(outbox)) == [2]

    assert in_child(append) == 0
    assert _in_threads(lambda: _append(outbox)) == [3]


def test_a_fork_waits_until_a_thread_has_recorded(path: Path) -> None:
    """Otherwise the child would have half of a transaction, and a lock that no thread of it releases."""
    outbox = Outbox(path)
    is_recording, has_forked = threading.Event(), threading.Event()

    def record() -> int:
        with outbox._file.transaction():
            is_recording.set()
            return int(has_forked.wait(0.2))

    def fork() -> int:
        is_recording.wait(10)
        code = in_child(lambda: _append(outbox))
        has_forked.set()
        return code

    assert _in_threads(record, fork) == [0, 0]
    assert _append(outbox) == 2


def test_threads_that_fork_at_the_same_time_can_record(path: Path) -> None:
    outboxes = [Outbox(path.with_name(f"{number}.db")) for number in range(4)]

    def fork(outbox: Outbox) -> int:
        codes = [in_child(lambda: _append(outbox)) for _ in range(5)]
        return _append(outbox) if codes == [0] * 5 else 0

    assert _in_threads(*(partial(fork, outbox) for outbox in outboxes)) == [6] * 4


def test_a_child_can_fork_again(path: Path) -> None:
    outbox = Outbox(path)

    def fork() -> None:
        assert in_child(lambda: _append(outbox)) == 0
        assert _append(outbox) == 2

    assert in_child(fork) == 0
    assert _append(outbox) == 3


@pytest.mark.parametrize("place", ["parent", "child"])
def test_a_fork_does_not_keep_an_outbox_that_is_no_longer_used(path: Path, place: str) -> None:
    """Its file would stay open until the process ends."""
    outboxes = [Outbox(path)]

    def is_freed() -> bool:
        found = weakref.ref(outboxes.pop())
        with warnings.catch_warnings(action="ignore"):  # of what earlier tests have left
            gc.collect()
        return found() is None

    def check_freed() -> None:
        assert is_freed()

    assert in_child(check_freed if place == "child" else lambda: None) == 0
    assert is_freed()
