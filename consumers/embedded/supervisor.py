"""Supervision: child processes and embedded servers that end unexpectedly are started again, after growing pauses."""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from consumers.embedded.child_processes import STOP_SECONDS, close_pipe, start_worker
from consumers.process_setup import on_stop_signals
from producers.times import backoff_seconds

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_SERVER_POLL_SECONDS = 0.5
_STARTED_SECONDS = 60.0  # a process that has run longer counts as started
_FIRST_PAUSE_SECONDS = 0.5
_LAST_PAUSE_SECONDS = 30.0
_CRITICAL_FAILURES = 3
_STOPPED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)  # exit statuses after a stop signal


def run_pool(processes: int, *, burst: bool, debug: bool, metrics_port: int | None = None) -> int:
    """Run `processes` workers until SIGTERM, SIGINT or SIGHUP, or with `burst` until each has found the queue empty.

    The first worker serves metrics at `metrics_port`, the others at the next ports; with 0, each uses any free port.
    A worker that is started again keeps its port.

    RQ's WorkerPool is not used, for four reasons. If it is killed, its workers continue. At SIGTERM it waits without
    limit for a worker that does not end. Its exit status is 0 if a worker failed. All its workers get the same metrics
    port.

    Returns:
        The exit status: 0, or 1 if a worker had to be killed or failed in a burst.
    """

    def worker(number: int) -> Child:
        arguments = ["--burst"] if burst else []
        if metrics_port is not None:
            arguments.append(f"--metrics-port={metrics_port + number if metrics_port else 0}")
        return Child(
            f"worker {number} of the pool", lambda: start_worker(arguments, debug=debug), is_restarted=not burst
        )

    return supervise([worker(number) for number in range(processes)])


def supervise(children: Sequence[Child], servers: Sequence[WatchedServer] = ()) -> int:
    """Run the children until SIGTERM, SIGINT or SIGHUP, or until all of them are done; keep the servers running.

    After a signal the children have 15 s to end. A second one is passed on to them: a worker then requeues its batch
    and ends at once. If this process is killed, the children end too. The caller stops the servers.

    Returns:
        The exit status: 0, or 1 if a child had to be killed, or one that is not restarted failed.
    """
    return _Supervisor(children, servers).run()


