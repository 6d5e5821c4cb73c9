"""Completion of deliveries: acknowledge, release, and finish the job or move it to RQ's failed registry.

One script does all of it for a batch, in one step: see scripts/complete.lua. RQ itself needs some 60 commands for each
job; a test compares every key with those that RQ's SimpleWorker writes.
"""

from __future__ import annotations

import json
import logging
import zlib
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

from consumers.errors import described
from consumers.ops.metrics import COUNTS
from consumers.ops.redis_errors import is_caused_by_job
from consumers.worker import scripts
from consumers.worker.batch import Deferred, EventLogger, Result, acknowledgements, report_safely
from consumers.worker.deliveries import ReservedJob, displayable_call
from consumers.worker.dependents import BoundedJob, Dependents
from consumers.worker.reservations import JOB_PREFIX, Reservations, log_quarantined
from producers.acknowledgements import ACKNOWLEDGEMENT_TTL_SECONDS
from producers.redis_keys import acknowledgement_key

logger = logging.getLogger(__name__)

# Kept for RQ's dashboards: 1,000 snapshots are about 6 MB. Older jobs are deleted before their expiry.
KEPT_FINISHED_JOBS = 1000
KEPT_OF_A_BATCH = 25
_WAITED_FOR_SECONDS = 600  # shortest expiry of a job that has dependents, until RQ has enqueued them
_FIELDS_BYTES = 64 * 1024  # limit of a job's fields without its data; RQ's own fields have some hundred bytes
_LONGEST_TTL_SECONDS = 10**9  # some 30 years; Redis does not accept a much longer time
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


@dataclass(frozen=True)
class _Batch:
    """The arguments of scripts/complete.lua, whose header explains them. `acknowledgements` is by source."""

    released: Sequence[str]
    acknowledgements: Mapping[str, list[str]] = field(default_factory=dict)
    forgotten: Sequence[str] = ()
    finished: Sequence[dict[str, Any]] = ()
    failed: Sequence[dict[str, Any]] = ()
    calls: Sequence[bytes] = ()
    job: Sequence[str] = ()
    result: Sequence[str] = ()
    now: int = 0

    def arguments(self) -> list[str | bytes]:
        """Return the script's ARGV."""
        document = {
            "job_prefix": JOB_PREFIX,
            "result_prefix": RqResult.get_key(""),
            "released": self.released,
            "acknowledgements": list(self.acknowledgements.values()),
            "acknowledged_seconds": ACKNOWLEDGEMENT_TTL_SECONDS,
            "forgotten": self.forgotten,
            "finished": self.finished,
            "failed": self.failed,
            "job": self.job,
            "result": self.result,
            "now": self.now,
            "kept_jobs": KEPT_FINISHED_JOBS,
            "waited_for_seconds": _WAITED_FOR_SECONDS,
        }
        return [json.dumps(document), *self.calls]


