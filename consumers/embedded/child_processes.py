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
    """Run `trading-history worker` with this process's environment inside the block.

    At the end of the block the worker finishes its batch and stops.

    The worker has its own session, so Ctrl-C reaches only its parent, which then stops it. If the parent is killed, the
    worker ends too. It keeps the file descriptors `keep` open. It serves metrics at `metrics_port` only, and ignores
    the setting.
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
    """Start the process of `worker_process`. The caller must stop it and then `release` it."""
    options = ["--debug"] if debug else []
    return _start(*options, "worker", *arguments, stdout=output, stderr=output, pass_fds=keep)


@contextmanager
def dashboard_process(listening: socket.socket, password: str) -> Iterator[None]:
    """Run `trading-history dashboard` inside the block, on a listening socket that it takes over.

    If it ends before the block does, print that on stderr; nothing else depends on it.
    """
    with listening:
        number = listening.fileno()
        child = _start(
            "dashboard", "--fd", str(number),
            stdout=subprocess.DEVNULL,  # only the address, which the parent prints
            pass_fds=[number],
            env={**os.environ, "HISTORY_DASHBOARD_PASSWORD": password},
        )  # fmt: skip
    stopping = threading.Event()

    def watch() -> None:
        if child.wait() and not stopping.is_set():
            print(f"RQ Dashboard ended with status {child.returncode}; everything else continues.", file=sys.stderr)

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
    """Stop and release the child at the end of the block."""
    try:
        yield
    finally:
        before()
        stop(child)
        release(child)


def release(child: subprocess.Popen[bytes]) -> None:
    """Close the pipe to a child's standard input. A child that still runs then ends."""
    assert child.stdin is not None
    child.stdin.close()


def stop(child: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, after which a worker finishes its batch, and kill the child if it does not end within 15 s."""
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def stop_with_stdin() -> None:
    """Send SIGTERM to this process when its standard input ends, which happens when its parent dies."""

    def watch() -> None:
        # Not with sys.stdin: the interpreter cannot exit while a thread has its buffer locked.
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def wait_for_worker(worker: subprocess.Popen[bytes]) -> None:
    """Wait until the worker ends, then raise HistoryError, since nobody stopped it."""
    worker.wait()
    raise HistoryError(f"the worker ended unexpectedly, with status {worker.returncode}")