class _Supervised(ABC):
    """A process that must keep running: its name, its consecutive failures, and the time of its next start."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._failures = 0  # consecutive failures, each within 60 s of the start
        self._started_at = time.monotonic()
        self._start_at = 0.0

    @abstractmethod
    def check(self) -> None:
        """Start the process if that is due. If it has ended, log that and schedule the next start."""

    @property
    def _may_start(self) -> bool:
        return time.monotonic() >= self._start_at

    @property
    def _age_seconds(self) -> float:
        return time.monotonic() - self._started_at

    def _note_failure(self, how: str) -> None:
        """Log a failure, from the third consecutive one on as critical, and schedule the next start."""
        self._failures = self._failures + 1 if self._age_seconds < _STARTED_SECONDS else 1
        pause = backoff_seconds(self._failures, first=_FIRST_PAUSE_SECONDS, last=_LAST_PAUSE_SECONDS)
        self._start_at = time.monotonic() + pause
        logger.log(
            logging.CRITICAL if self._failures >= _CRITICAL_FAILURES else logging.ERROR,
            "%s ended unexpectedly, %s (consecutive failure %d); next start in %.1f s",
            self.name, how, self._failures, pause,
        )  # fmt: skip


class Child(_Supervised):
    """A child process. `start` starts it; without `is_restarted` it runs once."""

    def __init__(self, name: str, start: Callable[[], subprocess.Popen[bytes]], *, is_restarted: bool = True) -> None:
        super().__init__(name)
        self.done = False
        self.failed = False  # it had to be killed, or ran only once and failed
        self._start_process = start
        self._is_restarted = is_restarted
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        if (status := self._ended()) is not None:
            if self._is_restarted:
                self._note_failure(f"{_named(status)} after {self._age_seconds:.0f} s")
            else:
                self.done = True
                self._note_end(status, expected=(0,))
        elif self._process is None and not self.done and self._may_start:
            self._start()

    def still_runs(self) -> bool:
        """Return whether the process still runs after a stop signal. Log it if it ended in another way."""
        if (status := self._ended()) is not None:
            self._note_end(status, expected=_STOPPED)  # it may have got the signal before it handled signals
        return self._process is not None

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _start(self) -> None:
        self._started_at = time.monotonic()
        try:
            self._process = self._start_process()
        except OSError as error:  # out of memory or processes
            self._note_failure(f"start failed: {error.strerror}")
            return
        logger.info("%s is process %d", self.name, self._process.pid)

    def _ended(self) -> int | None:
        """Return the exit status once after the process has ended, else None."""
        status = None if self._process is None else self._process.poll()
        if self._process is not None and status is not None:
            close_pipe(self._process)
            self._process = None
        return status

    def _note_end(self, status: int, *, expected: Sequence[int]) -> None:
        if status not in expected:
            self.failed = True
            logger.error("%s failed, %s", self.name, _named(status))


class WatchedServer(_Supervised):
    """A running server that is not a child of this process.

    `find` returns None if it does not run. `start` starts it unless it runs, and waits until it answers.
    """

    def __init__(self, name: str, find: Callable[[], object | None], start: Callable[[], None]) -> None:
        super().__init__(name)
        self._find = find
        self._start_server = start
        self._starter = ThreadPoolExecutor(1, thread_name_prefix=name)  # a start may take as long as a recovery
        self._starting: Future[None] | None = None
        self._is_down = False
        self._check_at = 0.0

    def check(self) -> None:
        if self._starting is not None:
            if self._starting.done():
                self._note_start(self._starting.exception())
        elif self._is_down and self._may_start:
            self._started_at = time.monotonic()
            self._starting = self._starter.submit(self._start_server)
        elif not self._is_down and time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + _SERVER_POLL_SECONDS
            if self._find() is None:
                self._is_down = True
                self._note_failure("killed or stopped by another program")

    def _note_start(self, error: BaseException | None) -> None:
        self._starting = None
        if error is None:
            self._is_down = False
            logger.info("%s runs again", self.name)
        else:
            self._note_failure(f"start failed: {error}")


class _Supervisor:
    def __init__(self, children: Sequence[Child], servers: Sequence[WatchedServer]) -> None:
        self._children = children
        self._servers = servers
        self._signals = 0  # number of stop signals received
        self._forwarded = 0  # number of those that were passed on to the children

    def run(self) -> int:
        on_stop_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._request_stop)
        try:
            while not self._signals and not all(child.done for child in self._children):
                for one in (*self._servers, *self._children):
                    one.check()
                time.sleep(_POLL_SECONDS)
            self._stop()
        finally:
            for child in self._children:  # needed only if the loop raised; otherwise no child runs any more
                child.signal(signal.SIGKILL)
        return 1 if any(child.failed for child in self._children) else 0

    def _request_stop(self, *_: object) -> None:
        """Count a stop signal. The loop acts on it, so that no exception interrupts a start before it is recorded."""
        self._signals += 1

    def _stop(self) -> None:
        """Send SIGTERM to all children, and kill those that do not end within 15 s."""
        deadline = time.monotonic() + STOP_SECONDS
        while running := [child for child in self._children if child.still_runs()]:
            while self._forwarded < self._signals:
                self._forwarded += 1
                for child in running:
                    child.signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                names = ", ".join(child.name for child in running)
                logger.error("did not end within %.0f s and is killed: %s", STOP_SECONDS, names)
                for child in running:
                    child.signal(signal.SIGKILL)
                deadline = float("inf")
            time.sleep(_POLL_SECONDS / 2)


def _named(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"with exit status {status}"
