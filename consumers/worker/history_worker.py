"""HistoryWorker: an RQ worker that stores events in batches, loses none of them, and waits while a server is away.

    rq worker --worker-class consumers.worker.HistoryWorker history

It runs in one process and does not fork. Two threads process the events (see worker_thread.py). Each thread has a Redis
list of its reserved jobs, under a lease (see reservations.py): if the process crashes, another worker requeues them
within 30 s. Only the job functions of consumers.handlers run; any other job is unsupported and is rejected unread.
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
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

import click
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
from consumers.errors import first_line
from consumers.ops.redis_errors import is_unreachable, is_wrong_type
from consumers.process_setup import TESTED_RQ, on_stop_signals, write_json_if_set
from consumers.settings import MetricsSettings, StoreSettings
from consumers.worker.maintenance import Maintenance
from consumers.worker.shared_state import SharedState
from consumers.worker.worker_thread import WAIT_SECONDS, Limits, WorkerThread, reconnect_seconds
from producers.errors import HistoryError, SettingsError
from producers.redis_url import is_forbidden
from producers.settings import KeyPrefixSettings

logger = logging.getLogger(__name__)

THREADS = 2  # two threads store 1.2 to 1.4 times the events of one; a third adds nothing
STATEMENT_SECONDS = 20.0
_ANSWER_SECONDS = STATEMENT_SECONDS + 5  # in case the server does not enforce its statement timeout
_STUCK_SECONDS = 3 * STATEMENT_SECONDS
# Large, since a thread may have to wait for the interpreter lock after each read.
_READ_BYTES = 512 * 1024
_RENEW_SECONDS = 2.0
_STALL_SECONDS = 1.0  # after a longer wait for an answer the database counts as stalled
_POOL_MARK = " (WorkerPool "  # in the names of the processes of RQ's pool
_POOL_PAUSE_SECONDS = 15
_REGISTERED_SECONDS = 60  # RQ adds 60 s: a dead worker leaves RQ's list after 2 minutes instead of 8


class HistoryWorker(SimpleWorker):
    """A worker of exactly one queue. Its serializer is always JSON.

    `metrics` is the address at which it serves metrics while it works; None: from the settings.

    Raises:
        SettingsError: there is more than one queue, or this version of RQ is outside the tested range.
    """

    _address_is_forbidden = False  # noted once; RQ asks while the object is created

    def __init__(self, queues: Any, *args: Any, metrics: MetricsSettings | None = None, **kwargs: Any) -> None:
        if _is_in_rqs_pool() and kwargs.get("prepare_for_work", True):
            _reset_stop_signals()
        with _short_errors_in_rq_commands():
            if not VERSION.startswith(TESTED_RQ):
                raise SettingsError(
                    f"HistoryWorker was tested with RQ {', '.join(TESTED_RQ)}, but RQ {VERSION} is installed:"
                    " install a tested version, or use RQ's own worker (rq worker --serializer json history)"
                )
        kwargs["serializer"] = JSONSerializer
        super().__init__(_json_queues(queues), *args, **kwargs)
        if not self.queues and not kwargs.get("prepare_for_work", True):
            return  # RQ's commands create such objects only to read the state of other workers
        with _short_errors_in_rq_commands():
            if len(self.queues) != 1:
                raise SettingsError("HistoryWorker takes exactly one queue: start one worker for each queue")
        self._queue = self.queues[0]
        self.worker_ttl = min(self.worker_ttl, _REGISTERED_SECONDS)
        self._stopping = threading.Event()
        self._stop_renewing = threading.Event()
        self._waits = DatabaseWaits(_ANSWER_SECONDS, self._stopping)
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
        """Store events until the worker is asked to stop or, with `burst`, until the queue is empty.

        After SIGINT or SIGTERM, it completes the batches in progress and ends. While Redis or PostgreSQL is away, it
        waits. `with_scheduler` and `dequeue_strategy` have no effect; `with_scheduler`, which RQ's pool always sets,
        makes it log a warning.

        Returns:
            Whether a job was completed.

        Raises:
            SettingsError: a setting cannot be read, or no database is set. In RQ's own commands it becomes SystemExit.
        """
        with _short_errors_in_rq_commands(burst=burst):
            write_json_if_set()
            KeyPrefixSettings.from_environment()
            StoreSettings.from_environment().url()  # otherwise the first event would end the worker
        limit_statements(STATEMENT_SECONDS)
        gc.freeze()  # the garbage collector need not scan modules and classes again
        self._install_signal_handlers()
        limits = Limits(burst, max_jobs, sys.maxsize if max_idle_time is None else max_idle_time)
        # With max_jobs there is one thread: several would have to share the limit.
        self._threads = [
            WorkerThread(self, self._queue, self._shared, self._stopping, limits)
            for _ in range(THREADS if max_jobs is None else 1)
        ]
        with ExitStack() as stack:
            self._serve_metrics(stack)
            if not self._register(logging_level, date_format, log_format):
                return False
            self._warn_about_ignored_options(with_scheduler)
            self._work_in_threads()
        return any(thread.done for thread in self._threads)

    def _warn_about_ignored_options(self, with_scheduler: bool) -> None:
        """Log a warning for each option that has no effect here, but that another program may depend on."""
        # RQ's scheduler is a forked process. It ends when Redis is away. If its worker is killed, it survives, keeps
        # the worker's sockets (the metrics port included), and no pool ends it. Events need no scheduler: none is
        # scheduled, and the worker retries by itself. A scheduler under a supervisor has none of these problems.
        if with_scheduler:
            self.log.warning(
                "worker %s does not run a scheduler (--with-scheduler is ignored); storing events needs none. If other"
                " programs schedule jobs on queue %s, run rq.scheduler.RQScheduler as a separate process: see"
                " consumers/worker/RQ.md",
                self.name, self._queue.name,
            )  # fmt: skip
        if self._exc_handlers:
            self.log.warning(
                "worker %s does not call exception handlers (--exception-handler is ignored). Rejected events are in"
                " RQ's failed registry and in event_outcomes: see `trading-history failed list`",
                self.name,
            )

    def _work_in_threads(self) -> None:
        renewing = threading.Thread(target=self._renew_leases, name="history-lease", daemon=True)
        renewing.start()
        try:
            with self._waits.limited():
                self._run_threads()
        finally:
            self._stopping.set()
            self._stop_renewing.set()
            if not self._shared.redis_is_unreachable:
                renewing.join(self.connection_timeout)  # it must not renew the lease of closed reservations
            self._deregister()

    def _serve_metrics(self, stack: ExitStack) -> None:
        """Serve metrics until `stack` is closed, if the settings name a port."""
        metrics = self._metrics or MetricsSettings.from_environment()
        if metrics.port is None:
            return
        # Imported here, since only a worker with a metrics port needs it.
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
            # All workers of RQ's pool are given the same port, and the pool at once restarts a worker that ends.
            self.log.warning(
                "worker %s: %s. Use `trading-history worker --processes` instead of rq worker-pool: it gives each"
                " process its own port",
                self.name, error,
            )  # fmt: skip

    def _run_threads(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(None if self._stopping.is_set() else max(0.0, self._maintenance.due_at - time.monotonic()))
                self._maintain()
        for thread in self._threads:
            if thread.error is not None:
                raise thread.error

    def _register(self, *logging_options: Any) -> bool:
        """Register this worker in RQ; while Redis is away, try again. Returns False if asked to stop before that."""
        failures = 0
        while not self._stopping.is_set():
            try:
                self._set_ip_address(self.connection)
                if self.birth_date is not None:  # an earlier attempt failed half-way
                    self._maintenance.mark_name_reusable()
                self.bootstrap(*logging_options)
                self._shared.publish(always=True)
                self._shared.note_progress(worked=False)
                self._maintenance.run()
                return True
            except RedisError as error:
                failures += 1
                self._shared.note_outage(error)
                if is_wrong_type(error):
                    self._quarantine_keys()
                self._stopping.wait(reconnect_seconds(failures))
        return False

    def _quarantine_keys(self) -> None:
        with suppress(RedisError):  # tried again after the next failure
            self._threads[0].reservations.quarantine_keys()

    def _set_connection(self, connection: Redis) -> Redis:
        """Turn off redis-py's retries: each would take as long as the first attempt."""
        connection = super()._set_connection(connection)
        connection.set_retry(Retry(NoBackoff(), 0))
        connection.connection_pool.connection_kwargs["socket_read_size"] = _READ_BYTES
        return connection

    def _set_ip_address(self, connection: Redis) -> None:
        """Ask Redis for this worker's address, as RQ does when the object is created; tolerate that Redis is away."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # RQ warns if CLIENT is forbidden
                super()._set_ip_address(connection)
        except RedisError:
            self.ip_address = "unknown"
        except Warning:
            self.ip_address = "unknown"
            if not self._address_is_forbidden:
                message = "worker %s: RQ's list will not show its address, because Redis forbids CLIENT"
                logger.warning(message, self.name)
            self._address_is_forbidden = True

    @property
    def connection_timeout(self) -> int:
        """Seconds without an answer after which Redis counts as away; RQ's own value is several minutes."""
        return WAIT_SECONDS + 9

    def _pubsub_exception_handler(self, exc: Exception, *thread: Any) -> None:
        """Keep the thread that listens for commands alive after a timeout, and end it if Redis forbids to listen.

        RQ's own handler ends it after a timeout, and with a traceback.
        """
        if is_forbidden(exc):
            logger.warning("worker %s does not receive RQ's commands: %s", self.name, first_line(exc))
            thread[-1].stop()
            return
        lost = RedisConnectionError("no answer in time") if isinstance(exc, RedisTimeoutError) else exc
        super()._pubsub_exception_handler(lost, *thread)

    def unsubscribe(self) -> None:
        """End the thread that listens for commands. RQ's own worker may first wait for it for a second, in vain."""
        listening: Any = self.pubsub_thread  # set: RQ subscribes before it calls this
        listening.stop()  # first: after the answer to UNSUBSCRIBE the thread would wait again
        super().unsubscribe()

    def handle_payload(self, message: Any) -> None:
        """Handle a command, and ignore any other message, which would end the listening thread of RQ's own worker.

        The shutdown command sends SIGTERM to this process. RQ sends SIGINT, which a script's background process
        ignores.
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
            logger.warning("worker %s ignores a message that is not a command: %s", self.name, type(error).__name__)

    def _install_signal_handlers(self) -> None:
        on_stop_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self.request_stop)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Set the flags that the loops check. RQ's own handler raises, which could interrupt any step."""
        self._shutdown_requested_date = now()
        on_stop_signals((signal.SIGINT, signal.SIGTERM), self.request_force_stop)
        self._stop_requested = True
        self._stopping.set()

    def _renew_leases(self) -> None:
        """Renew each lease, also during a long statement, unless its thread has made no progress for _STUCK_SECONDS."""
        while not self._stop_renewing.wait(_RENEW_SECONDS):
            for thread in self._threads:
                try:
                    if thread.seconds_without_progress() < _STUCK_SECONDS:
                        thread.reservations.renew_lease(
                            database_stalled=self._waits.seconds(thread.ident) > _STALL_SECONDS
                        )
                except Exception as error:
                    # The thread gets the same error and waits. If its lease expires, another worker requeues its jobs.
                    logger.debug("worker %s could not renew a lease: %s", self.name, type(error).__name__)

    def _maintain(self) -> None:
        if time.monotonic() < self._maintenance.due_at or self._stopping.is_set():
            return
        try:
            self._maintenance.run()
        except RedisError as error:
            self._shared.note_outage(error)

    def _deregister(self) -> None:
        # Nothing is lost: the leases expire, and another worker requeues the reserved jobs.
        if self._shared.redis_is_unreachable:
            logger.warning(
                "worker %s ends while Redis is away; its jobs are requeued when its leases expire", self.name
            )
            return
        try:
            for thread in self._threads:
                thread.reservations.close()
            self.teardown()
        except RedisError as error:
            message = "worker %s could not remove its registration, which expires within 2 minutes: %s"
            logger.warning(message, self.name, type(error).__name__)


