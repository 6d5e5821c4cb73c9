"""What RQ keeps of a job, read and written for whole batches on the server.

RQ's own bookkeeping takes some 60 commands a job. Here taking jobs is part of the script that reserves them, and
finishing them is one script; a test compares every key with what RQ's SimpleWorker leaves behind.

What the consuming side knows of the layout of RQ's keys is here, and for leftovers in consumers.stranded.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json
from redis import Redis, RedisError
from redis.client import Pipeline
from rq import Queue
from rq.job import Job, JobStatus
from rq.rate_limit import release_slot
from rq.repeat import Repeat
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from consumers.errors import RefusedJob
from consumers.handlers import record_portfolio_snapshot, record_signal_archive
from consumers.settling import Delivery, logger
from producers.events import MAX_EVENT_BYTES, Event, PortfolioSnapshotEvent, SignalArchiveEvent

# For the dashboard, about 2 MB; by time they are kept as long as RQ keeps them.
KEPT_FINISHED_JOBS = 1000
KEPT_OF_A_BATCH = 100
_MODELS: dict[str, type[Event]] = {
    f"{function.__module__}.{function.__name__}": model
    for function, model in (
        (record_portfolio_snapshot, PortfolioSnapshotEvent),
        (record_signal_archive, SignalArchiveEvent),
    )
}
# An event's text as a JSON string inside the call; every character of it can be six there.
_MAX_CALL_BYTES = 6 * MAX_EVENT_BYTES + 1000
JOB_PREFIX = Job.redis_job_namespace_prefix

# A piece of the reserving script. Tells of one job: its state, its data, and how long its result is to be kept.
# What asks for more than to be run (callbacks, dependents ...) is `unusual`, and goes RQ's own way. Each call from a
# script costs some microseconds: what can be asked of all jobs at once is not asked of each.
READ_JOBS = """
local function read_jobs(prefix, ids)
    local keys, data, odd = {}, {}, {}
    for n, id in ipairs(ids) do keys[n] = prefix .. id .. ':dependents' end
    local awaited = #keys > 0 and redis.call('EXISTS', unpack(keys)) > 0
    for n, id in ipairs(ids) do
        local found = redis.pcall('HMGET', prefix .. id, 'data', 'result_ttl', 'success_callback_name',
            'failure_callback_name', 'stopped_callback_name', 'webhooks', 'repeats_left', 'rate_limit_key')
        local state = 'usual'
        if found.err then
            state, found = 'unreadable', {}
        elseif not found[1] then
            state = redis.call('EXISTS', prefix .. id) == 1 and 'unreadable' or 'gone'
        elseif awaited and redis.call('EXISTS', keys[n]) == 1 then
            state = 'unusual'
        else
            for field = 3, 8 do
                if found[field] and found[field] ~= '' then state = 'unusual' end
            end
        end
        data[n] = found[1] or ''
        -- What is as usual is told by its data alone.
        if state ~= 'usual' or found[2] then odd[#odd + 1] = {n, state, found[2] or ''} end
    end
    return data, odd
end
"""

# KEYS finished registry, failed registry; ARGV prefixes of jobs and results, worker, start and end as text and as
# seconds, seconds now, finished jobs to keep, how many jobs are not kept and their ids, then for each job that is kept
# its id, seconds to keep the result, the result.
_FINISH = """
local forgotten, ended = {}, {}
local first = 11 + tonumber(ARGV[10])
for n = 11, first - 1 do
    ended[#ended + 1] = ARGV[n]
    forgotten[#forgotten + 1] = ARGV[1] .. ARGV[n]
    forgotten[#forgotten + 1] = ARGV[2] .. ARGV[n]
end
for n = first, #ARGV, 3 do ended[#ended + 1] = ARGV[n] end
redis.call('ZREM', KEYS[2], unpack(ended))
if #forgotten > 0 then redis.call('DEL', unpack(forgotten)) end
for n = first, #ARGV, 3 do
    local id, ttl = ARGV[n], tonumber(ARGV[n + 1])
    local job, results = ARGV[1] .. id, ARGV[2] .. id
    if redis.call('EXISTS', job) == 1 then
        redis.call('HSET', job, 'status', 'finished', 'started_at', ARGV[4], 'ended_at', ARGV[5],
            'last_heartbeat', ARGV[5], 'worker_name', ARGV[3])
        redis.call('XADD', results, 'MAXLEN', 10, '*', 'type', '1', 'worker_name', ARGV[3],
            'return_value', ARGV[n + 2], 'execution_started_at', ARGV[6], 'execution_ended_at', ARGV[7])
        if ttl > 0 then
            redis.call('EXPIRE', results, ttl)
            redis.call('EXPIRE', job, ttl)
        else
            redis.call('PERSIST', results)
            redis.call('PERSIST', job)
        end
        redis.call('ZADD', KEYS[1], ttl > 0 and ARGV[8] + ttl or '+inf', id)
    end
end
-- What is to be kept for ever is somebody's wish, and not counted.
local extra = redis.call('ZCOUNT', KEYS[1], 0, '(+inf') - tonumber(ARGV[9])
if extra > 0 then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], 0, '(+inf', 'LIMIT', 0, extra)) do
        if redis.call('HGET', ARGV[1] .. id, 'status') == 'finished' then
            redis.call('DEL', ARGV[1] .. id, ARGV[2] .. id)
        end
        redis.call('ZREM', KEYS[1], id)
    end
end
"""


class ReservedJob(NamedTuple):
    """A job that is held now. `deaths` counts the holders that died with it alone; None for no suspect.

    `delays` counts how often it went to the tail since it alone timed out. `data` is what RQ calls so: the serialized
    call. `result_ttl` is the job's own wish in seconds, if it has one.
    """

    job_id: str
    deaths: int | None
    delays: int
    state: Literal["usual", "unusual", "unreadable", "gone"]
    data: bytes
    result_ttl: int | None


def _call(reserved: ReservedJob) -> tuple[Any, type[Event]]:
    if reserved.state == "unreadable":
        raise RefusedJob("its job cannot be read")
    try:
        function, _, arguments, keywords = from_json(_inflated(reserved.data))
    except Exception:
        raise RefusedJob("its data cannot be read as JSON") from None
    if not isinstance(function, str) or function not in _MODELS:
        raise RefusedJob("it names a function that is not one of ours")
    if not isinstance(arguments, list) or len(arguments) != 1 or keywords:
        raise RefusedJob("it must have one argument, the event's text")
    return arguments[0], _MODELS[function]


def _inflated(data: bytes) -> bytes:
    """As RQ reads it, compressed or not, but not without limit."""
    if data.startswith(b"["):
        return data
    inflating = zlib.decompressobj()
    inflated = inflating.decompress(data, _MAX_CALL_BYTES)
    if inflating.unconsumed_tail:
        raise OverflowError
    return inflated


def _check_wishes(job: Job | None) -> None:
    if job is None:
        raise RefusedJob("its job cannot be read")
    if job._success_callback_name or job._failure_callback_name or job._stopped_callback_name or job.webhooks:
        raise RefusedJob("it has a callback or a webhook")


@dataclass(frozen=True)
class Run:
    """One batch's run, as RQ tells it of a job."""

    worker: str
    started_at: datetime
    ended_at: datetime
    default_result_ttl: int


class RqJobs:
    """Ends the jobs of one queue in the pipelines that it is given."""

    def __init__(self, redis: Redis, queue: Queue) -> None:
        self._redis = redis
        self._queue = queue
        self._finish = redis.register_script(_FINISH)

    def delivery(self, reserved: ReservedJob) -> Delivery:
        """The event that a job carries, or why the job is refused."""
        try:
            text, model = _call(reserved)
            if reserved.state == "unusual":
                _check_wishes(self.fetch(reserved.job_id))
        except RefusedJob as refusal:
            return Delivery(reserved.job_id, "", None, refusal)
        return Delivery(reserved.job_id, text, model)

    def finish(self, pipe: Pipeline, done: Sequence[tuple[ReservedJob, int | None]], run: Run) -> None:
        """Add to `pipe`: these jobs succeeded, each with the id of its row as result."""
        at = run.ended_at.timestamp()
        header: list[Any] = [JOB_PREFIX, Result.get_key(""), run.worker, utcformat(run.started_at)]
        header += [utcformat(run.ended_at), run.started_at.timestamp(), at, int(at), KEPT_FINISHED_JOBS]
        forgotten: list[str] = []
        kept: list[Any] = []
        for left, (job, row_id) in zip(range(len(done), 0, -1), done, strict=True):
            ttl = run.default_result_ttl if job.result_ttl is None else job.result_ttl
            # Of a large batch only the last ones are kept: the others would be pushed out moments later.
            if ttl < 0 or (ttl > 0 and left <= KEPT_OF_A_BATCH):
                kept += [job.job_id, ttl, b64encode(b"%d" % row_id if row_id is not None else b"null")]
            else:
                forgotten.append(job.job_id)
        keys = [self._queue.finished_job_registry.key, self._queue.failed_job_registry.key]
        self._finish(keys=keys, args=[*header, len(forgotten), *forgotten, *kept], client=pipe)

    def fail(self, pipe: Pipeline, job_id: str, error: Exception, run: Run) -> None:
        """Add to `pipe`: this job failed for good."""
        job = self.fetch(job_id)
        if job is None:
            # RQ could not even write a failure into it: it is failed by its id alone.
            pipe.zadd(self._queue.failed_job_registry.key, {job_id: -1})
            return
        job.started_at, job.ended_at, job.last_heartbeat = run.started_at, run.ended_at, run.ended_at
        job.worker_name = run.worker
        pipe.persist(job.key)  # an expiry of an earlier end, or of its time in the queue
        job.set_status(JobStatus.FAILED, pipeline=pipe)
        reason = f"{type(error).__name__}: {error}"
        job._handle_failure(
            reason, pipe, run.worker, execution_started_at=run.started_at, execution_ended_at=run.ended_at
        )

    def fetch(self, job_id: str) -> Job | None:
        """The job as RQ has it; None when it is gone or cannot be read."""
        try:
            return Job.fetch(job_id, connection=self._redis, serializer=JSONSerializer)
        except RedisError as error:
            # Only this one is the job's fault; any other error is Redis's trouble, and no reason to refuse an event.
            if not str(error).startswith("WRONGTYPE"):
                raise
        except Exception as error:
            # Whatever somebody has done to it: RQ raises as many kinds of errors as there are fields.
            logger.debug("job %s cannot be read: %s", job_id, type(error).__name__, extra={"job_id": job_id})
        return None

    def let_go(self, job_id: str) -> None:
        """What others made to wait for the end of this job goes on, RQ's own way: dependents, its next repetition."""
        job = self.fetch(job_id)
        if job is None:
            return
        if job.repeats_left and job.is_finished:
            Repeat.schedule(job, self._queue)
        self._queue.enqueue_dependents(job)
        release_slot(job)
