"""Completion of deliveries: acknowledge, release, and finish the job or move it to RQ's failed registry.

One script does all of it for a batch, in one step: see scripts/complete.lua. RQ's own bookkeeping takes some 60
commands a job; a test compares every key with those that RQ's SimpleWorker leaves behind.
"""

from __future__ import annotations

import json
import logging
import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from redis import Redis
from rq import Queue
from rq.defaults import DEFAULT_FAILURE_TTL
from rq.job import Job, JobStatus
from rq.results import Result as RqResult
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat
from rq.worker import BaseWorker

from consumers.errors import described, is_caused_by_job
from consumers.ops.metrics import COUNTS
from consumers.worker import scripts
from consumers.worker.batch import Deferred, Result, acknowledgements, log_fields, without_defects
from consumers.worker.deliveries import ReservedJob, shown_call
from consumers.worker.dependents import BoundedJob, Dependents
from consumers.worker.reservations import JOB_PREFIX, Reservations, log_quarantined
from producers.acknowledgements import ACKNOWLEDGEMENT_TTL_SECONDS
from producers.redis_keys import acknowledgement_key

logger = logging.getLogger(__name__)

# For the dashboard: about 6 MB of snapshots. Older jobs are dropped before RQ's time is over.
KEPT_FINISHED_JOBS = 1000
KEPT_OF_A_BATCH = 25
_HELD_SECONDS = 600  # expiry of a job that others wait for, until RQ has enqueued them
_FIELDS_BYTES = 64 * 1024  # of a job's fields beside its data: RQ's own take some hundred
_LONGEST_TTL_SECONDS = 10**9  # some thirty years; Redis takes no time much longer
_DESCRIPTION_CHARACTERS = 1000
_FOR_EVER = -1
_NO_CALL = bytes(JSONSerializer.dumps(("removed", None, [], {})))


@dataclass(frozen=True)
class _Run:
    """The run of one batch, as RQ describes it in jobs and results."""

    worker: str
    started_at: datetime
    ended_at: datetime
    default_result_ttl: int


