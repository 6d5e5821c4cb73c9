"""Latency of one producer call, and from the call to the committed row.

There is one worker. The events are spaced so that each one meets it idle.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import Connection, text

from consumers.db.engine import engine
from consumers.embedded.child_processes import worker_process
from producers.history_producer import HistoryProducer
from producers.trading_controller import create_daily_portfolio_snapshot
from tests.benchmarks.checks import require_rows
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.pacing import measure_paced
from tests.benchmarks.printing import print_header
from tests.benchmarks.report import Report
from tests.factories import a_portfolio

_PACE_SECONDS = 0.02
_WARM_UP_EVENTS = 20
_STORE_TIMEOUT_SECONDS = 10.0
_STORED = text("SELECT 1 FROM portfolio_history WHERE event_id = CAST(:event_id AS uuid)")


def measure_latency(events: int, report: Report) -> None:
    """Print both latencies in milliseconds, then the latency at fixed rates."""
    with (
        bench_stack() as folder,
        worker_process(folder / "worker.log"),
        HistoryProducer(outbox=folder / "outbox.db") as producer,
        engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db,
    ):
        measure_calls(producer, db, _WARM_UP_EVENTS)
        calls, commits = measure_calls(producer, db, events)
        require_rows(_WARM_UP_EVENTS + events)
    print_header(f"milliseconds, {events} events")
    for label, seconds in (("create_daily_portfolio_snapshot", calls), ("call -> row committed, idle worker", commits)):
        report.add_quantiles("latency", label, seconds)
    measure_paced(report)


def measure_calls(producer: HistoryProducer, db: Connection, count: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each call, and the seconds from each call until another connection sees the row."""
    calls, commits = [], []
    for _ in range(count):
        started = time.perf_counter()
        receipt = create_daily_portfolio_snapshot(a_portfolio(), 1, timestamp=datetime.now(UTC), producer=producer)
        calls.append(time.perf_counter() - started)
        _wait_until_stored(db, receipt.event_id)
        commits.append(time.perf_counter() - started)
        time.sleep(_PACE_SECONDS)
    return calls, commits


def _wait_until_stored(db: Connection, event_id: UUID) -> None:
    deadline = time.monotonic() + _STORE_TIMEOUT_SECONDS
    while db.execute(_STORED, {"event_id": str(event_id)}).scalar() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"event {event_id} was not stored in {_STORE_TIMEOUT_SECONDS} s")
        time.sleep(0.0005)
