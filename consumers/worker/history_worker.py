"""HistoryWorker: an RQ worker that loses nothing when it dies and waits when the database or Redis is away.

    rq worker --worker-class consumers.worker.HistoryWorker history

It runs in one process, without forking, in threads (see consumers.worker.worker_thread). A thread keeps its jobs
in a list of its own under a lease (see consumers.worker.reservations), so that any other worker can return it to the
queue within half a minute of its death. Only the job functions of consumers.handlers run; any other job is refused.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from rq import Queue
from rq.command import parse_payload
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.version import VERSION
from rq.worker import DequeueStrategy, SimpleWorker

from consumers.db.engine import limit_statements
from consumers.db.waits import DatabaseWaits
from consumers.process_setup import TESTED_RQ, on_stop_signals, write_json_if_set
from consumers.settings import MetricsSettings
from consumers.worker.maintenance import Maintenance
from consumers.worker.shared_state import SharedState, is_unreachable
from consumers.worker.worker_thread import WAIT_SECONDS, Limits, WorkerThread, recovery_seconds
from producers.errors import HistoryError, SettingsError

logger = logging.getLogger(__name__)

THREADS = 2  # with two, 1.2 to 1.4 times the events of one; with three, no more
STATEMENT_SECONDS = 20.0
_ANSWER_SECONDS = STATEMENT_SECONDS + 5  # for a server that does not even keep its own limit
_STUCK_SECONDS = 3 * STATEMENT_SECONDS
# A batch is read in few pieces: for each, a thread may wait for the interpreter.
_READ_BYTES = 512 * 1024
_RENEW_SECONDS = 2.0
_STALL_SECONDS = 1.0  # waiting longer than this for an answer is the database's doing, not the job's
_POOL_MARK = " (WorkerPool "  # in the names that RQ's pool gives to its processes
_REGISTERED_SECONDS = 60  # RQ adds as much: a dead worker is in RQ's list for two minutes at most, not for eight


class HistoryWorker(SimpleWorker):
    """Works on exactly one queue, with JSON as serializer whatever it is told.

    `metrics` says where it answers scrapes while it works; None takes that from the settings.

    Raises:
        SettingsError: there is more than one queue, or RQ is of a version that this was not tested with.
    """

    def __init__(self, queues: Any, *args: Any, metrics: MetricsSettings | None = None, **kwargs: Any) -> None:
        if not VERSION.startswith(TESTED_RQ):
            raise SettingsError(
                f"HistoryWorker was tested with RQ {', '.join(TESTED_RQ)}, this is {VERSION}:"
                " use RQ's own worker (rq worker --serializer json history)"
            )
        kwargs["serializer"] = JSONSerializer
        if _is_in_rqs_pool() and kwargs.get("prepare_for_work", True):
            _forget_pool_signals()
        super().__init__(_json_queues(queues), *args, **kwargs)
        if not self.queues and not kwargs.get("prepare_for_work", True):
            return  # RQ's commands make such objects to read of other workers
        if len(self.queues) != 1:
            raise SettingsError("HistoryWorker works on exactly one queue; start another worker for another queue")
        self._queue = self.queues[0]
        self.worker_ttl = min(self.worker_ttl, _REGISTERED_SECONDS)
        self._ending = threading.Event()
        self._retired = threading.Event()
        self._waits = DatabaseWaits(_ANSWER_SECONDS, self._ending)
        self._shared = SharedState(self)
        self._maintenance = Maintenance(self, self._queue, self._shared)
        self._metrics = metrics
        self._threads: list[WorkerThread] = []

    def work(
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
        log_format: str = DEFAULT_LOGGING_FORMAT,
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: DequeueStrategy = DequeueStrategy.DEFAULT,
    ) -> bool:
        """Store events until told to stop, or with `burst` until the queue is empty. True if any job was done.

        SIGINT and SIGTERM end it after what it holds. An outage of Redis or PostgreSQL, of any length, does not.
        `with_scheduler` and `dequeue_strategy` have no effect; the former is logged, as RQ's pool always asks for it.

        Raises:
            SettingsError: a setting cannot be read.
        """
        write_json_if_set()
        limit_statements(STATEMENT_SECONDS)
        gc.freeze()  # what the program consists of stays: no need to look through it again and again
        self._install_signal_handlers()
        limits = Limits(burst, max_jobs, sys.maxsize if max_idle_time is None else max_idle_time)
        # Several threads would have to agree on who takes the last jobs that are allowed.
        self._threads = [
            WorkerThread(self, self._queue, self._shared, self._ending, limits)
            for _ in range(THREADS if max_jobs is None else 1)
        ]
        with ExitStack() as stack:
            self._serve_metrics(stack)
            if not self._arrive(logging_level, date_format, log_format):
                return False
            self._log_ignored(with_scheduler)
            self._work_in_threads()
        return any(thread.done for thread in self._threads)

    def _log_ignored(self, with_scheduler: bool) -> None:
        """Log once each request that has no effect here and that somebody may rely on."""
        # RQ's scheduler is a forked process. It ends when Redis is away; when its worker is killed it stays, with the
        # worker's sockets, the port for scrapes among them, and no pool ends it. Nothing here needs one: no event is
        # scheduled, retries are the worker's own. Beside the workers, under a supervisor, it does none of this harm.
        if with_scheduler:
            self.log.warning(
                "Worker %s: runs no scheduler, and stores events without one. If other programs schedule jobs on queue"
                " %s, run rq.scheduler.RQScheduler beside it: see RQ's options and commands in README.md",
                self.name, self._queue.name,
            )  # fmt: skip
        if self._exc_handlers:
            self.log.warning(
                "Worker %s: calls no exception handler. Rejected events are in RQ's failed registry and in"
                " event_outcomes: see trading-history failed list",
                self.name,
            )

    def _work_in_threads(self) -> None:
        renewing = threading.Thread(target=self._renew_leases, name="history-lease", daemon=True)
        renewing.start()
        try:
            with self._waits.limited():
                self._run_threads()
        finally:
            self._ending.set()
            self._retired.set()
            if not self._shared.redis_is_unreachable:
                renewing.join(self.connection_timeout)  # what is let go must not be leased once more
            self._retire()

    def _serve_metrics(self, stack: ExitStack) -> None:
        """Until `stack` is closed, if the settings name a port."""
        metrics = self._metrics or MetricsSettings.from_environment()
        if metrics.port is None:
            return
        # Only here: what reads the outbox and speaks HTTP is of no use to a worker that nobody scrapes.
        from consumers.ops.metrics_server import served_metrics

        served = served_metrics(
            metrics.host,
            metrics.port,
            waits_for=lambda: self._shared.waits_for,
            redis=self.connection,
            queue=self._queue.name,
        )
        try:
            stack.enter_context(served)
        except HistoryError as error:
            if not _is_in_rqs_pool():
                raise
            # All workers of RQ's pool have the same settings, and it starts again at once whatever ends.
            self.log.warning(
                "Worker %s: answers no scrapes: %s. For a port for each process, start"
                " `trading-history worker --processes` in place of rq worker-pool",
                self.name, error,
            )  # fmt: skip

    def _run_threads(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(None if self._ending.is_set() else max(0.0, self._maintenance.due_at - time.monotonic()))
                self._maintain()
        for thread in self._threads:
            if thread.error is not None:
                raise thread.error

    def _arrive(self, *logging_options: Any) -> bool:
        """Sign on; while Redis is away, try again. False when told to stop before it came."""
        failures = 0
        while not self._ending.is_set():
            try:
                self._set_ip_address(self.connection)
                if self.birth_date is not None:  # an earlier try got half way
                    self._maintenance.allow_registration()
                self.bootstrap(*logging_options)
                self._shared.publish(always=True)
                self._shared.succeeded(worked=False)
                self._maintenance.run()
                return True
            except RedisError as error:
                failures += 1
                self._shared.failed(error)
                self._ending.wait(recovery_seconds(failures))
        return False

    def _set_connection(self, connection: Redis) -> Redis:
        """Without the library's own retries, each of which would take as long as the first try."""
        connection = super()._set_connection(connection)
        connection.set_retry(Retry(NoBackoff(), 0))
        connection.connection_pool.connection_kwargs["socket_read_size"] = _READ_BYTES
        return connection

    def _set_ip_address(self, connection: Redis) -> None:
        """RQ asks Redis for it when the worker is made; while Redis is away that must wait like everything else."""
        try:
            super()._set_ip_address(connection)
        except RedisError:
            self.ip_address = "unknown"

    @property
    def connection_timeout(self) -> int:
        """Seconds without an answer after which Redis counts as away; RQ waits for several minutes."""
        return WAIT_SECONDS + 9

    def _pubsub_exception_handler(self, exc: Exception, *thread: Any) -> None:
        """RQ's lets an answer that takes too long end the thread that listens to its commands."""
        lost = RedisConnectionError("no answer in time") if isinstance(exc, RedisTimeoutError) else exc
        super()._pubsub_exception_handler(lost, *thread)

    def handle_payload(self, message: Any) -> None:
        """RQ's lets whatever is no command end the thread that listens to commands.

        And it carries out a shutdown by SIGINT, which is ignored in a script's background.
        """
        try:
            if parse_payload(message)["command"] == "shutdown":
                self.log.info("Worker %s: received shutdown command", self.name)
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                super().handle_payload(message)
        except Exception as error:
            if is_unreachable(error):
                raise
            logger.warning("worker %s ignores what is no command for it: %s", self.name, type(error).__name__)

    def _install_signal_handlers(self) -> None:
        on_stop_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self.request_stop)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Only a note: the loop looks at it, so that no exception lands in the middle of something."""
        self._shutdown_requested_date = now()
        on_stop_signals((signal.SIGINT, signal.SIGTERM), self.request_force_stop)
        self._stop_requested = True
        self._ending.set()

    def _renew_leases(self) -> None:
        """Also while a worker thread waits for a long statement, but not for one that makes no progress any more."""
        while not self._retired.wait(_RENEW_SECONDS):
            for thread in self._threads:
                try:
                    if thread.seconds_without_progress() < _STUCK_SECONDS:
                        thread.reservations.renew_lease(
                            database_stalled=self._waits.seconds(thread.ident) > _STALL_SECONDS
                        )
                except Exception as error:
                    # The thread meets the same trouble and waits for its end; without a lease others take over.
                    logger.debug("worker %s could not renew a lease: %s", self.name, type(error).__name__)

    def _maintain(self) -> None:
        if time.monotonic() < self._maintenance.due_at or self._ending.is_set():
            return
        try:
            self._maintenance.run()
        except RedisError as error:
            self._shared.failed(error)

    def _retire(self) -> None:
        # Without Redis nothing is lost: the leases run out, and another worker returns what was held.
        if self._shared.redis_is_unreachable:
            logger.warning("worker %s ends without Redis", self.name)
            return
        try:
            for thread in self._threads:
                thread.reservations.close()
            self.teardown()
        except RedisError as error:
            logger.warning("worker %s could not sign off: %s", self.name, type(error).__name__)


def _is_in_rqs_pool() -> bool:
    return _POOL_MARK in multiprocessing.current_process().name


def _forget_pool_signals() -> None:
    """In a process of RQ's pool: end by the signals that end other workers.

    The pool ends its workers by SIGINT, also where a script's background has it ignored. And a worker that it starts
    again begins with the pool's own handlers, which would signal all its siblings and let this process go on.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _json_queues(queues: Any) -> Any:
    """The queues as given, but reading JSON; the command line makes them before it makes the worker."""
    for queue in queues if isinstance(queues, list | tuple) else [queues]:
        if isinstance(queue, Queue):
            queue.serializer = JSONSerializer
    return queues


def run_worker(redis: Redis, queue: str, *, burst: bool = False, metrics: MetricsSettings | None = None) -> None:
    """Run a HistoryWorker on `queue`; returns when it was told to stop, or with `burst` when the queue is empty.

    Raises:
        HistoryError: it cannot answer scrapes where `metrics` (None: the settings) wants it to.
    """
    queues = [Queue(queue, connection=redis, serializer=JSONSerializer)]
    worker = HistoryWorker(queues, connection=redis, metrics=metrics)
    logger.info("worker %s on queue %s, process %d", worker.name, queue, os.getpid())
    worker.work(burst=burst)
