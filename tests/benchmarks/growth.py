"""Insert rate and read times as the history grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from consumers.operations import get_portfolio_history, get_recent_signal_archives
from tests.benchmarks.checks import require, rows
from tests.benchmarks.drains import Drain, drain_more
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.filling import fill_archives, fill_snapshots
from tests.benchmarks.printing import print_columns, print_row, spread
from tests.benchmarks.report import Report
from tests.benchmarks.workers import history_workers

_SIZES = (10_000, 1_000_000, 10_000_000)
_ROWS_PER_ARCHIVE = 10
_INSERTS = 3
_INSERT_SECONDS = 4.0
_TRIAL_EVENTS = 1000
_READS = 50
_READ_ROWS = 100
_COLUMNS = ("inserted/s", "min..max inserted/s", "snapshots ms", "archives ms")


def measure_growth(most: int, report: Report) -> None:
    """Print insert rate and read times at each of _SIZES up to `most` snapshots, with a tenth as many archives."""
    print_columns(f"one worker; reads of limit={_READ_ROWS}", _COLUMNS)
    before, inserted = 0, 0
    with bench_stack() as folder:
        for size in [one for one in _SIZES if one < most] + [most]:
            started = time.monotonic()
            fill_snapshots(before, size - 1)
            fill_archives(before // _ROWS_PER_ARCHIVE, size // _ROWS_PER_ARCHIVE - 1)
            report.add("growth", f"{size} rows: fill", "s", [time.monotonic() - started])
            before = size
            drains = _drains(folder, inserted)
            inserted += sum(drain.events for drain in drains)
            require(rows() == size + inserted, f"{rows()} rows instead of {size + inserted}")
            _print(size, drains[1:], report)


def _drains(folder: Path, first: int) -> Sequence[Drain]:
    """Run a trial and _INSERTS drains of about _INSERT_SECONDS each; the snapshots are numbered from `first`."""
    drains = [drain_more(history_workers, folder, _TRIAL_EVENTS, first)]
    count = max(round(drains[0].rate * _INSERT_SECONDS), _TRIAL_EVENTS)
    starts = [first + _TRIAL_EVENTS + number * count for number in range(_INSERTS)]
    return drains + [drain_more(history_workers, folder, count, start) for start in starts]


def _print(size: int, drains: Sequence[Drain], report: Report) -> None:
    rates = [drain.rate for drain in drains]
    median = report.add("growth", f"{size} rows: inserts through one worker", "events/s", rates)
    reads = [
        report.add("growth", f"{size} rows: {read.__name__}(limit={_READ_ROWS})", "ms", _read_times(read))
        for read in (get_portfolio_history, get_recent_signal_archives)
    ]
    cells = [f"{median:,.0f}", spread(rates), *(f"{read:.2f}" for read in reads)]
    print_row(f"{size:,} rows", _COLUMNS, cells)


def _read_times(read: Callable[..., list[dict[str, Any]]]) -> list[float]:
    """Return the milliseconds of each of _READS calls on one pooled connection, after one warm-up call."""
    milliseconds = []
    for _ in range(1 + _READS):
        started = time.perf_counter()
        found = read(limit=_READ_ROWS)
        milliseconds.append((time.perf_counter() - started) * 1e3)
        require(len(found) == _READ_ROWS, f"{len(found)} rows read instead of {_READ_ROWS}")
    return milliseconds[1:]
