"""Commands of this project as child processes of another one: `demo`, `up`, and `worker --processes`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

STOP_SECONDS = 15.0


@contextmanager
def worker_process(log: Path | None = None, keep: Sequence[int] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Run `trading-history worker` with this process's environment inside the block.

    At the end of the block the worker finishes its batch and stops. It keeps the file descriptors `keep` open.
    """
    with ExitStack() as opened:
        output = None if log is None else opened.enter_context(open(log, "ab"))
        worker = start_worker(output=output, keep=keep)
    try:
        yield worker
    finally:
        stop(worker)
        close_pipe(worker)


def start_worker(
    arguments: Sequence[str] = (), *, debug: bool = False, output: IO[bytes] | None = None, keep: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start `trading-history worker`. It serves metrics at a port of `arguments` only, and ignores the setting."""
    return start_child("worker", *arguments, debug=debug, stdout=output, stderr=output, pass_fds=keep)


def start_child(
    *command: str, debug: bool = False, embedded_home: Path | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a command of this project. The caller must stop it, then `close_pipe`; `options` are those of Popen.

    The child has its own session, so Ctrl-C reaches only its parent, which then stops it. If the parent is killed, the
    child ends too. The embedded servers in `embedded_home` are then stopped by the last child that ends.
    """
    program = [sys.executable, "-m", "consumers.cli", "--while-stdin"]
    if debug:
        program.append("--debug")
    if embedded_home is not None:
        program.append(f"--embedded-home={embedded_home}")
    return subprocess.Popen([*program, *command], stdin=subprocess.PIPE, start_new_session=True, **options)


def close_pipe(child: subprocess.Popen[bytes]) -> None:
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
        # Not with sys.stdin: the interpreter cannot exit while a thread has its buffer locked. The parent never
        # writes, so a read returns only at the end of the pipe.
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
