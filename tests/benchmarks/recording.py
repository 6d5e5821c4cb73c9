"""Rate of the producer: events per second until accepted, and until committed."""

from __future__ import annotations

import gc
import time
from pathlib import Path

from producers.history_producer import HistoryProducer
from tests.benchmarks.backlog import snapshots
from tests.benchmarks.checks import Rows, require, require_rows, wait_for_progress
from tests.benchmarks.drains import drain_queue
from tests.benchmarks.environment import bench_stack, reset
from tests.benchmarks.printing import print_columns, print_row, spread
from tests.benchmarks.report import Report
from tests.benchmarks.workers import Start, history_workers, relay_and_worker

_RUNS = 3
CHUNK = 500
_CALLS_SHARE = 10  # one tenth of the events is recorded one by one
_COLUMNS = ("events", "events/s", "min..max events/s")
_LABELS = (
    f"record_many of {CHUNK} -> accepted",
    f"record_many of {CHUNK} -> all committed",
    f"record_many of {CHUNK}, relay process -> accepted",
    f"record_many of {CHUNK}, relay process -> all committed",
    "record, one at a time -> accepted",
    "record, one at a time -> all committed",
    "drain of the same events, waiting",
)


def measure_record(count: int, report: Report) -> None:
    """Print the medians of _RUNS runs with one worker, and the rate of the worker alone for comparison."""
    rates: dict[str, list[float]] = {label: [] for label in _LABELS}
    singles = max(1, count // _CALLS_SHARE)
    with bench_stack() as folder:
        for _ in range(_RUNS):
            chunked, single = _record(folder, count, CHUNK), _record(folder, singles, 1)
            relayed = _record(folder, count, CHUNK, start=relay_and_worker)
            drain = drain_queue(history_workers, folder, count).rate
            for label, rate in zip(_LABELS, (*chunked, *relayed, *single, drain), strict=True):
                rates[label].append(rate)
    print_columns(f"from the call on, one worker, {_RUNS} runs", _COLUMNS)
    for label, runs in rates.items():
        median = report.add("record", label, "events/s", runs)
        events = singles if label.startswith("record,") else count
        print_row(label, _COLUMNS, [f"{events:,}", f"{median:,.0f}", spread(runs)])
    for label in (_LABELS[1], _LABELS[3]):
        shares = [done / drained for done, drained in zip(rates[label], rates[_LABELS[-1]], strict=True)]
        share = report.add("record", f"{label}, share of the drain", "ratio", shares)
        print(f"{label}: {share:.0%} of the drain ({spread([100 * one for one in shares])} %)", flush=True)


def _record(folder: Path, count: int, chunk: int, start: Start = history_workers) -> tuple[float, float]:
    """Return the events per second until the last call has returned, and until the last row is committed."""
    reset()
    for file in folder.glob("outbox.db*"):
        file.unlink()
    with start(folder), HistoryProducer(outbox=folder / "outbox.db", name="recorder") as producer:
        stored = Rows()
        facts = list(snapshots(count))
        gc.freeze()  # a controller does not have all these snapshots at once, so the collector would not visit them
        started = time.perf_counter()
        for first in range(0, count, chunk):
            producer.record_many(facts[first : first + chunk])
        accepted = time.perf_counter() - started
        wait_for_progress(stored.count, count, pause=0.05)
        committed = time.perf_counter() - started
        gc.unfreeze()
        require(producer.flush(30) == 0, "the relay has unsent events")
    require_rows(count)
    return count / accepted, count / committed
