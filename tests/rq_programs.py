"""RQ's own commands as processes, as an operator runs them, and waiting for what they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from redis import Redis
from rq.utils import as_text
from rq.worker_registration import REDIS_WORKER_KEYS
from sqlalchemy import text

from consumers.db.engine import get_db

WORKER_NAME = "the-worker"
_WAITING = text("""
    SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()
""")


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def somebody_waits_for_a_lock() -> bool:
    with get_db() as db:
        return bool(db.scalar(_WAITING))


def rq(command: str, *arguments: str) -> str:
    """Run `rq <command>` to its end; what it printed."""
    line = [sys.executable, "-m", "rq.cli", command, "--url", os.environ["REDIS_URL"], *arguments]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=30, env=environment).stdout


@contextmanager
def rq_process(command: str, *arguments: str, log: Path, url: bool = True) -> Iterator[psutil.Popen]:
    """Run `rq <command>`, its output in `log`; killed at the end of the block, with its children."""
    line = [sys.executable, "-m", "rq.cli", command, *(("--url", os.environ["REDIS_URL"]) if url else ()), *arguments]
    with log.open("wb") as output:
        process = psutil.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a pool's workers too, also when the pool itself is gone
        process.wait(10)


def registered_workers(redis: Redis) -> dict[int, str]:
    """The workers that RQ knows: process id → name."""
    keys = [as_text(key) for key in redis.smembers(REDIS_WORKER_KEYS)]
    return {int(pid): key.removeprefix("rq:worker:") for key in keys if (pid := redis.hget(key, "pid"))}


@contextmanager
def ignoring(*numbers: signal.Signals) -> Iterator[None]:
    """Inside the block this process ignores these signals, and so do, at their start, the processes that it starts."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def rq_worker(worker_class: str, log: Path) -> Iterator[psutil.Popen]:
    """`rq worker` with this class on the queue history, under WORKER_NAME; killed at the end of the block."""
    options = ["--name", WORKER_NAME, "--serializer", "json", "--worker-class", worker_class]
    with rq_process("worker", *options, "history", log=log) as process:
        yield process
