"""Controllers, relays and workers as processes, and the states in an outbox file, read without an Outbox."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import psutil
from redis import Redis
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from consumers.embedded.child_processes import worker_process
from tests.faults.proxy import Proxy
from tests.rq_programs import end, until

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "consumers.cli"]

# Records two events and prints the time at its end.
TWO_EVENTS = """
import time
from datetime import timedelta
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot

producer = HistoryProducer()
for number in range(2):
    producer.record(a_snapshot(after=timedelta(microseconds=time.time_ns() // 1000 % 10**9 + number)))
print(time.monotonic(), flush=True)
"""


class Ended(NamedTuple):
    """Process that has ended. `seconds`: time from the end of its script to its exit."""

    seconds: float
    returncode: int
    printed: str
    errors: str


def states(outbox: Path) -> dict[str, int]:
    """Return the number of entries in each state."""
    with closing(sqlite3.connect(outbox)) as db:
        return dict(db.execute("SELECT state, count(*) FROM entry_states GROUP BY state"))


def unsettled(outbox: Path) -> int:
    found = states(outbox)
    return found.get("pending", 0) + found.get("sent", 0)


def make_older(outbox: Path, seconds: float) -> None:
    """Move the recording times of all entries back by `seconds`."""
    with closing(sqlite3.connect(outbox)) as db:
        db.execute("UPDATE entries SET recorded_at = recorded_at - ?", (seconds,))
        db.commit()


def run_script(script: str, folder: Path, *arguments: object, name: str = "controller.py", **environment: str) -> Ended:
    """Run `script` from a file, which multiprocessing needs. Its last line is the monotonic time at its end."""
    (folder / name).write_text(script)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(folder / name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    printed, errors = process.communicate(timeout=60)
    ended = time.monotonic()
    at = float(printed.split()[-1]) if printed.split() else ended
    return Ended(ended - at, process.returncode, printed, errors)


@contextmanager
def a_worker(redis: Redis, log: Path) -> Iterator[psutil.Process]:
    """Run `trading-history worker` and wait until it is ready; stop it at the end of the block."""
    with worker_process(log) as worker:
        until(lambda: bool(redis.scard(WORKERS_BY_QUEUE_KEY % "history")), 40)
        yield psutil.Process(worker.pid)


@contextmanager
def a_relay(log: Path, *arguments: object, wait: bool = True, **environment: str) -> Iterator[psutil.Popen]:
    """Run `trading-history relay` with its log in `log`; end it at the end of the block."""
    with log.open("wb") as output:
        process = psutil.Popen(
            [*COMMAND, "relay", *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
    try:
        if wait:
            until(lambda: process.poll() is not None or bool(log.read_text()), 20)
            assert process.poll() is None, log.read_text()
        yield process
    finally:
        end(process)


@contextmanager
def a_proxy(redis_url: str, folder: Path) -> Iterator[tuple[Proxy, str]]:
    """Run a proxy before the Redis of this URL; yield it and its URL."""
    target = Redis.from_url(redis_url).connection_pool.connection_kwargs["path"]
    proxy = Proxy(folder / "proxy.sock", Path(target))
    with proxy.running():
        yield proxy, f"unix://{quote(str(folder / 'proxy.sock'))}?db=0"
