"""Latency from an event's scheduled time to its committed row, at a given rate; and of the call, which needs a commit.

Open loop: the schedule never waits, so a delay adds to the latency of all events behind it.
"""

from __future__ import annotations

import gc
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import text

from consumers.db.engine import engine
from producers.history_producer import HistoryProducer
from tests.benchmarks.backlog import snapshots
from tests.benchmarks.checks import require, require_rows, rows, wait_for_progress
from tests.benchmarks.environment import bench_stack, reset
from tests.benchmarks.printing import print_header
from tests.benchmarks.report import Report
from tests.benchmarks.workers import Start, history_workers, relay_and_worker, simple_worker
from tests.factories import a_snapshot

_WARM_UP_EVENTS = 20
_GRACE_SECONDS = 5.0  # after the last scheduled time; events that are not stored by then count as a backlog
_LATE_SECONDS = 1.0
# PostgreSQL keeps these times. A program that looked for new rows would take the time of a busy worker.
_COMMITTED = text("""
    SELECT sequence, CAST(extract(epoch FROM pg_xact_commit_timestamp(xmin)) AS float8) FROM portfolio_history
""")
_RELAY_PROCESS = "HistoryWorker, relay process"
_WORKERS: dict[str, Start] = {
    "HistoryWorker": history_workers,
    _RELAY_PROCESS: relay_and_worker,
    "RQ SimpleWorker": simple_worker,
}


@dataclass(frozen=True)
class Pace:
    """Load: `events` events, `rate` per second, `chunk` in each call."""

    rate: int
    events: int
    chunk: int = 1

    @property
    def label(self) -> str:
        return f"{self.rate:,}/s" + (f", {self.chunk} a call" if self.chunk > 1 else "")


PACES = (Pace(1, 15), Pace(100, 1000), Pace(1000, 30_000), Pace(1000, 5000, chunk=10))


@dataclass(frozen=True)
class Paced:
    """Result of one load.

    `seconds`: latency of each event that was stored in time, in order. `late`: delay of the last call in seconds.
    `left`: events not stored in time. `rate`: stored events per second. `calls`: seconds
    of each call.
    """

    seconds: list[float]
    late: float
    left: int
    rate: float
    calls: list[float]

    @property
    def verdict(self) -> str:
        """Text that names what was too slow, with the stored events per second; empty if nothing was."""
        behind = self.left > 0 or self.seconds[-1] - self.late > _LATE_SECONDS
        slow = ["caller"] * (self.late > _LATE_SECONDS) + ["relay or worker"] * behind
        return f"{' and '.join(slow)} cannot keep up: {self.rate:,.0f}/s" if slow else ""


def measure_paced(report: Report) -> None:
    """Print the latency of each of PACES with each of _WORKERS, and of calls beside bare commits, in milliseconds."""
    print_header("scheduled -> row committed, ms")
    with bench_stack(commit_times=True) as folder:
        for pace in PACES:
            commits = _bare_commits(folder, pace)
            report.add_quantiles("latency", f"{pace.label}, a bare SQLite commit", commits)
            for name, start in _WORKERS.items():
                paced = _one_pace(folder, pace, start)
                label = f"{pace.label}, {name}"
                report.add_quantiles("latency", label, paced.seconds, paced.verdict)
                report.add_quantiles("latency", f"{label}: a call", paced.calls)
                ratio = statistics.median(paced.calls) / statistics.median(commits)
                report.add("latency", f"{label}: a call / a bare commit, p50", "ratio", [ratio])


def _bare_commits(folder: Path, pace: Pace) -> list[float]:
    """Return the seconds of each durable commit of one row in SQLite, on the same schedule: the least of a call."""
    with closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE IF NOT EXISTS bare (id INTEGER PRIMARY KEY, event TEXT)")

        def commit() -> None:
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO bare (event) VALUES (?)", ("x" * 600,))
            db.execute("COMMIT")

        return [_seconds(commit) for _ in _schedule(Pace(pace.rate, min(pace.events, 3 * pace.rate)))]


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _one_pace(folder: Path, pace: Pace, start: Start) -> Paced:
    reset()
    for file in folder.glob("outbox.db*"):
        file.unlink()
    total = _WARM_UP_EVENTS + pace.events
    with HistoryProducer(outbox=folder / "outbox.db", name="paced") as producer:
        with start(folder):
            for snapshot in snapshots(_WARM_UP_EVENTS):
                producer.record(snapshot)
            wait_for_progress(rows, _WARM_UP_EVENTS)
            scheduled, calls, late = _call(producer, pace)
            deadline = time.monotonic() + _GRACE_SECONDS
            while rows() < total and time.monotonic() < deadline:
                time.sleep(0.1)
            seen = _committed()
        if rows() < total:  # a second worker stores the rest, so that the number of rows can be checked
            with history_workers(folder):
                wait_for_progress(rows, total, pause=0.2)
        require_rows(total)
    require(any(number in seen for number in scheduled), "no event was stored in time")
    took = max(seen.values()) - min(scheduled.values())
    in_time = [seen[number] - at for number, at in scheduled.items() if number in seen]
    return Paced(in_time, late, pace.events - len(in_time), len(in_time) / took, calls)


def _committed() -> dict[int, float]:
    """Return sequence -> monotonic seconds of the commit, for each row."""
    wall_clock_ahead = time.time() - time.monotonic()
    with engine().connect() as db:
        return {sequence: at - wall_clock_ahead for sequence, at in db.execute(_COMMITTED)}


def _call(producer: HistoryProducer, pace: Pace) -> tuple[dict[int, float], list[float], float]:
    """Record the events.

    Returns:
        Sequence -> scheduled monotonic seconds; the seconds of each call; and the delay of the last call in seconds.
    """
    scheduled: dict[int, float] = {}
    calls: list[float] = []
    facts = [a_snapshot(after=timedelta(days=1, seconds=number)) for number in range(pace.events)]
    gc.freeze()  # a controller does not have all these snapshots at once: visiting them takes up to 80 ms
    for number, at in _schedule(pace):
        began = time.monotonic()
        receipts = producer.record_many(facts[number : number + pace.chunk])
        calls.append(time.monotonic() - began)
        scheduled |= {receipt.sequence: at for receipt in receipts}
    gc.unfreeze()
    return scheduled, calls, began - at


def _schedule(pace: Pace) -> Iterator[tuple[int, float]]:
    """Yield the number of each call's first event, when the call is due, and that time in monotonic seconds."""
    started = time.monotonic() + 0.1
    for number in range(0, pace.events, pace.chunk):
        at = started + number / pace.rate
        time.sleep(max(0.0, at - time.monotonic()))
        yield number, at
