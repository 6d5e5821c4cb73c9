"""Counters and histograms of this process: decided deliveries, and the sizes and durations of batches.

Counted a batch at a time, in plain numbers: for a batch of 500 the client library's own histogram, which takes a lock
for each value, needs 18 times as long. Counters are per process and start at 0, as Prometheus expects, also in a
forked child.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from producers.events import KINDS

UNKNOWN_TYPE = "unknown"  # of a job that carries no event of ours
WAITED_FOR = ("the database", "Redis")  # by a worker that cannot go on

_BATCH_EVENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_INSERT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)
_LAG_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 86400)
_OUTCOMES = ("stored", "duplicate", "conflict", "invalid", "poison")


@dataclass
class Histogram:
    """How many values were at most each of `bounds`, in the last place how many were more, and their sum."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, values: Iterable[float]) -> None:
        """In one go through the bounds, rather than through the bounds for each value."""
        ordered = sorted(values)
        before = 0
        for place, bound in enumerate(self.bounds):
            until = bisect_right(ordered, bound)
            self.counts[place] += until - before
            before = until
        self.counts[-1] += len(ordered) - before
        self.sum += sum(ordered)


@dataclass
class Counted:
    """The numbers at one moment; `results` counts decided deliveries by event type and outcome."""

    results: Counter[tuple[str, str]] = field(default_factory=Counter)
    batch_events: Histogram = field(default_factory=lambda: Histogram(_BATCH_EVENTS))
    insert_seconds: Histogram = field(default_factory=lambda: Histogram(_INSERT_SECONDS))
    lag_seconds: Histogram = field(default_factory=lambda: Histogram(_LAG_SECONDS))
    recovered_jobs: int = 0


class Counts:
    """Any thread may count and read."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin at 0, with a new lock: for a forked child, whose parent keeps its own counts."""
        self._lock = threading.Lock()
        self._counted = Counted()

    def batch(self, results: Mapping[tuple[str, str], int], seconds: float, lags_seconds: Iterable[float]) -> None:
        """One transaction that was committed: its decided deliveries, its duration, and how late each new row is."""
        with self._lock:
            self._counted.results.update(results)
            self._counted.batch_events.observe([sum(results.values())])
            self._counted.insert_seconds.observe([seconds])
            self._counted.lag_seconds.observe(lags_seconds)

    def dead_lettered(self, event_type: str) -> None:
        """One delivery without a transaction: not even a rejection could be recorded."""
        with self._lock:
            self._counted.results[event_type, "poison"] += 1

    def recovered(self, jobs: int) -> None:
        """Jobs of dead workers that this one returned to the queue."""
        with self._lock:
            self._counted.recovered_jobs += jobs

    def read(self) -> Counted:
        with self._lock:
            counted = deepcopy(self._counted)
        # Every outcome from the start, so that the first event of each is an increase from 0.
        known = [(event_type, outcome) for event_type in KINDS for outcome in _OUTCOMES]
        known += [(UNKNOWN_TYPE, "poison"), (UNKNOWN_TYPE, "unsupported")]
        counted.results = Counter(dict.fromkeys(known, 0) | counted.results)
        return counted


COUNTS = Counts()
os.register_at_fork(after_in_child=COUNTS.forget)
