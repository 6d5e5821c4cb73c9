"""What this process has counted: ends of deliveries, and the sizes and times of batches. Prometheus reads it.

Counted a batch at a time, in plain numbers: the client library's own counters take a lock for each event. The numbers
are of this process and begin with it, as Prometheus expects; a forked child begins at 0 again.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from producers.events import KINDS

UNKNOWN_TYPE = "unknown"  # of a job that carries no event of ours

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

    def copy(self) -> Histogram:
        return Histogram(self.bounds, list(self.counts), self.sum)


@dataclass(frozen=True)
class Counted:
    """The numbers at one moment; `ends` by event type and outcome."""

    ends: dict[tuple[str, str], int]
    batch_events: Histogram
    insert_seconds: Histogram
    lag_seconds: Histogram
    recovered_jobs: int


class Counts:
    """Any thread may count and read."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin at 0, with a lock that nobody holds: for a forked child, whose parent counts what it has done."""
        self._lock = threading.Lock()
        self._counted = Counted({}, Histogram(_BATCH_EVENTS), Histogram(_INSERT_SECONDS), Histogram(_LAG_SECONDS), 0)
        self._recovered = 0

    def batch(self, ends: Mapping[tuple[str, str], int], seconds: float, lags_seconds: Iterable[float]) -> None:
        """One transaction that was committed: the ends it decided, its duration, and how late each new row is."""
        with self._lock:
            self._add(ends)
            self._counted.batch_events.observe([sum(ends.values())])
            self._counted.insert_seconds.observe([seconds])
            self._counted.lag_seconds.observe(lags_seconds)

    def gave_up(self, event_type: str) -> None:
        """An end without a transaction: not even a rejection could be recorded."""
        with self._lock:
            self._add({(event_type, "poison"): 1})

    def recovered(self, jobs: int) -> None:
        """Jobs of dead workers that this one returned to the queue."""
        with self._lock:
            self._recovered += jobs

    def read(self) -> Counted:
        with self._lock:
            counted = self._counted
            return Counted(
                _none_yet() | counted.ends,
                counted.batch_events.copy(),
                counted.insert_seconds.copy(),
                counted.lag_seconds.copy(),
                self._recovered,
            )

    def _add(self, ends: Mapping[tuple[str, str], int]) -> None:
        for end, count in ends.items():
            self._counted.ends[end] = self._counted.ends.get(end, 0) + count


def _none_yet() -> dict[tuple[str, str], int]:
    """Every end that there can be, so that the first of its kind is an increase from 0."""
    ends = [(event_type, outcome) for event_type in KINDS for outcome in _OUTCOMES]
    return dict.fromkeys([*ends, (UNKNOWN_TYPE, "poison"), (UNKNOWN_TYPE, "refused")], 0)


COUNTS = Counts()
os.register_at_fork(after_in_child=COUNTS.forget)
