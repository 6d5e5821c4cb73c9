"""How a lane's jobs end: producers are told, RQ's records written and what was held let go, in one transaction."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial

from rq import Queue
from rq.utils import now
from rq.worker import BaseWorker

from consumers.errors import RefusedJob, described
from consumers.ops.metrics import COUNTS
from consumers.worker.batch import Settled, Unsettled, acknowledge, log_fields, without_defects
from consumers.worker.jobs import ReservedJob, Run
from consumers.worker.quarantine import Kind, is_caused_by_job, is_redis_trouble, is_wrong_type, put_aside
from consumers.worker.reservations import Reservations
from consumers.worker.rq_completion import RqJobs
from consumers.worker.rq_failures import RqFailures
from producers.redis_keys import acknowledgement_key

logger = logging.getLogger(__name__)


class Finishing:
    """Of what one lane of `worker` holds by `reservations`; `jobs` are of the same queue.

    Raises:
        RedisError: from every method, when Redis cannot write now. What was not finished is held still.
    """

    def __init__(self, worker: BaseWorker, queue: Queue, reservations: Reservations, jobs: RqJobs) -> None:
        self._worker = worker
        self._redis = worker.connection
        self._queue = queue
        self._reservations = reservations
        self._jobs = jobs
        self._failures = RqFailures(worker.connection, queue)

    def finish(self, settled: Sequence[Settled], jobs: Mapping[str, ReservedJob], started_at: datetime) -> None:
        """Tell the producers and RQ of what is settled; what cannot be written of one job costs only that job."""
        if not settled:
            return
        try:
            self._finish_together(settled, jobs, started_at)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if is_wrong_type(error):
                if not (moved := self.put_aside(settled)):
                    raise
                # The rest of that transaction was carried out, unless it is what was in the way.
                self._finish_together(settled, jobs, started_at, count=self._worker.key in moved)
            elif is_redis_trouble(error):
                raise
            elif len(settled) > 1:
                half = len(settled) // 2
                self.finish(settled[:half], jobs, started_at)
                self.finish(settled[half:], jobs, started_at)
            else:
                self._end_by_id(settled[0], error)

    def give_up(self, end: Unsettled, job: ReservedJob, started_at: datetime) -> None:
        """Not even a rejection can be recorded: the job leaves the queue for RQ's failed registry.

        The producer is not told, since the database has no record of it: its relay will send the event again.
        """
        try:
            with self._redis.pipeline(transaction=True) as pipe:
                self._reservations.release(pipe, [end.job_id])
                self._failures.fail(pipe, [(job, end.error)], self._run(started_at))
                self._worker.increment_failed_job_count(pipe)
                pipe.execute()
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            self._end_by_id(end, error)
        COUNTS.gave_up(end.event_type)

    def drop(self, job_ids: Sequence[str]) -> None:
        """Hold them no more. What somebody has deleted while it was queued RQ's own worker skips too."""
        if job_ids:
            with self._redis.pipeline(transaction=True) as pipe:
                self._reservations.release(pipe, job_ids)
                pipe.execute()

    def put_aside(self, settled: Sequence[Settled] = ()) -> list[str]:
        """Move away what somebody has put in the place of a key that is written to; those keys."""
        kinds: dict[str, Kind] = {
            self._queue.finished_job_registry.key: "zset",
            self._queue.failed_job_registry.key: "zset",
            self._worker.key: "hash",
        }
        kinds |= {acknowledgement_key(end.source): "hash" for end in settled if end.source is not None}
        return self._reservations.put_aside() + put_aside(self._redis, kinds)

    def _finish_together(
        self, settled: Sequence[Settled], jobs: Mapping[str, ReservedJob], started_at: datetime, *, count: bool = True
    ) -> None:
        """`count` them in the worker's statistics."""
        run = self._run(started_at)
        done = [(jobs[end.job_id], end.outcome.row_id) for end in settled if end.error is None]
        failed = [(jobs[end.job_id], end.error) for end in settled if end.error is not None]
        # A death before others were let go must not leave them waiting: until then their job is held.
        held = [end.job_id for end in settled if end.error is not None and jobs[end.job_id].state == "unusual"]
        with self._redis.pipeline(transaction=True) as pipe:
            acknowledge(pipe, settled)
            self._reservations.release(pipe, [end.job_id for end in settled if end.job_id not in held])
            self._failures.fail(pipe, failed, run)
            if done:
                finishing = len(pipe)
                self._jobs.finish(pipe, done, run, self._reservations.held_key)
            if count:
                pipe.hincrby(self._worker.key, "successful_job_count", len(done))
                pipe.hincrby(self._worker.key, "failed_job_count", len(failed))
                self._worker.increment_total_working_time(run.ended_at - started_at, pipe)
            self._worker.heartbeat(pipeline=pipe)
            answers = pipe.execute()
        if done:
            held += [job_id.decode() for job_id in answers[finishing]]
        if held:
            refused = {end.job_id for end in settled if isinstance(end.error, RefusedJob)}
            self._let_go([(jobs[job_id], job_id in refused) for job_id in held], run)

    def _let_go(self, held: Sequence[tuple[ReservedJob, bool]], run: Run) -> None:
        """What waits for these goes on, unless they were refused; they are held until then."""
        for job, refused in held:
            self._jobs.let_go(job, run, refused=refused)
        try:
            self._jobs.enqueue_ready()  # lanes that let go at once keep each other from it
        except Exception as error:
            if is_redis_trouble(error):
                raise
            # Upkeep meets it too, and tells of it once.
            logger.debug("what is on its way to the queue stays there: %s", type(error).__name__)
        self.drop([job.job_id for job, _ in held])

    def _end_by_id(self, end: Settled | Unsettled, error: BaseException) -> None:
        """Its end is decided, but what RQ keeps of it cannot be written."""
        told = partial(logger.error, "what RQ keeps of job %s cannot be written", end.job_id)
        without_defects(partial(told, exc_info=error, extra=log_fields(end)))
        if isinstance(end, Settled):
            self._acknowledge_alone(end)
        with self._redis.pipeline(transaction=True) as pipe:
            self._reservations.release(pipe, [end.job_id])
            self._failures.fail_by_id(pipe, end.job_id)
            pipe.execute()

    def _acknowledge_alone(self, end: Settled) -> None:
        """Unless that is what cannot be done: then its producer will send the event again."""
        try:
            with self._redis.pipeline(transaction=True) as pipe:
                acknowledge(pipe, [end])
                pipe.execute()
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            without_defects(partial(logger.error, "job %s cannot be acknowledged: %s", end.job_id, described(error)))

    def _run(self, started_at: datetime) -> Run:
        return Run(self._worker.name, started_at, now(), self._worker.default_result_ttl)
