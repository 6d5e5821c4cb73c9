"""A worker as a child process of a command that runs one, or several (see consumers.pool)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from producers.errors import HistoryError

STOP_SECONDS = 15.0


@contextmanager
def worker_process(
    log: Path | None = None, keep: Sequence[int] = (), metrics_port: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `trading-history worker` with this process's environment; stopped, after the job at hand, at the end.

    It has a session of its own, so that Ctrl-C reaches only its parent, which then stops it in order; and it ends by
    itself when its parent is killed. `keep` are file descriptors that it holds open as long as it lives. It answers
    scrapes at `metrics_port` only, whatever the settings say.
    """
    with ExitStack() as opened:
        output = None if log is None else opened.enter_context(open(log, "ab"))
        worker = start_worker(_scraped_at(metrics_port), output=output, keep=keep)
    try:
        yield worker
    finally:
        stop_worker(worker)
        release(worker)


def _scraped_at(port: int | None) -> list[str]:
    return [] if port is None else [f"--metrics-port={port}"]


def start_worker(
    arguments: Sequence[str] = (), *, debug: bool = False, output: IO[bytes] | None = None, keep: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """The process of `worker_process`, which its caller must stop and `release`."""
    program = [sys.executable, "-m", "consumers.cli", *(["--debug"] if debug else [])]
    return subprocess.Popen(
        [*program, "worker", "--while-stdin", *arguments],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
        pass_fds=keep,
    )


def release(worker: subprocess.Popen[bytes]) -> None:
    """Close the pipe by whose end a worker knows that its parent is gone."""
    assert worker.stdin is not None
    worker.stdin.close()


def stop_worker(worker: subprocess.Popen[bytes]) -> None:
    """In order, after the batch at hand; one that does not end in time is killed."""
    worker.terminate()
    try:
        worker.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def stop_with_stdin() -> None:
    """In the child: end this process, in order, when standard input ends, as it does when the parent dies."""

    def watch() -> None:
        # Not through sys.stdin: the interpreter cannot end while a thread holds its buffer.
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def wait_for_worker(worker: subprocess.Popen[bytes]) -> None:
    """Block as long as the worker runs; raises HistoryError when it ends by itself."""
    worker.wait()
    raise HistoryError(f"the worker ended by itself, with status {worker.returncode}")
