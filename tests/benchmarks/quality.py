"""Delivery quality under faults: what is lost, doubled and late with each contender and each kind of fault."""

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
from pathlib import Path

from tests.benchmarks import peer
from tests.benchmarks.checks import require
from tests.benchmarks.printing import print_columns, print_row
from tests.benchmarks.quality_counts import Outcome
from tests.benchmarks.quality_faults import KINDS
from tests.benchmarks.quality_run import CONTENDERS
from tests.benchmarks.report import Figure, Report

_LOADED = 2  # runs with a load at the same time; more of them may wait for their last events
_COLUMNS = ("accepted", "lost", "doubled", "recovery p50, s", "worst, s", "latency p99, ms", "queue entries")
_PGQUEUER = "PgQueuer"


def measure_quality(times: int, report: Report) -> None:
    """Cause each kind of fault `times` times for each contender, each in a separate run, and print a row for each."""
    contenders = [one for one in CONTENDERS if one != _PGQUEUER or peer.installed()]
    if len(contenders) < len(CONTENDERS):
        report.note("PgQueuer is not installed (dependency group bench): not measured")
    # HistoryWorker comes last: meanwhile the runs of RQ's SimpleWorker, whose recoveries are the longest, end.
    runs = [
        (kind, one) for one in reversed(contenders) for kind in KINDS if one != _PGQUEUER or not KINDS[kind].of_redis
    ]
    slots = _Slots()
    with ThreadPoolExecutor(len(runs)) as pool:
        try:
            outcomes = dict(zip(runs, pool.map(lambda run: _one_run(run[0], run[1], times, slots), runs), strict=True))
        finally:
            slots.close()
    for (kind, contender), outcome in outcomes.items():
        _add(kind, contender, outcome, report)
    for kind in KINDS:
        print_columns(kind, _COLUMNS)
        for contender in contenders:
            if cells := _cells(kind, contender, report.figures):
                print_row(contender, _COLUMNS, cells)


class _Slots:
    """Slots for the runs that have their load; after `close`, no further run begins."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(_LOADED)
        self._closed = False

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._free:
            require(not self._closed, "another run has failed")
            yield

    def close(self) -> None:
        self._closed = True


def _one_run(kind: str, contender: str, times: int, slots: _Slots) -> Outcome:
    """Run a process, and let the next one start as soon as this one's load has ended."""
    command = [sys.executable, "-m", "tests.benchmarks.quality_run", contender, kind, str(times)]
    with ExitStack() as stack:
        with slots.one():
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert process.stdout is not None
            loaded = process.stdout.readline() == "loaded\n"
        answer = process.stdout.readline()
    require(loaded and bool(answer), f"the run of {contender} with the fault {kind} failed")
    outcome = Outcome(**json.loads(answer))
    print(f"{contender}, {kind}: {answer.rstrip()}", file=sys.stderr)
    return outcome


def _add(kind: str, contender: str, outcome: Outcome, report: Report) -> None:
    recovered = [round(one, 2) for one in outcome.recoveries if one is not None]
    figures: dict[str, tuple[str, Sequence[float]]] = {
        "calls": ("calls", [outcome.calls]),
        "accepted": ("calls", [outcome.accepted]),
        "lost": ("events", [outcome.lost]),
        "doubled": ("inserts", [outcome.doubled]),
        "recovery": ("s", recovered),
        "never recovered": ("faults", [len(outcome.recoveries) - len(recovered)]),
        "latency p99": ("ms", [round(1e3 * outcome.p99, 1)]),
        "queue entries": ("entries/delivery", [] if outcome.entries is None else [round(outcome.entries, 3)]),
        "wait for the last event": ("s", [round(outcome.waited, 1)]),
    }
    for name, (unit, runs) in figures.items():
        if runs:
            report.add("quality", _label(kind, contender, name), unit, runs)


def _label(kind: str, contender: str, name: str) -> str:
    return f"{kind}, {contender}: {name}"


def _cells(kind: str, contender: str, figures: Sequence[Figure]) -> list[str]:
    """Return the figures of one contender and one kind of fault, in the order of _COLUMNS; none if it has no run."""
    runs = {figure.label: figure.runs for figure in figures if figure.benchmark == "quality"}

    def of(name: str) -> Sequence[float]:
        return runs.get(_label(kind, contender, name), [])

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


def quality_table(file: Path) -> str:
    """Return the table of the figures in the file as Markdown."""
    figures = [Figure(**one) for one in json.loads(file.read_text("utf-8"))["figures"]]
    head = ("fault", "worker", *_COLUMNS)
    rows = [
        (kind, contender, *cells)
        for kind in KINDS
        for contender in CONTENDERS
        if (cells := _cells(kind, contender, figures))
    ]
    return "".join(f"| {' | '.join(row)} |\n" if row else f"{'|---' * len(head)}|\n" for row in (head, (), *rows))
