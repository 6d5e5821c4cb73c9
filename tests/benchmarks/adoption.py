"""Duration of the adoption of old tables, and for how long it locks them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import text

from consumers.db.engine import create_store_engine, engine
from consumers.legacy.adoption import adopt_legacy
from consumers.settings import StoreSettings
from tests.benchmarks.checks import require
from tests.benchmarks.environment import bench_stack, checkpoint
from tests.benchmarks.report import Report
from tests.legacy_databases import ARCHIVES, FIRST_GENERATION, FIRST_GENERATION_SNAPSHOTS

_ROWS_PER_ARCHIVE = 200
_POLL_SECONDS = 0.001

_VALUES = """
    SELECT count(*), min(id), max(id), sum(balance), sum(total_invested), sum(total_profit_loss), sum(total_value),
        sum(open_positions), sum(trade_count), min(timestamp), max(timestamp), min(snapshot_date), max(created_at),
        (SELECT count(*) FROM {archives}), (SELECT sum(signals_count) FROM {archives}),
        (SELECT md5(string_agg(CAST(signals_data AS text), '' ORDER BY id)) FROM {archives})
    FROM {snapshots}
"""
_OLD = text("SELECT oid FROM pg_class WHERE relname IN ('portfolio_history', 'signal_archives')")
_LOCKED = text("""
    SELECT FROM pg_locks WHERE granted AND mode = 'AccessExclusiveLock' AND relation = ANY(:old)
""")


def measure_adoption(rows: int, report: Report) -> None:
    """Print how long the adoption and its locks take; fail if a value changed."""
    with bench_stack():
        _fill(rows)
        before = _values("portfolio_history", "signal_archives")
        with _observed() as (locked, reads):
            started = time.perf_counter()
            adoption = adopt_legacy(engine())
            seconds = time.perf_counter() - started
        after = _values("portfolio_history_legacy", "signal_archives_legacy")
    require(len(adoption.renamed) == 2, f"renamed {adoption.renamed}")
    require(before == after, f"the values were {before} and are {after}")
    locked_seconds = locked[-1] - locked[0] if locked else 0.0
    report.add("adopt", f"{rows} rows: adoption", "ms", [seconds * 1e3])
    report.add("adopt", f"{rows} rows: old tables locked", "ms", [locked_seconds * 1e3])
    report.add("adopt", f"{rows} rows: slowest read meanwhile", "ms", [max(reads) * 1e3])
    print(f"\nadoption of {rows:,} snapshots and {rows // _ROWS_PER_ARCHIVE:,} archives: {seconds * 1e3:.0f} ms;")
    print(f"ACCESS EXCLUSIVE lock on the old tables seen for {locked_seconds * 1e3:.0f} ms ({len(locked)} polls);")
    print(f"slowest of {len(reads):,} reads of an old table meanwhile: {max(reads) * 1e3:.0f} ms;")
    print(f"counts, sums, minima and maxima are the same before and after: {before == after}", flush=True)


def _fill(rows: int) -> None:
    with engine().begin() as db:
        db.exec_driver_sql("DROP TABLE portfolio_history, signal_archives, event_outcomes, withdrawals")
        db.exec_driver_sql(FIRST_GENERATION)
        db.execute(text(FIRST_GENERATION_SNAPSHOTS), {"rows": rows})
        db.execute(text(ARCHIVES), {"rows": rows // _ROWS_PER_ARCHIVE})
    checkpoint()


def _values(snapshots: str, archives: str) -> tuple[Any, ...]:
    with engine().connect() as db:
        return tuple(db.execute(text(_VALUES.format(snapshots=snapshots, archives=archives))).one())


@contextmanager
def _observed() -> Iterator[tuple[list[float], list[float]]]:
    """Yield two lists that grow until the block ends: times at which a lock was seen, and seconds of each read."""
    with engine().connect() as db:
        oids = list(db.execute(_OLD).scalars())
    locked: list[float] = []
    reads: list[float] = [0.0]
    done = threading.Event()
    threads = [
        threading.Thread(target=_poll_locks, args=(oids, locked, done)),
        threading.Thread(target=_read, args=(reads, done)),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.2)  # until both threads are connected and poll
    try:
        yield locked, reads
    finally:
        done.set()
        for thread in threads:
            thread.join()


def _poll_locks(oids: Sequence[int], locked: list[float], done: threading.Event) -> None:
    store = create_store_engine(StoreSettings.from_environment().url())
    with store.connect() as db:
        while not done.wait(_POLL_SECONDS):
            if db.execute(_LOCKED, {"old": oids}).all():
                locked.append(time.perf_counter())
    store.dispose()


def _read(reads: list[float], done: threading.Event) -> None:
    """Read the table by its name, which belongs to the new table after the adoption."""
    store = create_store_engine(StoreSettings.from_environment().url())
    with store.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        while not done.wait(_POLL_SECONDS):
            started = time.perf_counter()
            db.exec_driver_sql("SELECT balance FROM portfolio_history LIMIT 1").all()
            reads.append(time.perf_counter() - started)
    store.dispose()
