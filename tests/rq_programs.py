"""RQ's own commands as processes, as an operator runs them, and functions that wait for their effects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
    """Wait until the condition holds, and fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.02)


def end(process: subprocess.Popen[Any] | psutil.Popen) -> None:
    """End a program that a test has started, and wait for its end: SIGTERM, and SIGKILL after 3 s.

    If it is killed at once, it does not write which branches it has run.
    """
    if process.poll() is None:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # in case it is stopped
    try:
        process.wait(3)
    except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
        process.kill()
        process.wait(10)


def somebody_waits_for_a_lock() -> bool:
    """Return whether a session of the test's database waits for a lock."""
    with get_db() as db:
        return bool(db.scalar(_WAITING))


def rq(command: str, *arguments: str) -> str:
    """Run `rq <command>` to its end and return its output."""
    line = [sys.executable, "-m", "rq.cli", command, "--url", os.environ["REDIS_URL"], *arguments]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=30, env=environment).stdout


@contextmanager
def rq_process(command: str, *arguments: str, log: Path, url: bool = True) -> Iterator[psutil.Popen]:
    """Run `rq <command>` with its output in `log`, and end it and its children with the block."""
    line = [sys.executable, "-m", "rq.cli", command, *(("--url", os.environ["REDIS_URL"]) if url else ()), *arguments]
    with log.open("wb") as output:
        process = psutil.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        end(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a pool's workers, which may still run


def registered_workers(redis: Redis) -> dict[int, str]:
    """Return the workers in RQ's list: process id to name."""
    keys = [as_text(key) for key in redis.smembers(REDIS_WORKER_KEYS)]
    return {int(pid): key.removeprefix("rq:worker:") for key in keys if (pid := redis.hget(key, "pid"))}


@contextmanager
def ignoring(*numbers: signal.Signals) -> Iterator[None]:
    """Ignore these signals in this process during the block. Processes that it starts there ignore them too."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def rq_worker(worker_class: str, log: Path) -> Iterator[psutil.Popen]:
    """Run `rq worker` with this class on the queue history as WORKER_NAME, and kill it at the end of the block."""
    options = ["--name", WORKER_NAME, "--serializer", "json", "--worker-class", worker_class]
    with rq_process("worker", *options, "history", log=log) as process:
        yield process
