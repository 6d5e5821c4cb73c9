"""RQ's own commands as processes, as an operator runs them, and waiting for what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text

from consumers.connection import get_db

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
def rq_worker(worker_class: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`rq worker` with this class on the queue history, under WORKER_NAME; killed at the end of the block."""
    line = [sys.executable, "-m", "rq.cli", "worker", "--url", os.environ["REDIS_URL"], "--name", WORKER_NAME]
    line += ["--serializer", "json", "--worker-class", worker_class, "history"]
    with log.open("wb") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
