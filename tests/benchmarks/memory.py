"""Memory of each process and length of each queue, while two workers store events at full speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
from rq import Queue

from producers.errors import OutboxError
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from tests.benchmarks.backlog import snapshots
from tests.benchmarks.checks import Rows, require, require_rows, wait_for_progress
from tests.benchmarks.environment import bench_stack, queue_name, redis
from tests.benchmarks.printing import print_columns, print_row
from tests.benchmarks.recording import CHUNK
from tests.benchmarks.report import Report
from tests.benchmarks.workers import history_workers

_COLUMNS = (
    *("rows", "Redis MiB", "worker MiB", "other worker MiB", "producer MiB"),
    *("queued jobs", "outbox pending", "outbox sent"),
)
_UNITS = ("rows", "MiB", "MiB", "MiB", "MiB", "jobs", "events", "events")
_MIB = 2**20
_SAMPLE_SECONDS = 1.0
_SHARE = 10  # sampling takes at most about 1/10 of the time
_FULL_SECONDS = 0.2  # pause before a retry when the outbox is full


@dataclass(frozen=True)
class Sample:
    """Redis' used_memory and the unique set size of each process, in MiB; queue length and outbox, in events."""

    rows: int
    redis: float
    worker: float
    other_worker: float
    producer: float
    queued: int
    pending: int
    sent: int


class Sampler:
    """Background thread that takes samples."""

    def __init__(self, outbox: Path, workers: Sequence[int]) -> None:
        self.samples: list[Sample] = []
        self._outbox = Outbox(outbox)  # not the producer's object: counting must not hold its lock
        self._processes = [psutil.Process(one) for one in (*workers, None)]
        self._redis = redis()
        self._queue = Queue(queue_name(), connection=self._redis)
        self._rows = Rows()

    def take(self) -> Sample:
        status = self._outbox.status()
        worker, other_worker, producer = (one.memory_full_info().uss / _MIB for one in self._processes)
        sample = Sample(
            rows=self._rows.count(),
            redis=self._redis.info("memory")["used_memory"] / _MIB,
            worker=worker,
            other_worker=other_worker,
            producer=producer,
            queued=self._queue.count,
            pending=status.pending,
            sent=status.sent,
        )
        self.samples.append(sample)
        return sample

    @contextmanager
    def running(self) -> Iterator[None]:
        ended = threading.Event()
        thread = threading.Thread(target=self._run, args=[ended], daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _run(self, ended: threading.Event) -> None:
        pause = 0.0
        while not ended.wait(pause):
            started = time.monotonic()
            self.take()
            pause = max(_SAMPLE_SECONDS, _SHARE * (time.monotonic() - started))


def measure_memory(events: int, report: Report) -> None:
    """Print a sample at the start, at half of the rows and when all is acknowledged, and the peak of each value."""
    with (
        bench_stack() as folder,
        history_workers(folder, 2) as workers,
        HistoryProducer(outbox=folder / "outbox.db") as producer,
    ):
        sampler, started = Sampler(folder / "outbox.db", workers), time.monotonic()
        start = sampler.take()
        with sampler.running():
            full = _record(producer, events)
            wait_for_progress(lambda: sampler.samples[-1].rows, events, pause=0.2)
            _wait_until_acknowledged(producer, events)
            seconds = time.monotonic() - started
        end = sampler.take()
        require_rows(events)
    rate = report.add("memory", f"{events} events, call -> acknowledged", "events/s", [events / seconds])
    print_columns(f"{events:,} events, {rate:,.0f}/s", _COLUMNS)
    _print(start, sampler.samples, end, report)
    if full:
        report.note(f"the outbox was full for {full:.0f} s: record_many raised OutboxError and was called again")


def _record(producer: HistoryProducer, events: int) -> float:
    """Record all events as fast as possible; return the seconds for which the outbox was full."""
    full = 0.0
    for first in range(0, events, CHUNK):
        facts = list(snapshots(min(CHUNK, events - first), first))
        while True:
            try:
                producer.record_many(facts)
                break
            except OutboxError as error:
                require("is full" in str(error), str(error))
                time.sleep(_FULL_SECONDS)
                full += _FULL_SECONDS
    return full


def _wait_until_acknowledged(producer: HistoryProducer, events: int) -> None:
    def settled() -> int:
        return events - producer.status().depth

    wait_for_progress(settled, events, pause=1.0)
    require(producer.status().rejected == 0, "events were rejected")


def _print(start: Sample, samples: Sequence[Sample], end: Sample, report: Report) -> None:
    middle = min(samples, key=lambda sample: abs(sample.rows - end.rows // 2))
    names = [field.name for field in fields(Sample)]
    peak = Sample(**{name: max(getattr(sample, name) for sample in samples) for name in names})
    for label, sample in (("start", start), ("half of the rows", middle), ("peak of each", peak), ("end", end)):
        values = [getattr(sample, name) for name in names]
        for column, unit, value in zip(_COLUMNS, _UNITS, values, strict=True):
            report.add("memory", f"{label}: {column}", unit, [value])
        print_row(label, _COLUMNS, [f"{value:,.0f}" for value in values])
    for name, unit in zip(names, _UNITS, strict=True):
        report.add("memory", f"each sample: {name}", unit, [getattr(sample, name) for sample in samples])
