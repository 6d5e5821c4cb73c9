"""Counting in this process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from consumers.ops.metrics import COUNTS, Counts, Histogram
from producers.events import SNAPSHOT_TYPE
from tests.forking import in_child

_STORED = (SNAPSHOT_TYPE, "stored")


def test_a_value_on_a_bound_belongs_below_it() -> None:
    """As Prometheus has it: `le` is less or equal."""
    histogram = Histogram((1.0, 2.0))
    histogram.observe([0.5, 1.0, 1.5, 2.0, 2.5])
    assert (histogram.counts, histogram.sum) == ([2, 2, 1], 7.5)


def test_counts_that_were_read_do_not_change_any_more() -> None:
    counts = Counts()
    before = counts.read()
    counts.batch({_STORED: 3}, 0.01, [0.5, 0.5, 9.0])
    after = counts.read()
    assert (before.results[_STORED], before.batch_events.counts) == (0, [0] * 10)
    assert (after.results[_STORED], after.batch_events.sum, after.lag_seconds.sum) == (3, 3, 10)


def test_every_end_is_there_from_the_start() -> None:
    """Otherwise the first refusal would appear as a number that never grew, and raise no alarm."""
    outcomes = [outcome for _, outcome in Counts().read().results]
    assert set(outcomes) == {"stored", "duplicate", "conflict", "invalid", "poison", "unsupported"}
    assert set(Counts().read().results.values()) == {0}


def test_threads_that_count_at_once_lose_nothing() -> None:
    counts = Counts()

    def count(_: int) -> None:
        for _ in range(1000):
            counts.batch({_STORED: 2}, 0.001, [0.1, 0.1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert counts.read().results[_STORED] == 8000
    assert sum(counts.read().lag_seconds.counts) == 8000


def test_a_forked_child_begins_at_zero_also_while_the_parent_counts() -> None:
    """What the parent counted it tells itself; a lock that another thread held at the fork is not the child's."""
    COUNTS.batch({_STORED: 5}, 0.1, [])

    def child() -> None:
        assert COUNTS.read().results[_STORED] == 0
        COUNTS.batch({_STORED: 1}, 0.1, [])
        assert COUNTS.read().results[_STORED] == 1

    with COUNTS._lock:
        assert in_child(child) == 0
    assert COUNTS.read().results[_STORED] >= 5
