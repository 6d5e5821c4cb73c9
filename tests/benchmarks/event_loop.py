"""Longest stall of an asyncio event loop while events are recorded one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

from producers import aio, trading_controller
from producers.history_producer import HistoryProducer
from tests.benchmarks.checks import Rows, require_rows, wait_for_progress
from tests.benchmarks.environment import bench_stack, reset
from tests.benchmarks.printing import print_columns, print_row
from tests.benchmarks.report import Report
from tests.benchmarks.workers import history_workers
from tests.factories import INSTANT, a_portfolio

_RUNS = 3
_TICK_SECONDS = 0.001  # the other task of the loop wants to run after each pause of this length
_COLUMNS = ("median ms", "max ms")
_IDLE = "idle loop"

Record = Callable[[HistoryProducer, datetime], Awaitable[object]]


async def _with_aio(producer: HistoryProducer, moment: datetime) -> None:
    await aio.create_daily_portfolio_snapshot(a_portfolio(), 1, timestamp=moment, producer=producer)


async def _with_blocking_call(producer: HistoryProducer, moment: datetime) -> None:
    trading_controller.create_daily_portfolio_snapshot(a_portfolio(), 1, timestamp=moment, producer=producer)


_CALLS: dict[str, Record] = {"producers.aio": _with_aio, "blocking calls in the loop": _with_blocking_call}


def measure_event_loop(count: int, report: Report) -> None:
    """Print median and maximum of the longest stall in _RUNS interleaved runs, in milliseconds."""
    stalls: dict[str, list[float]] = {label: [] for label in (*_CALLS, _IDLE)}
    with bench_stack() as folder:
        for _ in range(_RUNS):
            seconds = 0.0
            for label, record in _CALLS.items():
                started = time.perf_counter()
                stalls[label].append(_record(folder, count, record))
                seconds = max(seconds, time.perf_counter() - started)
            stalls[_IDLE].append(asyncio.run(_longest_stall(asyncio.sleep(seconds))))
    print_columns(f"longest stall, {count:,} events, {_RUNS} runs", _COLUMNS)
    for label, runs in stalls.items():
        milliseconds = [one * 1e3 for one in runs]
        median = report.add("asyncio", label, "ms", milliseconds)
        print_row(label, _COLUMNS, [f"{median:.2f}", f"{max(milliseconds):.2f}"])


def _record(folder: Path, count: int, record: Record) -> float:
    """Record `count` events and return the longest stall; fail unless each becomes a row."""
    reset()
    for file in folder.glob("outbox.db*"):
        file.unlink()
    with history_workers(folder), HistoryProducer(outbox=folder / "outbox.db", name="asyncio") as producer:

        async def events() -> None:
            for number in range(count):
                await record(producer, INSTANT + timedelta(seconds=number))
                await asyncio.sleep(0)  # also after a blocking call, so that the loop can run the other task

        longest = asyncio.run(_longest_stall(events()))
        wait_for_progress(Rows().count, count)
    require_rows(count)
    return longest


async def _longest_stall(work: Awaitable[object]) -> float:
    """Return by how many seconds the loop was late at most for another task, until `work` is done."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            due = time.perf_counter() + _TICK_SECONDS
            await asyncio.sleep(_TICK_SECONDS)
            longest = max(longest, time.perf_counter() - due)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    try:
        await work
        await asyncio.sleep(2 * _TICK_SECONDS)  # it notices a stall at the end too
    finally:
        ticking.cancel()
    return longest
