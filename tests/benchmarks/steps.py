"""Where the time of one event goes: each step from the call to the settled entry, with an idle worker.

`python -m tests.benchmarks.steps FILE` is the worker of this benchmark: it writes the times of its steps to FILE. All
times are those of the system's monotonic clock, which all processes share.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import wraps
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

from consumers.embedded.child_processes import stop
from consumers.worker import batch
from consumers.worker.completion import Completion
from consumers.worker.history_worker import run_worker
from consumers.worker.reservations import Reservations
from producers.entry_sender import EntrySender
from producers.history_producer import HistoryProducer
from producers.outbox_deliveries import OutboxDeliveries
from tests.benchmarks.checks import require, require_rows
from tests.benchmarks.environment import bench_stack, queue_name, redis, reset
from tests.benchmarks.printing import print_header
from tests.benchmarks.report import Report
from tests.benchmarks.workers import wait_until_ready
from tests.factories import a_snapshot

_PACE_SECONDS = 0.02
_WARM_UP_EVENTS = 20
_SETTLE_SECONDS = 10.0
# Step, and the methods whose return ends it: in the producer's process, then in the worker's.
_IN_PRODUCER = (("relay: the job is in Redis", EntrySender, "_send"),)
_IN_WORKER = (
    ("queue: the worker has the job", Reservations, "wait"),
    ("reserve and read", Reservations, "reserve"),
    ("decode", batch, "_decoded"),
    ("transaction: insert and commit", batch, "_process_together"),
    ("acknowledge", Completion, "complete"),
)
_CALL, _SETTLE = "call: the entry is on disk", "settle: the outbox knows it"
STEPS = (_CALL, *(step for step, *_ in (*_IN_PRODUCER, *_IN_WORKER)), _SETTLE)


def measure_steps(events: int, report: Report) -> None:
    """Print the milliseconds that each step of an event takes, and their sum."""
    with bench_stack() as folder:
        reset()
        times = _ends(folder, _WARM_UP_EVENTS + events)[_WARM_UP_EVENTS:]
        require_rows(_WARM_UP_EVENTS + events)
    print_header(f"milliseconds, {events} events")
    for number, step in enumerate(STEPS, start=1):
        seconds = [ends[number] - ends[number - 1] for ends in times]
        report.add_quantiles("steps", step, seconds)
    report.add_quantiles("steps", "all steps", [ends[-1] - ends[0] for ends in times])


def _ends(folder: Path, events: int) -> list[list[float]]:
    """Return for each event when its call began and when each of STEPS ended."""
    calls: list[tuple[float, float]] = []
    settled: list[float] = []
    with ExitStack() as stack:
        sent = [stack.enter_context(_noted(owner, name)) for _, owner, name in _IN_PRODUCER]
        worker = stack.enter_context(_traced_worker(folder))
        producer = stack.enter_context(HistoryProducer(outbox=folder / "outbox.db", name="steps"))
        settled = stack.enter_context(_noted(OutboxDeliveries, "settle", lambda done: bool(done.changed)))
        for number in range(events):
            snapshot = a_snapshot(after=timedelta(seconds=number))
            began = time.monotonic()
            producer.record(snapshot)
            calls.append((began, time.monotonic()))
            deadline = began + _SETTLE_SECONDS
            while len(settled) <= number:
                require(time.monotonic() < deadline, f"event {number} was not settled")
                time.sleep(0.001)
            time.sleep(_PACE_SECONDS)
    in_worker = json.loads(worker.read_text("utf-8"))
    columns = [*zip(*calls, strict=True), *sent, *in_worker, settled]
    require({len(column) for column in columns} == {events}, "a step was not seen once for each event")
    # A step may end before the one before it: the worker may have a job before the relay has Redis' answer.
    return [list(accumulate(ends, max)) for ends in zip(*columns, strict=True)]


def _always(result: object) -> bool:
    return True


@contextmanager
def _noted(owner: Any, name: str, counts: Callable[[Any], bool] = _always) -> Iterator[list[float]]:
    """Note when each call of `owner.name` returned, if `counts` is true of what it returned."""
    ended: list[float] = []
    original = getattr(owner, name)

    @wraps(original)
    def noting(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if counts(result):
            ended.append(time.monotonic())
        return result

    with patch.object(owner, name, noting):
        yield ended


@contextmanager
def _traced_worker(folder: Path) -> Iterator[Path]:
    """Run the worker of this benchmark; yield the file that it writes when it ends."""
    file = folder / "steps.json"
    with open(folder / "worker.log", "ab") as log:
        command = [sys.executable, "-m", "tests.benchmarks.steps", str(file)]
        worker = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_ready(1)
        yield file
    finally:
        stop(worker)


def _trace(file: Path) -> None:
    counts: dict[str, Callable[[Any], bool]] = {"wait": bool, "reserve": lambda reservation: bool(reservation.jobs)}
    with ExitStack() as stack, redis() as client:
        noted = (_noted(owner, name, counts.get(name, _always)) for _, owner, name in _IN_WORKER)
        ended = [stack.enter_context(one) for one in noted]
        run_worker(client, queue_name())
    file.write_text(json.dumps(ended), "utf-8")


if __name__ == "__main__":
    _trace(Path(sys.argv[1]))