@contextmanager
def _short_errors_in_rq_commands(*, burst: bool = False) -> Iterator[None]:
    """In RQ's own commands, which show the traceback of any error, end with the message in one line and status 1.

    RQ's pool starts a worker that has ended again after a second, for ever. So a worker of a pool waits before it ends,
    except in a burst, in which the pool does not start it again.
    """
    try:
        yield
    except SettingsError as error:
        if _is_in_rqs_pool() and not burst:
            advice = "stop the pool, correct this and start it again"
            sys.stderr.write(f"error: {error}: {advice} (next attempt in {_POOL_PAUSE_SECONDS} s)\n")
            with suppress(KeyboardInterrupt):  # the pool stops
                time.sleep(_POOL_PAUSE_SECONDS)
            raise SystemExit(1) from None
        if not _is_in_rqs_pool() and click.get_current_context(silent=True) is None:
            raise
        raise SystemExit(f"error: {error}") from None


def _is_in_rqs_pool() -> bool:
    return _POOL_MARK in multiprocessing.current_process().name


def _reset_stop_signals() -> None:
    """Let SIGINT and SIGTERM end a process of RQ's pool, as they end any other worker.

    The pool ends its workers with SIGINT, even where SIGINT is ignored, as in the background of a script. A worker that
    the pool restarts inherits the pool's own handlers, which would signal all workers and not end this one.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _json_queues(queues: Any) -> Any:
    """Make the given queues read JSON; RQ's command line creates them before the worker."""
    for queue in queues if isinstance(queues, list | tuple) else [queues]:
        if isinstance(queue, Queue):
            queue.serializer = JSONSerializer
    return queues


def run_worker(redis: Redis, queue: str, *, burst: bool = False, metrics: MetricsSettings | None = None) -> None:
    """Run a HistoryWorker on `queue` until it is asked to stop or, with `burst`, until the queue is empty.

    Raises:
        HistoryError: it cannot serve metrics at the address in `metrics` (None: in the settings).
    """
    queues = [Queue(queue, connection=redis, serializer=JSONSerializer)]
    worker = HistoryWorker(queues, connection=redis, metrics=metrics)
    logger.info("worker %s on queue %s, process %d", worker.name, queue, os.getpid())
    worker.work(burst=burst)
