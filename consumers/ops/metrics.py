"""Counters and histograms of this process: decided deliveries, and the sizes and durations of batches.

They are plain numbers that are updated once per batch: for a batch of 500, the client library's histogram takes 18
times as long, because it locks for each value. Counters are per process and start at 0, in a forked child too.
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

UNKNOWN_TYPE = "unknown"  # event type of an unsupported job
WAITED_FOR = ("the database", "Redis")

_BATCH_EVENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_INSERT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)
_LAG_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 86400)
_OUTCOMES = ("stored", "duplicate", "conflict", "withdrawn", "invalid", "poison", "discarded")


@dataclass
class Histogram:
    """Number of values per bucket, and their sum. `counts` has a bucket per bound, and a last one for larger values."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, values: Iterable[float]) -> None:
        """Add values: all of them in one pass over the bounds."""
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
    """Counters at one moment. `results` counts decided deliveries by event type and outcome."""

    results: Counter[tuple[str, str]] = field(default_factory=Counter)
    batch_events: Histogram = field(default_factory=lambda: Histogram(_BATCH_EVENTS))
    insert_seconds: Histogram = field(default_factory=lambda: Histogram(_INSERT_SECONDS))
    lag_seconds: Histogram = field(default_factory=lambda: Histogram(_LAG_SECONDS))
    recovered_jobs: int = 0


class Counts:
    """Counters of this process. All methods are thread-safe."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start again at 0, with a new lock. A forked child calls it; the parent keeps its counts."""
        self._lock = threading.Lock()
        self._counted = Counted()

    def batch(self, results: Mapping[tuple[str, str], int], seconds: float, lags_seconds: Iterable[float]) -> None:
        """Count a committed transaction: its decided deliveries, its duration, and the lag of each new row."""
        with self._lock:
            self._counted.results.update(results)
            self._counted.batch_events.observe([sum(results.values())])
            self._counted.insert_seconds.observe([seconds])
            self._counted.lag_seconds.observe(lags_seconds)

    def dead_lettered(self, event_type: str) -> None:
        """Count a delivery that was dead-lettered because not even its rejection could be recorded."""
        with self._lock:
            self._counted.results[event_type, "poison"] += 1

    def recovered(self, jobs: int) -> None:
        """Count jobs of crashed workers that this worker has requeued."""
        with self._lock:
            self._counted.recovered_jobs += jobs

    def read(self) -> Counted:
        with self._lock:
            counted = deepcopy(self._counted)
        # Every outcome is there from the start: Prometheus sees an increase only if it has seen the 0 before.
        known = [(event_type, outcome) for event_type in KINDS for outcome in _OUTCOMES]
        known += [(UNKNOWN_TYPE, outcome) for outcome in ("poison", "unsupported", "discarded")]
        counted.results = Counter(dict.fromkeys(known, 0) | counted.results)
        return counted


COUNTS = Counts()
os.register_at_fork(after_in_child=COUNTS.forget)
