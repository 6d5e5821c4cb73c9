"""Time from `kill -9` of a worker with reserved jobs until another worker has stored their events."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from redis import Redis
from sqlalchemy import text

from consumers.db.engine import engine
from consumers.embedded.child_processes import worker_process
from producers.history_producer import HistoryProducer
from tests.benchmarks.checks import require_rows
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.report import Report
from tests.factories import a_snapshot

_EVENTS = 20


def measure_recovery(times: int, report: Report) -> None:
    """Print the median and the maximum of `times` recoveries, in seconds."""
    with (
        bench_stack() as folder,
        HistoryProducer(outbox=folder / "outbox.db") as producer,
    ):
        seconds = [_one_recovery(folder, producer, number) for number in range(times)]
        require_rows(times * _EVENTS)
    report.add("recovery", "kill -9 -> stored by another worker", "s", seconds)
    print(f"\nkill -9 -> stored by another worker, {times} times: median {statistics.median(seconds):.1f} s,", end=" ")
    print(f"worst {max(seconds):.1f} s")


def _one_recovery(folder: Path, producer: HistoryProducer, number: int) -> float:
    redis = Redis.from_url(os.environ["REDIS_URL"])
    with engine().connect() as db:
        # The worker's insert waits for this lock, so the worker is killed with reserved jobs.
        db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
        victim = subprocess.Popen([sys.executable, "-m", "consumers.cli", "worker"], stderr=subprocess.DEVNULL)
        receipts = producer.record_many(
            [a_snapshot(after=timedelta(days=number, seconds=second)) for second in range(_EVENTS)]
        )
        _until(lambda: bool(redis.keys("history:reserved:*")))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        db.rollback()
    started = time.monotonic()
    with worker_process(folder / "worker.log"):
        for receipt in receipts:
            receipt.wait(120)
    return time.monotonic() - started


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the worker reserved no job in 30 s")
        time.sleep(0.01)
