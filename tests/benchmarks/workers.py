"""Workers of this project and of RQ, and relays, started as an operator starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from rq.worker_registration import REDIS_WORKER_KEYS

from consumers.embedded.child_processes import stop, worker_process
from producers.outbox import Outbox
from tests.benchmarks.checks import wait_for_progress
from tests.benchmarks.environment import queue_name, redis

Start = Callable[[Path], AbstractContextManager[list[int]]]
_START_PAUSE_SECONDS = 1.0  # from its registration until a worker surely waits for jobs, or a relay for entries


@contextmanager
def history_workers(folder: Path, processes: int = 1) -> Iterator[list[int]]:
    """Run `processes` workers (`trading-history worker`); yield the process ids once all wait for jobs."""
    with ExitStack() as stack:
        workers = [stack.enter_context(worker_process(folder / "worker.log")) for _ in range(processes)]
        wait_until_ready(processes)
        yield [worker.pid for worker in workers]


@contextmanager
def relay_and_worker(folder: Path) -> Iterator[list[int]]:
    """Run a worker, and `trading-history relay` for `folder`/outbox.db; producers leave relaying to it."""
    outbox = folder / "outbox.db"
    command = [sys.executable, "-m", "consumers.cli", "relay"]
    environment = os.environ | {"HISTORY_OUTBOX": str(outbox)}
    with history_workers(folder) as workers, open(folder / "relay.log", "ab") as log:
        relay = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            with Outbox(outbox) as opened:
                wait_for_progress(opened.header.relay_is_alive, True, pause=0.05)
                time.sleep(_START_PAUSE_SECONDS)
            yield [*workers, relay.pid]
        finally:
            stop(relay)


@contextmanager
def simple_worker(folder: Path) -> Iterator[list[int]]:
    """Run RQ's SimpleWorker, which runs jobs one by one without forking; yield its process id."""
    command = [sys.executable, "-m", "rq.cli", "worker", "--url", os.environ["REDIS_URL"]]
    command += ["--worker-class", "rq.SimpleWorker", "--serializer", "json", queue_name()]
    with open(folder / "simple-worker.log", "ab") as log:
        worker = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_ready(1)
        yield [worker.pid]
    finally:
        stop(worker)


def wait_until_ready(processes: int) -> None:
    with redis() as client:
        wait_for_progress(lambda: int(client.scard(REDIS_WORKER_KEYS)), processes, pause=0.05)
    time.sleep(_START_PAUSE_SECONDS)
