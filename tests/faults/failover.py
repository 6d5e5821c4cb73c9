"""Failover of Redis behind Sentinel under load: events accepted, events stored, and the time without a new row."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from redis import Redis
from rq.worker_registration import REDIS_WORKER_KEYS
from sqlalchemy import text

from consumers.db.engine import engine
from consumers.embedded.child_processes import stop, worker_process
from producers.history_producer import HistoryProducer
from producers.redis_url import redis_client
from tests.factories import a_snapshot
from tests.faults.accepted import Accepted, delivery_of_receipt
from tests.faults.sentinels import Cluster
from tests.faults.verdict import Verdict, verdict

_RATE = 200  # events a second
_BEFORE_SECONDS = 1.5
_STALE_EVENTS = 50
_DRAIN_SECONDS = 120.0


@dataclass
class Failovers:
    """Results. `pauses`: the longest time without a new row of each failover, in seconds."""

    pauses: dict[str, float] = field(default_factory=dict)
    longest_call: float = 0.0
    lost_by_redis: int = 0
    judged: Verdict | None = None


class _Load:
    """Thread that records at a steady rate, and a thread that watches the number of rows."""

    def __init__(self, producer: HistoryProducer, found: Failovers) -> None:
        self.accepted = Accepted()
        self._producer, self._found = producer, found
        self._done = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._record, self._watch)]
        self._longest_pause = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in self._threads:
                thread.join()

    def pause_during(self, fault: Callable[[], None]) -> float:
        """Cause a fault; return the longest time without a new row until rows are added again."""
        self._longest_pause = 0.0
        fault()
        rows = _rows()
        while _rows() == rows:
            time.sleep(0.02)
        time.sleep(_BEFORE_SECONDS)  # the other worker threads and the relay may notice it later
        return self._longest_pause

    def _record(self) -> None:
        number = 0
        while not self._done.wait(1 / _RATE):
            began = time.monotonic()
            snapshot = a_snapshot(after=timedelta(seconds=number))
            receipt = self._producer.record(snapshot)
            self._found.longest_call = max(self._found.longest_call, time.monotonic() - began)
            self.accepted.deliveries.append(delivery_of_receipt(receipt, snapshot))
            number += 1

    def _watch(self) -> None:
        rows, changed_at = _rows(), time.monotonic()
        while not self._done.wait(0.02):
            self._longest_pause = max(self._longest_pause, time.monotonic() - changed_at)
            if (now := _rows()) != rows:
                rows, changed_at = now, time.monotonic()


def _rows() -> int:
    with engine().connect() as db:
        return int(db.execute(text("SELECT count(*) FROM portfolio_history")).scalar_one())


def run_failovers(folder: Path, kinds: Sequence[str]) -> Failovers:
    """Start a cluster under load, then fail its current master once for each of `kinds`.

    A kind is `killed`, or `paused`, in which case the master is resumed afterwards. The settings must
    name a database with the tables. REDIS_URL is set to the cluster's URL.
    """
    cluster, found = Cluster(folder), Failovers()
    with ExitStack() as stack:
        stack.enter_context(cluster.running())
        os.environ["REDIS_URL"] = cluster.url
        stack.enter_context(worker_process(folder / "worker.log"))
        stack.enter_context(_rq_worker(cluster, folder))
        with redis_client(cluster.url) as redis:
            while redis.scard(REDIS_WORKER_KEYS) < 2:
                time.sleep(0.05)
        producer = stack.enter_context(HistoryProducer(outbox=folder / "outbox.db"))
        load = _Load(producer, found)
        outboxes = [folder / "outbox.db"]
        with load.running():
            for kind in kinds:
                time.sleep(_BEFORE_SECONDS)
                master = cluster.master()
                found.pauses[kind] = load.pause_during(lambda: _fail(cluster, kind, master))  # noqa: B023  # called at once
                if kind == "paused":
                    found.lost_by_redis += _write_to_stale_master(cluster, master, folder / "stale.db", load.accepted)
                    outboxes.append(folder / "stale.db")
        with redis_client(cluster.url) as redis:
            _drain(outboxes, redis, producer)
        found.judged = verdict(outboxes, {"producer": load.accepted})
    return found


@contextmanager
def _rq_worker(cluster: Cluster, folder: Path) -> Iterator[None]:
    """Run `rq worker` with HistoryWorker."""
    (folder / "behind_sentinel.py").write_text(cluster.rq_settings())
    command = [sys.executable, "-m", "rq.cli", "worker", "--path", str(folder), "--config", "behind_sentinel"]
    with open(folder / "rq-worker.log", "ab") as log:
        process = subprocess.Popen(
            [*command, "--worker-class", "consumers.worker.HistoryWorker", "history"], stdout=log, stderr=log
        )
    try:
        yield
    finally:
        stop(process)


def _fail(cluster: Cluster, kind: str, master: int) -> None:
    if kind == "killed":
        cluster.kill(master)
    else:
        cluster.pause(master)
    cluster.wait_for_failover(master)


def _write_to_stale_master(cluster: Cluster, port: int, outbox: Path, accepted: Accepted) -> int:
    """Resume the old master and send events to it before Sentinel makes it a replica, which drops them.

    Returns:
        The number of jobs sent.
    """
    cluster.resume(port)
    with cluster.client(port) as stale, HistoryProducer(stale, outbox=outbox) as producer:
        events = [a_snapshot(after=timedelta(days=1, seconds=number)) for number in range(_STALE_EVENTS)]
        receipts = producer.record_many(events)
        accepted.deliveries.extend(map(delivery_of_receipt, receipts, events))
        while producer.status().pending:
            time.sleep(0.02)
        sent = producer.status().sent
        cluster.wait_for_replica(port)
    return sent


def _drain(outboxes: Sequence[Path], redis: Redis, running: HistoryProducer) -> None:
    with ExitStack() as stack:
        others = [stack.enter_context(HistoryProducer(redis, outbox=path)) for path in outboxes[1:]]
        deadline = time.monotonic() + _DRAIN_SECONDS
        while sum(producer.status().depth for producer in [running, *others]) and time.monotonic() < deadline:
            time.sleep(0.05)


def print_failovers(found: Failovers) -> int:
    """Print the results; return 1 if a promise was broken, else 0."""
    assert found.judged is not None
    judged = found.judged
    lost = judged.accepted - judged.rows - judged.duplicate - judged.rejected
    print(f"{judged.accepted} events accepted at {_RATE}/s, {judged.rows} rows, {lost} lost")
    for kind, seconds in found.pauses.items():
        print(f"master {kind}: no new row for {seconds:.1f} s")
    print(
        f"longest call {1000 * found.longest_call:.0f} ms; {found.lost_by_redis} jobs taken and lost by the old master"
    )
    for breach in judged.breaches[:20]:
        print(f"  {breach}", file=sys.stderr)
    return 1 if judged.breaches else 0
