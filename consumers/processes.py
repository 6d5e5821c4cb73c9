"""A worker as a child process of a command that runs one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from producers.errors import HistoryError

_STOP_SECONDS = 15.0


@contextmanager
def worker_process(log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run `trading-history worker` with this process's environment; stopped, after the job at hand, at the end.

    It has a session of its own, so that Ctrl-C reaches only its parent, which then stops it in order.
    """
    command = [sys.executable, "-m", "consumers.cli", "worker"]
    with ExitStack() as opened:
        output = None if log is None else opened.enter_context(open(log, "ab"))
        worker = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield worker
    finally:
        worker.terminate()
        try:
            worker.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def wait_for_worker(worker: subprocess.Popen[bytes]) -> None:
    """Block as long as the worker runs; raises HistoryError when it ends by itself."""
    worker.wait()
    raise HistoryError(f"the worker ended by itself, with status {worker.returncode}")
