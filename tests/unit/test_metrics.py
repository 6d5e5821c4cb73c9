"""Counters and histograms of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from consumers.ops.metrics import COUNTS, Counts, Histogram
from producers.events import SNAPSHOT_TYPE
from tests.forking import in_child

_STORED = (SNAPSHOT_TYPE, "stored")


def test_value_equal_to_a_bound_counts_in_its_bucket() -> None:
    """In Prometheus, `le` means less than or equal."""
    histogram = Histogram((1.0, 2.0))
    histogram.observe([0.5, 1.0, 1.5, 2.0, 2.5])
    assert (histogram.counts, histogram.sum) == ([2, 2, 1], 7.5)


def test_counters_that_were_read_do_not_change() -> None:
    counts = Counts()
    before = counts.read()
    counts.batch({_STORED: 3}, 0.01, [0.5, 0.5, 9.0])
    after = counts.read()
    assert (before.results[_STORED], before.batch_events.counts) == (0, [0] * 10)
    assert (after.results[_STORED], after.batch_events.sum, after.lag_seconds.sum) == (3, 3, 10)


def test_every_outcome_is_exported_from_the_start() -> None:
    """Otherwise Prometheus would see no increase when the first event is rejected, and no alert would fire."""
    outcomes = [outcome for _, outcome in Counts().read().results]
    assert set(outcomes) == {
        *("stored", "duplicate", "conflict", "withdrawn", "invalid", "poison", "unsupported", "discarded")
    }
    assert set(Counts().read().results.values()) == {0}


def test_concurrent_threads_lose_no_counts() -> None:
    counts = Counts()

    def count(_: int) -> None:
        for _ in range(1000):
            counts.batch({_STORED: 2}, 0.001, [0.1, 0.1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert counts.read().results[_STORED] == 8000
    assert sum(counts.read().lag_seconds.counts) == 8000


def test_forked_child_starts_at_zero_while_the_parent_counts() -> None:
    """The child works even if another thread of the parent had the lock at the fork."""
    COUNTS.batch({_STORED: 5}, 0.1, [])

    def child() -> None:
        assert COUNTS.read().results[_STORED] == 0
        COUNTS.batch({_STORED: 1}, 0.1, [])
        assert COUNTS.read().results[_STORED] == 1

    with COUNTS._lock:
        assert in_child(child) == 0
    assert COUNTS.read().results[_STORED] >= 5
