"""Timed drain of a queue: duration and resource usage of one contender."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.backlog import park_snapshots
from tests.benchmarks.checks import require_rows
from tests.benchmarks.environment import redis, reset
from tests.benchmarks.usage import Meter, Usage, syncs
from tests.benchmarks.workers import Start


@dataclass(frozen=True)
class Drain:
    """`seconds` from the release of the events until the last one was committed and finished."""

    events: int
    seconds: float
    usage: Usage
    syncs: int

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


def drain_queue(start: Start, folder: Path, count: int) -> Drain:
    """Time how the workers that `start` runs store `count` waiting snapshots in empty tables."""
    reset()
    drain = drain_more(start, folder, count)
    require_rows(count)
    return drain


def drain_more(start: Start, folder: Path, count: int, first: int = 0) -> Drain:
    """Do the same without emptying the tables; the snapshots are numbered from `first` and must be new."""
    with redis() as client:
        client.flushall()
        backlog = park_snapshots(client, folder, count, first)
        synced = syncs()
        with start(folder) as workers:
            meter = Meter(client, workers)
            before, started = meter.read(), time.perf_counter()
            backlog.release()
            watching = backlog.wait()
            seconds = time.perf_counter() - started
            usage = meter.read().since(before)
            usage = replace(usage, commands=usage.commands - watching)
    return Drain(count, seconds, usage, syncs() - synced)
