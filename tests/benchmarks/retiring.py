"""Months that move out of a large table: how fast, what live events notice, and what inserts pay afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from sqlalchemy import text

from consumers.db.engine import engine, get_db
from consumers.db.inserts import insert_events
from consumers.embedded.child_processes import worker_process
from producers.events import Event, event_of
from producers.history_producer import HistoryProducer
from tests.benchmarks.checks import require, rows
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.filling import fill_archives, fill_snapshots
from tests.benchmarks.latency import measure_calls
from tests.benchmarks.printing import print_header, print_quantiles
from tests.benchmarks.report import Report
from tests.factories import a_snapshot

_ROWS_A_DAY = 10_000  # of fill_snapshots
_FIRST_DAY = date(2020, 1, 1)
_ARCHIVES_PART = 10
_IDLE_EVENTS, _EVENTS_A_LOOK = 300, 20
_ROUNDS, _BATCHES, _BATCH = 12, 6, 500


def measure_retiring(count: int, report: Report) -> None:
    """Print rates and times beside `count` snapshots and a tenth as many archives, of which two thirds retire."""
    before = (_FIRST_DAY + timedelta(days=count * 2 // 3 // _ROWS_A_DAY)).replace(day=1)
    with bench_stack() as folder:
        fill_snapshots(0, count - 1)
        fill_archives(0, count // _ARCHIVES_PART - 1)
        idle, beside, seconds = _beside(folder, f"{before:%Y-%m}")
        moved = rows("portfolio_history_retired") + rows("signal_archives_retired")
        left = rows() + rows("signal_archives") - len(idle) - len(beside) - 20
        require(left == count + count // _ARCHIVES_PART, f"{left} rows instead of {count + count // _ARCHIVES_PART}")
        print(f"\nretire --before {before:%Y-%m}: {moved:,} rows in {seconds:.1f} s, vacuum included", flush=True)
        report.add("retire", f"{moved} rows of {left}", "s", [seconds])
        print_header("call -> row committed, ms")
        for label, times in (("one worker, nothing else", idle), ("beside retire", beside)):
            report.add("retire", f"call -> row committed, {label}", "ms", [one * 1e3 for one in times])
            print_quantiles(label, times, f"{len(times)} events")
        _measure_inserts(report)


def _beside(folder: Path, month: str) -> tuple[list[float], list[float], float]:
    """Seconds of live events before and during a run of the command, and of the run."""
    with (
        worker_process(folder / "worker.log"),
        HistoryProducer(outbox=folder / "outbox.db") as producer,
        engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db,
    ):
        measure_calls(producer, db, 20)
        idle = measure_calls(producer, db, _IDLE_EVENTS)[1]
        started, beside = time.monotonic(), []
        with subprocess.Popen([sys.executable, "-m", "consumers.cli", "retire", "--before", month]) as run:
            while run.poll() is None:
                beside += measure_calls(producer, db, _EVENTS_A_LOOK)[1]
            seconds = time.monotonic() - started
        require(run.returncode == 0, f"retire ended with {run.returncode}")
    return idle, beside, seconds


def _measure_inserts(report: Report) -> None:
    """The same batches of new facts with the trigger and without it, in turn."""
    rates: dict[str, list[float]] = {"ENABLE": [], "DISABLE": []}
    number = 0
    for _ in range(_ROUNDS):
        for how, found in rates.items():
            with engine().begin() as db:
                db.execute(text(f"ALTER TABLE portfolio_history {how} TRIGGER USER"))
            batches = [_batch(number + one) for one in range(_BATCHES)]
            number += _BATCHES
            started = time.perf_counter()
            for events in batches:
                with get_db() as db:
                    insert_events(db, events)
            found.append(_BATCHES * _BATCH / (time.perf_counter() - started))
    with engine().begin() as db:
        db.execute(text("ALTER TABLE portfolio_history ENABLE TRIGGER USER"))
    for label, how in (("with the trigger", "ENABLE"), ("without", "DISABLE")):
        median = report.add("retire", f"inserts of new facts, {label}", "events/s", rates[how])
        print(f"inserts of new facts, {label}: {median:,.0f} events/s", flush=True)


def _batch(number: int) -> list[Event]:
    start = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number * _BATCH)
    payloads = (a_snapshot(timestamp=start + timedelta(seconds=one), portfolio_id=9) for one in range(_BATCH))
    return [event_of(payload, source="retire/0", sequence=number * _BATCH + n) for n, payload in enumerate(payloads)]
