"""Latency of one producer call during each kind of Redis outage."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime

from producers.history_producer import HistoryProducer
from producers.trading_controller import create_daily_portfolio_snapshot
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.printing import print_header
from tests.benchmarks.report import Report
from tests.factories import a_portfolio
from tests.outages import OUTAGES

_PACE_SECONDS = 0.005


def measure_outages(calls: int, report: Report) -> None:
    """Print one row for each kind of outage."""
    print_header(f"milliseconds, {calls} calls each")
    with bench_stack() as folder:
        for number, (kind, outage) in enumerate(OUTAGES.items()):
            place = folder / str(number)
            place.mkdir()
            with outage(os.environ["REDIS_URL"], place) as client:
                producer = HistoryProducer(client, outbox=place / "outbox.db")
                seconds = [_one_call(producer) for _ in range(calls)]
                producer.close(timeout=0)
            report.add_quantiles("outages", kind, seconds)


def _one_call(producer: HistoryProducer) -> float:
    time.sleep(_PACE_SECONDS)
    started = time.perf_counter()
    create_daily_portfolio_snapshot(a_portfolio(), 1, timestamp=datetime.now(UTC), producer=producer)
    return time.perf_counter() - started
