"""Import of old JSON files: rate beside its limit, memory, second run, `verify`, latency of live events.

The files have N snapshots (--count) and N/200 archives of 50 signals. One worker stores the live events. The limit is a
process that decodes the same files with the standard library and inserts 500 rows a statement, without validating.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import psutil

from producers.history_producer import HistoryProducer
from tests.benchmarks.checks import require, rows
from tests.benchmarks.environment import bench_stack, reset
from tests.benchmarks.printing import print_header
from tests.benchmarks.report import Report
from tests.benchmarks.workers import history_workers
from tests.factories import a_signal, a_snapshot, an_old_archive, an_old_snapshot

_SNAPSHOTS_AN_ARCHIVE = 200
_SIGNALS = 50
_FIRST = datetime(2025, 1, 1, 0, 0, 0, 101234)
_ROUNDS = 3
_PLAIN = "tests.benchmarks.plain_import"
_ROOT = Path(__file__).parents[2]
_POLL_SECONDS = 0.05
_PACE_SECONDS = 0.1
_LIVE_PORTFOLIO = 77
_OPTIONS = ("--timezone", "UTC", "--portfolio-id", "1", "--json")


def measure_import(snapshots: int, report: Report) -> None:
    """Print each figure; fail if a run leaves other rows than those of the files."""
    archives = max(1, snapshots // _SNAPSHOTS_AN_ARCHIVE)
    with bench_stack() as folder:
        old = _write(folder / "old", snapshots, archives)
        megabytes = sum(path.stat().st_size for path in old.iterdir()) / 1e6
        print(
            f"\nimport of {snapshots:,} snapshots and {archives:,} archives of {_SIGNALS} signals, {megabytes:,.0f} MB"
        )
        runs: dict[str, list[float]] = {"limit: decode and insert": [], "import": []}
        peaks = []
        for _ in range(_ROUNDS):
            for label, seconds in runs.items():
                reset()
                took, peak = _ended(_PLAIN if label != "import" else "import", old)
                _require_rows(snapshots, archives)
                seconds.append(took)
                peaks += [peak / 2**20] if label == "import" else []
        again, _ = _ended("import", old)
        compared, _ = _ended("verify", old)
        limit, imported = runs.values()
        shares = [100 * plain / took for plain, took in zip(limit, imported, strict=True)]
        events = snapshots + archives
        figures = {label: ("s", seconds, "entries/s") for label, seconds in runs.items()} | {
            "import, share of the limit's rate": ("%", shares, ""),
            "peak memory of the importer": ("MiB", peaks, ""),
            "second run, nothing to insert": ("s", [again], "entries/s"),
            "verify": ("s", [compared], "entries/s"),
        }
        for label, (unit, values, rate) in figures.items():
            value = report.add("import", label, unit, values)
            print(f"{label:38}{value:10,.1f} {unit}  {f'{events / value:,.0f} {rate}' if rate else ''}".rstrip())
        reset()
        _measure_live(folder, old, report)


def _write(folder: Path, snapshots: int, archives: int) -> Path:
    folder.mkdir()
    _write_array(folder / "portfolio_history.json", (_snapshot(number) for number in range(snapshots)))
    _write_array(folder / "signals_archive_2025-01.json", (_archive(number) for number in range(archives)))
    return folder


def _write_array(path: Path, entries: Iterator[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, entry in enumerate(entries):
            file.write(("," if number else "[") + json.dumps(entry, ensure_ascii=False))
        file.write("]")


def _snapshot(number: int) -> dict[str, object]:
    values = {"balance": 9900 + number * 0.01, "total_profit_loss": number * 0.1, "total_value": 9900 + number * 0.11}
    counts = {"open_positions": number % 7, "trade_count": number}
    return an_old_snapshot(_FIRST + timedelta(seconds=30 * number), **values, **counts)


def _archive(number: int) -> dict[str, object]:
    signals = [a_signal(market_id=str(n), target_price=n * 0.01, amount=number) for n in range(_SIGNALS)]
    return an_old_archive(_FIRST + timedelta(hours=number), signals)


def _require_rows(snapshots: int, archives: int) -> None:
    found = rows(), rows("signal_archives"), rows("event_outcomes")
    require(found == (snapshots, archives, 0), f"{found} rows instead of {(snapshots, archives, 0)}")


def _ended(name: str, old: Path) -> tuple[float, float]:
    """Run a program, which must end with status 0; return its seconds and peak memory in bytes."""
    started = time.perf_counter()
    with _started(name, old) as process:
        peak = 0
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, watched.memory_info().rss)
            time.sleep(_POLL_SECONDS)
    require(process.returncode == 0, f"{name} ended with status {process.returncode}")
    return time.perf_counter() - started, peak


@contextmanager
def _started(name: str, old: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start `trading-history <name>`, or the plain import."""
    arguments = [name, str(old)] if name == _PLAIN else ["consumers.cli", name, str(old), *_OPTIONS]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    line = [sys.executable, "-m", *arguments]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment, cwd=old.parent) as process:
        yield process


def _measure_live(folder: Path, old: Path, report: Report) -> None:
    """Print the time from a producer's call until its acknowledgement is read, while an import runs."""
    seconds: list[float] = []
    with (
        history_workers(folder),
        HistoryProducer(outbox=folder / "live.db") as producer,
        _started("import", old) as importing,
    ):
        ended = threading.Event()

        def watch() -> None:
            importing.wait()
            ended.set()

        threading.Thread(target=watch, daemon=True).start()
        number = 0
        while not ended.is_set():
            started = time.perf_counter()
            producer.record(a_snapshot(after=timedelta(seconds=number), portfolio_id=_LIVE_PORTFOLIO)).wait(60)
            seconds.append(time.perf_counter() - started)
            number += 1
            ended.wait(_PACE_SECONDS)
        require(importing.returncode == 0, f"import ended with status {importing.returncode}")
    print_header(f"milliseconds, {len(seconds)} events")
    report.add_quantiles("import", "live event -> acknowledged, meanwhile", seconds)