class Completion:
    """Completes the reserved jobs of one thread of `worker`.

    Raises:
        RedisError: from every method, if Redis cannot write now. The jobs stay reserved.
    """

    def __init__(self, worker: BaseWorker, queue: Queue, reservations: Reservations) -> None:
        self._worker = worker
        self._redis: Redis = worker.connection
        self._queue = queue
        self._reservations = reservations
        self._dependents = Dependents(worker.connection, queue)
        self._complete = scripts.load(worker.connection, "complete")
        self._read_fields = scripts.load(worker.connection, "read_fields")

    def complete(self, results: Sequence[Result], jobs: Mapping[str, ReservedJob], started_at: datetime) -> None:
        """Complete decided deliveries. If the records of one job cannot be written, only that job goes without."""
        if not results:
            return
        run = self._run(started_at)
        try:
            self._write(results, [(jobs[one.job_id], one.error) for one in results if one.error], jobs, run)
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            if len(results) > 1:
                half = len(results) // 2
                self.complete(results[:half], jobs, started_at)
                self.complete(results[half:], jobs, started_at)
            else:
                self._fail_by_id(results[0], error)

    def dead_letter(self, deferred: Deferred, job: ReservedJob, started_at: datetime) -> None:
        """Move a job to the failed registry although not even its rejection can be recorded.

        It is not acknowledged, since the database has no record of it: its producer sends the event again.
        """
        try:
            self._write([], [(job, deferred.error)], {job.job_id: job}, self._run(started_at))
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            self._fail_by_id(deferred, error)
        COUNTS.dead_lettered(deferred.event_type)

    def release(self, job_ids: Sequence[str]) -> None:
        """Release reserved jobs that somebody has deleted; RQ's own worker passes over them too."""
        if job_ids:
            self._run_script(self._batch(job_ids), {})

    def _write(
        self,
        results: Sequence[Result],
        failed: Sequence[tuple[ReservedJob, BaseException]],
        jobs: Mapping[str, ReservedJob],
        run: _Run,
    ) -> None:
        succeeded = [one for one in results if one.error is None]
        completed = [one.job_id for one in results] or [job.job_id for job, _ in failed]
        dead_letters, calls = self._failed(failed, run)
        batch = self._batch(completed) | self._finished(succeeded, jobs, run) | {"failed": dead_letters}
        counts = (len(succeeded), len(failed), run)
        held = self._run_script(batch, acknowledgements(results), calls=calls, counts=counts)
        if held:
            # They stay reserved until RQ has enqueued the jobs that wait: a crash before that leaves none waiting.
            for job_id in held:
                self._dependents.enqueue(job_id)
            self.release(held)

    def _batch(self, job_ids: Sequence[str]) -> dict[str, Any]:
        return {
            "job_prefix": JOB_PREFIX,
            "result_prefix": RqResult.get_key(""),
            "released": list(job_ids),
            "acknowledgements": [],
            "acknowledged_seconds": ACKNOWLEDGEMENT_TTL_SECONDS,
            "forgotten": [],
            "finished": [],
            "failed": [],
            "job": [],
            "result": [],
            "now": 0,
            "kept_jobs": KEPT_FINISHED_JOBS,
            "held_seconds": _HELD_SECONDS,
        }

    def _run_script(
        self,
        batch: dict[str, Any],
        by_source: Mapping[str, list[str]],
        *,
        calls: Sequence[bytes] = (),
        counts: tuple[int, int, _Run] | None = None,
    ) -> list[str]:
        """Run the script and, with `counts` of successes and failures, RQ's statistics. Returns the held jobs."""
        batch["acknowledgements"] = list(by_source.values())
        keys = [self._reservations.list_key, self._reservations.crashes_key, self._reservations.timeouts_key]
        keys += [self._queue.finished_job_registry.key, self._queue.failed_job_registry.key, self._worker.key]
        keys += map(acknowledgement_key, by_source)
        with self._redis.pipeline(transaction=True) as pipe:
            self._complete(keys=keys, args=[json.dumps(batch), *calls], client=pipe)
            if counts is not None:
                succeeded, failed, run = counts
                pipe.hincrby(self._worker.key, "successful_job_count", succeeded)
                pipe.hincrby(self._worker.key, "failed_job_count", failed)
                self._worker.increment_total_working_time(run.ended_at - run.started_at, pipe)
                self._worker.heartbeat(pipeline=pipe)
            quarantined, held = pipe.execute()[0]
        log_quarantined(quarantined)
        return [job_id.decode() for job_id in held]

    def _finished(self, results: Sequence[Result], jobs: Mapping[str, ReservedJob], run: _Run) -> dict[str, Any]:
        """Successful jobs; RQ's result of each is the id of its row. Of a large batch only the last are kept."""
        started, ended = utcformat(run.started_at), utcformat(run.ended_at)
        kept: list[dict[str, Any]] = []
        forgotten: list[str] = []
        for left, result in zip(range(len(results), 0, -1), results, strict=True):
            own_ttl = jobs[result.job_id].result_ttl
            ttl = run.default_result_ttl if own_ttl is None else own_ttl
            if ttl < 0 or (ttl > 0 and left <= KEPT_OF_A_BATCH):
                row_id = b64encode(b"%d" % result.outcome.row_id if result.outcome.row_id is not None else b"null")
                kept.append({"id": result.job_id, "ttl": ttl, "result": row_id.decode()})
            else:
                forgotten.append(result.job_id)
        job = ["status", JobStatus.FINISHED.value, "started_at", started, "ended_at", ended]
        job += ["last_heartbeat", ended, "worker_name", run.worker]
        times = [str(run.started_at.timestamp()), str(run.ended_at.timestamp())]
        result_fields = ["worker_name", run.worker, "execution_started_at", times[0], "execution_ended_at", times[1]]
        return {
            "finished": kept,
            "forgotten": forgotten,
            "job": job,
            "result": result_fields,
            "now": int(run.ended_at.timestamp()),
        }

    def _failed(
        self, failed: Sequence[tuple[ReservedJob, BaseException]], run: _Run
    ) -> tuple[list[dict[str, Any]], list[bytes]]:
        """Jobs for the failed registry, and their calls, which need not be text.

        A job that RQ could have made keeps its fields. Any other is replaced by a small one that RQ can read.
        """
        jobs: list[dict[str, Any]] = []
        calls: list[bytes] = []
        if not failed:
            return jobs, calls
        found: Any = self._read_fields(keys=[JOB_PREFIX + job.job_id for job, _ in failed], args=[_FIELDS_BYTES])
        for (job, error), fields in zip(failed, found, strict=True):
            kept = None if fields is None else self._restored(job.job_id, dict(zip(*fields, strict=True)))
            call = shown_call(job.data) if job.data else None
            jobs.append(self._failed_job(job, error, kept, run))
            if kept is None or call is None or job.data.startswith(b"["):  # RQ compresses the call of a failed job
                calls.append(zlib.compress(call or _NO_CALL))
                jobs[-1]["call"] = len(calls) + 1  # its place in ARGV
        return jobs, calls

    def _failed_job(self, job: ReservedJob, error: BaseException, kept: Job | None, run: _Run) -> dict[str, Any]:
        written: dict[str, Any] = {}
        if kept is None:
            small = Job(job.job_id, connection=self._redis, serializer=JSONSerializer)
            small.data, small.origin, small.created_at, small.failure_ttl = _NO_CALL, self._queue.name, now(), _FOR_EVER
            small.description = _encodable(str(error))[:_DESCRIPTION_CHARACTERS]
            written = small.to_dict()
            del written["data"]
        ended = utcformat(run.ended_at)
        written |= {"status": JobStatus.FAILED.value, "started_at": utcformat(run.started_at), "ended_at": ended}
        written |= {"last_heartbeat": ended, "worker_name": run.worker}
        own_ttl = _FOR_EVER if kept is None else kept.failure_ttl
        return {
            "id": job.job_id,
            "ttl": DEFAULT_FAILURE_TTL if own_ttl is None else own_ttl,
            "expires_results": own_ttl is not None,
            "replaced": kept is None,
            "held": job.state == "rate_limit_key",  # its slot must be released
            "fields": _words(written),
            "result": _words(self._rq_result(job.job_id, error, run)),
        }

    def _restored(self, job_id: str, fields: dict[bytes, bytes]) -> Job | None:
        """The job without its call; None unless RQ can read it and could write it again."""
        job = BoundedJob(job_id, connection=self._redis, serializer=JSONSerializer)
        try:
            job.restore({**fields, b"data": _NO_CALL})
            job.to_dict()
        except Exception as error:  # RQ raises as many kinds of errors as there are fields
            logger.debug("job %s is replaced: %s", job_id, type(error).__name__, extra={"job_id": job_id})
            return None
        return job if job.failure_ttl is None or -1 <= job.failure_ttl <= _LONGEST_TTL_SECONDS else None

    def _rq_result(self, job_id: str, error: BaseException, run: _Run) -> dict[str, Any]:
        result = RqResult(
            job_id=job_id,
            type=RqResult.Type.FAILED,
            connection=self._redis,
            exc_string=_encodable(f"{type(error).__name__}: {error}"),
            worker_name=run.worker,
            serializer=JSONSerializer,
            execution_started_at=run.started_at,
            execution_ended_at=run.ended_at,
        )
        return dict(result.serialize())

    def _fail_by_id(self, decided: Result | Deferred, error: BaseException) -> None:
        """Complete a delivery whose records cannot be written: acknowledge and release it, and name it as failed."""
        report = partial(logger.error, "the records of job %s cannot be written for RQ", decided.job_id)
        without_defects(partial(report, exc_info=error, extra=log_fields(decided)))
        failed = {"id": decided.job_id, "ttl": _FOR_EVER, "fields": []}
        batch = self._batch([decided.job_id]) | {"failed": [failed]}
        try:
            self._run_script(batch, acknowledgements([decided]) if isinstance(decided, Result) else {})
        except BaseException as another:
            if not is_caused_by_job(another):
                raise
            reason = described(another)
            without_defects(partial(logger.error, "job %s cannot be acknowledged: %s", decided.job_id, reason))
            self._run_script(batch, {})  # its producer will send the event again

    def _run(self, started_at: datetime) -> _Run:
        return _Run(self._worker.name, started_at, now(), self._worker.default_result_ttl)


def _words(fields: Mapping[str, Any]) -> list[str]:
    """Names and values in turn, as text; JSON carries no bytes."""
    return [
        word.decode("latin-1") if isinstance(word, bytes) else str(word) for pair in fields.items() for word in pair
    ]


def _encodable(text: str) -> str:
    """Without lone surrogates, which cannot be encoded."""
    return text.encode(errors="backslashreplace").decode()
