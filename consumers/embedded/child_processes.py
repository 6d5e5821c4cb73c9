"""Workers and RQ Dashboard as child processes of a command that runs them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

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
    arguments = [] if metrics_port is None else [f"--metrics-port={metrics_port}"]
    with ExitStack() as opened:
        output = None if log is None else opened.enter_context(open(log, "ab"))
        worker = start_worker(arguments, output=output, keep=keep)
    with _stopped(worker):
        yield worker


def start_worker(
    arguments: Sequence[str] = (), *, debug: bool = False, output: IO[bytes] | None = None, keep: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """The process of `worker_process`, which its caller must stop and `release`."""
    options = ["--debug"] if debug else []
    return _start(*options, "worker", *arguments, stdout=output, stderr=output, pass_fds=keep)


@contextmanager
def dashboard_process(listening: socket.socket, password: str) -> Iterator[None]:
    """Run `trading-history dashboard` on a listening socket, which it takes over, as `worker_process` does a worker.

    That it ends by itself is said on stderr: nothing else depends on it.
    """
    with listening:
        number = listening.fileno()
        child = _start(
            "dashboard", "--fd", str(number),
            stdout=subprocess.DEVNULL,  # the address, which its parent tells
            pass_fds=[number],
            env={**os.environ, "HISTORY_DASHBOARD_PASSWORD": password},
        )  # fmt: skip
    stopping = threading.Event()

    def watch() -> None:
        if child.wait() and not stopping.is_set():
            print(f"RQ Dashboard ended by itself, with status {child.returncode}; all else goes on.", file=sys.stderr)

    watching = threading.Thread(target=watch, name="dashboard-watch", daemon=True)
    watching.start()
    try:
        with _stopped(child, before=stopping.set):
            yield
    finally:
        watching.join()


def _start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "consumers.cli", *arguments, "--while-stdin"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **options)


@contextmanager
def _stopped(child: subprocess.Popen[bytes], before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """In order at the end of the block."""
    try:
        yield
    finally:
        before()
        stop(child)
        release(child)


def release(child: subprocess.Popen[bytes]) -> None:
    """Close the pipe by whose end a child knows that its parent is gone."""
    assert child.stdin is not None
    child.stdin.close()


def stop(child: subprocess.Popen[bytes]) -> None:
    """In order, a worker after the batch at hand; one that does not end in time is killed."""
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


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