class Completion:
    """Completes the reserved jobs of one thread of `worker`.

    If the access list of Redis forbids a command that writes only RQ's records of a job, it calls `note_forbidden` with
    the error, and completes the jobs without these records.

    Raises:
        RedisError: from every method, if Redis cannot write now. The jobs stay reserved.
    """

    def __init__(
        self, worker: BaseWorker, queue: Queue, reservations: Reservations, note_forbidden: Callable[[str], None]
    ) -> None:
        self._note_forbidden = note_forbidden
        self._worker = worker
        self._redis: Redis = worker.connection
        self._queue = queue
        self._reservations = reservations
        self._dependents = Dependents(worker.connection, queue)
        self._complete = scripts.load(worker.connection, "complete")
        self._read_fields = scripts.load(worker.connection, "read_fields")

    def complete(self, results: Sequence[Result], jobs: Mapping[str, ReservedJob], started_at: datetime) -> None:
        """Complete decided deliveries. If RQ's records of one job cannot be written, only that job has none."""
        if not results:
            return
        run = self._run(started_at)
        try:
            failed = [(jobs[one.job_id], one.error) for one in results if one.error and one.failed]
            self._write(results, failed, jobs, run)
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
        """Move a job to the failed registry if its rejection cannot be recorded in the database.

        It is not acknowledged, so the producer sends its event again.
        """
        try:
            self._write([], [(job, deferred.error)], {job.job_id: job}, self._run(started_at))
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            self._fail_by_id(deferred, error)
        COUNTS.dead_lettered(deferred.event_type)

    def release(self, job_ids: Sequence[str]) -> None:
        """Release reserved jobs that need nothing else: they were deleted, or their dependents are enqueued."""
        if job_ids:
            self._run_script(_Batch(job_ids))

    def _write(
        self,
        results: Sequence[Result],
        failed: Sequence[tuple[ReservedJob, BaseException]],
        jobs: Mapping[str, ReservedJob],
        run: _Run,
    ) -> None:
        succeeded = [one for one in results if not one.failed]
        completed = [one.job_id for one in results] or [job.job_id for job, _ in failed]
        dead_letters, calls = self._failed(failed, run)
        finished = self._finished(succeeded, jobs, run)
        batch = _Batch(completed, acknowledgements(results), failed=dead_letters, calls=calls, **finished)
        still_reserved = self._run_script(batch, counts=(len(succeeded), len(failed), run))
        # They stay reserved until RQ has enqueued their dependents, so that this is done again after a crash.
        for job_id in still_reserved:
            self._dependents.enqueue(job_id)
        self.release(still_reserved)

    def _run_script(self, batch: _Batch, *, counts: tuple[int, int, _Run] | None = None) -> list[str]:
        """Run the script and, with `counts` of successes and failures, update RQ's statistics.

        Returns the jobs that stay reserved, since they have dependents or a slot of a rate limit.
        """
        keys = [self._reservations.list_key, self._reservations.crashes_key, self._reservations.timeouts_key]
        keys += [self._queue.finished_job_registry.key, self._queue.failed_job_registry.key, self._worker.key]
        keys += map(acknowledgement_key, batch.acknowledgements)
        with self._redis.pipeline(transaction=True) as pipe:
            self._complete(keys=keys, args=batch.arguments(), client=pipe)
            if counts is not None:
                succeeded, failed, run = counts
                pipe.hincrby(self._worker.key, "successful_job_count", succeeded)
                pipe.hincrby(self._worker.key, "failed_job_count", failed)
                self._worker.increment_total_working_time(run.ended_at - run.started_at, pipe)
                self._worker.heartbeat(pipeline=pipe)
            quarantined, still_reserved, errors = pipe.execute()[0]
        log_quarantined(quarantined)
        for error in errors:
            self._note_forbidden(error.decode(errors="replace"))
        return [job_id.decode() for job_id in still_reserved]

    def _finished(self, results: Sequence[Result], jobs: Mapping[str, ReservedJob], run: _Run) -> dict[str, Any]:
        """Return the script's arguments for successful jobs. Only the last of a large batch are kept.

        RQ's result of a job is the id of its row.
        """
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
        """Return jobs for the failed registry, and their calls, which can be any bytes.

        A job whose fields RQ can read keeps them. Any other job is replaced by a placeholder that RQ can read.
        """
        jobs: list[dict[str, Any]] = []
        calls: list[bytes] = []
        if not failed:
            return jobs, calls
        found: Any = self._read_fields(keys=[JOB_PREFIX + job.job_id for job, _ in failed], args=[_FIELDS_BYTES])
        for (job, error), fields in zip(failed, found, strict=True):
            original = None if fields is None else self._restored(job.job_id, dict(zip(*fields, strict=True)))
            call = displayable_call(job.data) if job.data else None
            jobs.append(self._failed_job(job, error, original, run))
            if original is None or call is None or job.data.startswith(b"["):  # RQ compresses a failed job's call
                calls.append(zlib.compress(call or _NO_CALL))
                jobs[-1]["call"] = len(calls) + 1  # its place in ARGV
        return jobs, calls

    def _failed_job(self, job: ReservedJob, error: BaseException, original: Job | None, run: _Run) -> dict[str, Any]:
        written: dict[str, Any] = {}
        if original is None:
            placeholder = Job(job.job_id, connection=self._redis, serializer=JSONSerializer)
            placeholder.data, placeholder.origin = _NO_CALL, self._queue.name
            placeholder.created_at, placeholder.failure_ttl = now(), _FOR_EVER
            placeholder.description = _encodable(str(error))[:_DESCRIPTION_CHARACTERS]
            written = placeholder.to_dict()
            del written["data"]
        ended = utcformat(run.ended_at)
        written |= {"status": JobStatus.FAILED.value, "started_at": utcformat(run.started_at), "ended_at": ended}
        written |= {"last_heartbeat": ended, "worker_name": run.worker}
        own_ttl = _FOR_EVER if original is None else original.failure_ttl
        return {
            "id": job.job_id,
            "ttl": DEFAULT_FAILURE_TTL if own_ttl is None else own_ttl,
            "expires_results": own_ttl is not None,
            "is_placeholder": original is None,
            "keep_reserved": job.state == "rate_limit_key",  # its slot must be released
            "fields": _flat_pairs(written),
            "result": _flat_pairs(self._rq_result(job.job_id, error, run)),
        }

    def _restored(self, job_id: str, fields: dict[bytes, bytes]) -> Job | None:
        """Return the job without its call; None unless RQ can read its fields and write them again."""
        job = BoundedJob(job_id, connection=self._redis, serializer=JSONSerializer)
        try:
            job.restore({**fields, b"data": _NO_CALL})
            job.to_dict()
        except Exception as error:  # RQ raises errors of any class
            logger.debug(
                "RQ cannot read job %s, which is replaced by a placeholder: %s",
                job_id,
                type(error).__name__,
                extra={"job_id": job_id},
            )
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
        """Complete a delivery whose records cannot be written: acknowledge and release it, and list it as failed."""
        message = "cannot write RQ's records of job %s; it is listed as failed without details"
        event_logger = EventLogger(logger, decided)
        report_safely(partial(event_logger.error, message, decided.job_id, exc_info=error))
        failed = {"id": decided.job_id, "ttl": _FOR_EVER, "fields": []}
        batch = _Batch([decided.job_id], failed=[failed])
        try:
            known = acknowledgements([decided]) if isinstance(decided, Result) else {}
            self._run_script(replace(batch, acknowledgements=known))
        except BaseException as another:
            if not is_caused_by_job(another):
                raise
            message = "cannot acknowledge job %s; its producer sends the event again: %s"
            report_safely(partial(event_logger.error, message, decided.job_id, described(another)))
            self._run_script(batch)

    def _run(self, started_at: datetime) -> _Run:
        return _Run(self._worker.name, started_at, now(), self._worker.default_result_ttl)


def _flat_pairs(fields: Mapping[str, Any]) -> list[str]:
    """Return names and values alternating, as text, since JSON has no bytes."""
    return [
        word.decode("latin-1") if isinstance(word, bytes) else str(word) for pair in fields.items() for word in pair
    ]


def _encodable(text: str) -> str:
    """Return the text with lone surrogates, which cannot be encoded, as escapes."""
    return text.encode(errors="backslashreplace").decode()
