"""Rate at which waiting events become rows: this project's worker, other workers, and the limits of the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from tests.benchmarks.ceilings import copy_staged, many_rows, measured, one_by_one, redis_list
from tests.benchmarks.drains import Drain, drain_queue
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.peer import PEERS
from tests.benchmarks.printing import print_columns, print_row, spread
from tests.benchmarks.report import Report
from tests.benchmarks.workers import history_workers, simple_worker

_RUNS = 3
_TARGET_SECONDS = 4.0
_TRIAL_EVENTS = 500
_TRIAL_SECONDS = 0.5
_COLUMNS = ("events", "events/s", "min..max events/s")
_COSTS = ("worker ms", "PostgreSQL ms", "Valkey ms", "commands", "WAL syncs")

OURS = "HistoryWorker, one process"
LIMIT = "no queue: COPY of 500, then insert"
CONTENDERS: dict[str, Callable[[Path, int], Drain]] = {
    OURS: partial(drain_queue, history_workers),
    "HistoryWorker, two processes": partial(drain_queue, partial(history_workers, processes=2)),
    "RQ SimpleWorker, one process": partial(drain_queue, simple_worker),
    **{peer.contender: peer.drain for peer in PEERS},
    "no queue: one row a commit": partial(measured, one_by_one),
    "no queue: 500 rows a commit": partial(measured, many_rows),
    LIMIT: partial(measured, copy_staged),
    "Redis list, 500 rows a commit": partial(measured, redis_list),
}


def measure_throughput(most: int, report: Report) -> None:
    """Drain each contender _RUNS times in turn, with at most `most` events, and print the medians."""
    contenders = dict(CONTENDERS)
    for peer in PEERS:
        if not peer.installed:
            del contenders[peer.contender]
            report.note(f"{peer.name} is not installed (dependency group bench): not measured")
    with bench_stack() as folder:
        counts = {name: _scaled(drain, folder, most) for name, drain in contenders.items()}
        drains: dict[str, list[Drain]] = {name: [] for name in contenders}
        for number in range(1, _RUNS + 1):
            for name, drain in contenders.items():
                drains[name].append(drain(folder, counts[name]))
                print(f"run {number}, {name}: {drains[name][-1].rate:,.0f} events/s", file=sys.stderr)
    _print_rates(drains, report)
    _print_ratios(drains, report)
    _print_costs(drains, report)


def _scaled(drain: Callable[[Path, int], Drain], folder: Path, most: int) -> int:
    """Return the number of events with which a run takes about _TARGET_SECONDS; the trial runs are the warm-up."""
    count = min(_TRIAL_EVENTS, most)
    trial = drain(folder, count)
    if trial.seconds < _TRIAL_SECONDS and count < most:
        count = min(10 * count, most)
        trial = drain(folder, count)
    hundreds = round(trial.rate * _TARGET_SECONDS / 100)
    return max(min(hundreds * 100, most), min(_TRIAL_EVENTS, most))


def _print_rates(drains: dict[str, list[Drain]], report: Report) -> None:
    print_columns(f"drain of waiting events, {_RUNS} runs", _COLUMNS)
    for name, runs in drains.items():
        rates = [run.rate for run in runs]
        rate = report.add("throughput", name, "events/s", rates)
        print_row(name, _COLUMNS, [f"{runs[0].events:,}", f"{rate:,.0f}", spread(rates)])


def ratios(drains: dict[str, list[Drain]]) -> dict[str, list[float]]:
    """Return the rate of each contender as a ratio to LIMIT, and of OURS to the fastest peer, for each run."""
    peers = [peer.contender for peer in PEERS if peer.contender in drains]
    fastest = max(peers, key=lambda name: median(run.rate for run in drains[name]), default=None)
    pairs = [(name, LIMIT) for name in drains if name != LIMIT] + ([(OURS, fastest)] if fastest else [])
    return {
        f"{name} / {other}": [run.rate / beside.rate for run, beside in zip(drains[name], drains[other], strict=True)]
        for name, other in pairs
    }


def _print_ratios(drains: dict[str, list[Drain]], report: Report) -> None:
    print("\nratios of the rates, medians and min..max of the runs", flush=True)
    for name, runs in ratios(drains).items():
        value = report.add("throughput", name, "ratio", runs)
        print(f"{name}: {value:.3f} ({spread(runs, 3)})", flush=True)


def _print_costs(drains: dict[str, list[Drain]], report: Report) -> None:
    print_columns("cost of one event, medians", _COSTS)
    for name, runs in drains.items():
        costs = [*zip(*map(_costs, runs), strict=True)]
        print_row(name, _COSTS, [f"{median(values):.3f}" for values in costs])
        if name == OURS:
            for cost, values in zip(_COSTS, costs, strict=True):
                report.add("throughput", f"{name}, one event: {cost}", "", values)


def _costs(run: Drain) -> Sequence[float]:
    usage = run.usage
    seconds = (usage.worker * 1e3, usage.postgres * 1e3, usage.valkey * 1e3)
    return [value / run.events for value in (*seconds, usage.commands, run.syncs)]
