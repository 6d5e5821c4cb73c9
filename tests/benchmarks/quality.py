"""Delivery quality under faults: what is lost, doubled and late with each kind of worker and of fault."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from tests.benchmarks.checks import require
from tests.benchmarks.peer import PGQUEUER
from tests.benchmarks.printing import print_columns, print_row
from tests.benchmarks.quality_counts import RunFigures
from tests.benchmarks.quality_faults import KINDS
from tests.benchmarks.quality_run import WORKER_KINDS
from tests.benchmarks.report import Figure, Report, markdown

_LOADED = 2  # runs with a load at the same time; more of them may wait for their last events
_COLUMNS = ("accepted", "lost", "doubled", "recovery p50, s", "worst, s", "latency p99, ms", "queue entries")


def measure_quality(times: int, report: Report) -> None:
    """Cause each kind of fault `times` times for each kind of worker, in separate runs, and print a row for each."""
    worker_kinds = [one for one in WORKER_KINDS if one != PGQUEUER.name or PGQUEUER.installed]
    if len(worker_kinds) < len(WORKER_KINDS):
        report.note("PgQueuer is not installed (dependency group bench): not measured")
    # HistoryWorker comes last: meanwhile the runs of RQ's SimpleWorker, whose recoveries are the longest, end.
    runs = [
        (kind, one)
        for one in reversed(worker_kinds)
        for kind in KINDS
        if one != PGQUEUER.name or not KINDS[kind].of_redis
    ]
    slots = _Slots()
    with ThreadPoolExecutor(len(runs)) as pool:
        try:
            figures_by_run = dict(
                zip(runs, pool.map(lambda run: _one_run(run[0], run[1], times, slots), runs), strict=True)
            )
        finally:
            slots.close()
    for (kind, worker_kind), figures in figures_by_run.items():
        _add(kind, worker_kind, figures, report)
    for kind in KINDS:
        print_columns(kind, _COLUMNS)
        for worker_kind in worker_kinds:
            if cells := _cells(kind, worker_kind, report.figures):
                print_row(worker_kind, _COLUMNS, cells)


class _Slots:
    """Slots for the runs that have their load; after `close`, no further run begins."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(_LOADED)
        self._closed = False

    @contextmanager
    def slot(self) -> Iterator[None]:
        with self._free:
            require(not self._closed, "another run has failed")
            yield

    def close(self) -> None:
        self._closed = True


def _one_run(kind: str, worker_kind: str, times: int, slots: _Slots) -> RunFigures:
    """Run a process, and let the next one start as soon as this one's load has ended."""
    command = [sys.executable, "-m", "tests.benchmarks.quality_run", worker_kind, kind, str(times)]
    with ExitStack() as stack:
        with slots.slot():
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert process.stdout is not None
            loaded = process.stdout.readline() == "loaded\n"
        answer = process.stdout.readline()
    require(loaded and bool(answer), f"the run of {worker_kind} with the fault {kind} failed")
    figures = RunFigures(**json.loads(answer))
    print(f"{worker_kind}, {kind}: {answer.rstrip()}", file=sys.stderr)
    return figures


def _add(kind: str, worker_kind: str, found: RunFigures, report: Report) -> None:
    recovered = [round(one, 2) for one in found.recoveries if one is not None]
    figures: dict[str, tuple[str, Sequence[float]]] = {
        "calls": ("calls", [found.calls]),
        "accepted": ("calls", [found.accepted]),
        "lost": ("events", [found.lost]),
        "doubled": ("inserts", [found.doubled]),
        "recovery": ("s", recovered),
        "never recovered": ("faults", [len(found.recoveries) - len(recovered)]),
        "latency p99": ("ms", [round(1e3 * found.p99, 1)]),
        "queue entries": ("entries/delivery", [] if found.entries is None else [round(found.entries, 3)]),
        "wait for the last event": ("s", [round(found.waited, 1)]),
    }
    for name, (unit, runs) in figures.items():
        if runs:
            report.add("quality", _label(kind, worker_kind, name), unit, runs)


def _label(kind: str, worker_kind: str, name: str) -> str:
    return f"{kind}, {worker_kind}: {name}"


def _cells(kind: str, worker_kind: str, figures: Sequence[Figure]) -> list[str]:
    """Return the figures of one kind of worker and of fault, in the order of _COLUMNS; none if it has no run."""
    runs = {figure.label: figure.runs for figure in figures if figure.benchmark == "quality"}

    def of(name: str) -> Sequence[float]:
        return runs.get(_label(kind, worker_kind, name), [])

    if not of("accepted"):
        return []
    recovery = sorted([*of("recovery"), *[math.inf] * int(of("never recovered")[0])])
    return [
        f"{of('accepted')[0]:,} of {of('calls')[0]:,}",
        f"{of('lost')[0]:,}",
        f"{of('doubled')[0]:,}",
        *([_seconds(statistics.median_high(recovery)), _seconds(recovery[-1])] if recovery else ["–", "–"]),
        f"{of('latency p99')[0]:,.0f}",
        f"{of('queue entries')[0]:.2f}" if of("queue entries") else "–",
    ]


def _seconds(value: float) -> str:
    return "never" if value == math.inf else f"{value:.1f}"


def quality_table(report: Report) -> str:
    """Return the figures of a report as a table in Markdown."""
    figures = report.figures
    head = ("fault", "worker", *_COLUMNS)
    rows = [
        (kind, worker_kind, *cells)
        for kind in KINDS
        for worker_kind in WORKER_KINDS
        if (cells := _cells(kind, worker_kind, figures))
    ]
    return markdown(head, rows)
