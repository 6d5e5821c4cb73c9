"""Import of old JSON files: rate compared with plain inserts, memory, second run, `verify`, latency of live events.

The files have N snapshots (--count) and N/200 archives of 50 signals. One worker stores the live events.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import psutil

from consumers.db.engine import engine
from consumers.db.inserts import insert_events
from consumers.legacy.old_history import OldHistory, file_sources
from producers.events import Event
from producers.history_producer import HistoryProducer
from tests.benchmarks.checks import require, rows
from tests.benchmarks.environment import bench_stack, reset
from tests.benchmarks.printing import print_header, print_quantiles
from tests.benchmarks.report import Report
from tests.benchmarks.workers import history_workers
from tests.factories import a_signal, a_snapshot, an_old_archive, an_old_snapshot

_SNAPSHOTS_AN_ARCHIVE = 200
_SIGNALS = 50
_FIRST = datetime(2025, 1, 1, 0, 0, 0, 101234)
_BATCH = 500
_ARCHIVES_A_BATCH = 50
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
        baseline = _baseline(old)
        _require_rows(snapshots, archives)
        reset()
        seconds, peak = _command("import", old)
        _require_rows(snapshots, archives)
        again, _ = _command("import", old)
        compared, _ = _command("verify", old)
        events = snapshots + archives
        figures = {
            "rows by multi-row INSERT alone": ("s", baseline, f"{events / baseline:,.0f} events/s"),
            "import": ("s", seconds, f"{events / seconds:,.0f} events/s, {baseline / seconds:.0%} of the plain rate"),
            "peak memory of the importer": ("MiB", peak / 2**20, ""),
            "second run, nothing to insert": ("s", again, f"{events / again:,.0f} entries/s"),
            "verify": ("s", compared, f"{events / compared:,.0f} entries/s"),
        }
        for label, (unit, value, note) in figures.items():
            report.add("import", label, unit, [value])
            print(f"{label:38}{value:10,.1f} {unit}  {note}".rstrip(), flush=True)
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


def _baseline(old: Path) -> float:
    """Return the seconds to read and convert the files and insert _BATCH snapshots or fewer archives per commit."""
    started = time.perf_counter()
    for source in file_sources(old):
        history = OldHistory(source, zone=UTC, portfolio_id=1)
        size = _BATCH if source.kind == "snapshot" else _ARCHIVES_A_BATCH
        for batch in _batches(history, size):
            with engine().begin() as db:
                insert_events(db, batch)
    return time.perf_counter() - started


def _batches(history: OldHistory, size: int) -> Iterator[Sequence[Event]]:
    events = (history.event(entry) for chunk in history.chunks() for entry in chunk)
    while batch := list(islice(events, size)):
        yield batch


def _require_rows(snapshots: int, archives: int) -> None:
    found = rows(), rows("signal_archives"), rows("event_outcomes")
    require(found == (snapshots, archives, 0), f"{found} rows instead of {(snapshots, archives, 0)}")


def _command(name: str, old: Path) -> tuple[float, float]:
    """Run `trading-history <name>`, which must end with status 0; return its seconds and peak memory in bytes."""
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
    line = [sys.executable, "-m", "consumers.cli", name, str(old), *_OPTIONS]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, env=os.environ, cwd=old.parent) as process:
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
    report.add("import", "live event -> acknowledged, meanwhile", "ms", [one * 1e3 for one in seconds])
    print_quantiles("live event -> acknowledged, meanwhile", seconds)
