"""Pool of workers on one host: processes that are restarted when they die and stopped together.

RQ's WorkerPool is not used, for four reasons. If it is killed, its workers continue. At SIGTERM it waits without limit
for a worker that does not end. Its exit status is 0 if a worker failed. All its workers get the same metrics port.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Sequence

from consumers.embedded.child_processes import STOP_SECONDS, release, start_worker
from consumers.process_setup import on_stop_signals
from producers.times import backoff_seconds

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_STARTED_SECONDS = 60.0  # a worker that has run longer counts as started
_FIRST_PAUSE_SECONDS = 0.5
_LAST_PAUSE_SECONDS = 30.0
_CRITICAL_FAILURES = 3
_TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)


def run_pool(processes: int, *, burst: bool, debug: bool, metrics_port: int | None = None) -> int:
    """Run `processes` workers until SIGTERM, SIGINT or SIGHUP, or with `burst` until each has found the queue empty.

    After a signal the workers have 15 s to finish their batches. After a second one they requeue their batches and end
    at once. If the pool is killed, they end too. The first worker serves metrics at `metrics_port`, the others at the
    next ports; with 0, each uses any free port.

    Returns:
        The exit status: 0, or 1 if a worker had to be killed or failed in a burst.
    """
    arguments = [_arguments(number, burst=burst, metrics_port=metrics_port) for number in range(processes)]
    return _Pool([_Member(number, one, debug=debug) for number, one in enumerate(arguments)], burst=burst).run()


class _Member:
    """One place in the pool, and its present process."""

    def __init__(self, number: int, arguments: Sequence[str], *, debug: bool) -> None:
        self.number = number
        self.failures = 0  # consecutive failures, each within 60 s of the start
        self.start_at = 0.0
        self.done = False
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._arguments = arguments
        self._debug = debug

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        self._started_at = time.monotonic()
        try:
            self._process = start_worker(self._arguments, debug=self._debug)
        except OSError as error:  # out of memory or processes
            self.note_failure(f"start failed: {error.strerror}")
            return
        logger.info("worker %d of the pool is process %d", self.number, self._process.pid)

    def ended(self) -> int | None:
        """Return the exit status once after the process has ended, else None."""
        status = None if self._process is None else self._process.poll()
        if self._process is not None and status is not None:
            release(self._process)
            self._process = None
        return status

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def note_failure(self, how: str) -> None:
        """Log a failure, from the third consecutive one on as critical, and schedule the next start."""
        lived = time.monotonic() - self._started_at
        self.failures = self.failures + 1 if lived < _STARTED_SECONDS else 1
        pause = backoff_seconds(self.failures, first=_FIRST_PAUSE_SECONDS, last=_LAST_PAUSE_SECONDS)
        self.start_at = time.monotonic() + pause
        logger.log(
            logging.CRITICAL if self.failures >= _CRITICAL_FAILURES else logging.ERROR,
            "worker %d of the pool ended unexpectedly after %.0f s, %s (consecutive failure %d); next start in %.1f s",
            self.number, lived, how, self.failures, pause,
        )  # fmt: skip


class _Pool:
    def __init__(self, members: Sequence[_Member], *, burst: bool) -> None:
        self._members = members
        self._burst = burst
        self._failed = False
        self._signals = 0  # number of stop signals received
        self._passed = 0  # number of those that were passed on to the workers

    def run(self) -> int:
        on_stop_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._request_stop)
        try:
            while not self._signals and not all(member.done for member in self._members):
                for member in self._members:
                    self._supervise(member)
                time.sleep(_POLL_SECONDS)
            self._stop()
        finally:
            for member in self._members:  # needed only if the loop raised; otherwise no worker runs any more
                member.signal(signal.SIGKILL)
        return 1 if self._failed else 0

    def _request_stop(self, *_: object) -> None:
        """Count a stop signal. The loop acts on it, so that no exception interrupts a start before it is recorded."""
        self._signals += 1

    def _supervise(self, member: _Member) -> None:
        if (status := member.ended()) is not None:
            if not self._burst:
                member.note_failure(_named(status))
            else:
                member.done = True
                self._note_end(member, status)
        elif not member.running and not member.done and time.monotonic() >= member.start_at:
            member.start()

    def _note_end(self, member: _Member, status: int) -> None:
        """Record an expected exit. The worker may have got the stop signal before it handled signals."""
        if status and not (self._signals and status in _TERMINATED):
            self._failed = True
            logger.error(
                "worker %d of the pool failed, %s; another worker requeues its jobs", member.number, _named(status)
            )

    def _stop(self) -> None:
        """Send SIGTERM to all workers, and kill those that do not end within 15 s."""
        deadline = time.monotonic() + STOP_SECONDS
        while any(member.running for member in self._members):
            while self._passed < self._signals:
                self._passed += 1
                for member in self._members:
                    member.signal(signal.SIGTERM)
            for member in self._members:
                if (status := member.ended()) is not None:
                    self._note_end(member, status)
            if time.monotonic() > deadline:
                logger.error("workers did not end within %.0f s and are killed", STOP_SECONDS)
                for member in self._members:
                    member.signal(signal.SIGKILL)
                deadline = float("inf")
            time.sleep(_POLL_SECONDS / 2)


def _arguments(number: int, *, burst: bool, metrics_port: int | None) -> list[str]:
    """Return the arguments of worker `number`, from 0. A restarted worker keeps its metrics port."""
    arguments = ["--burst"] if burst else []
    if metrics_port is not None:
        arguments.append(f"--metrics-port={metrics_port + number if metrics_port else 0}")
    return arguments


def _named(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"with exit status {status}"
