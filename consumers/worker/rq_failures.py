"""What RQ keeps of a failed job, written for whole batches on the server.

Whoever can write to Redis can put anything into the fields of a job. None of it is written again: a job that RQ could
have made keeps its fields, and any other is replaced by a small one of ours, which everybody can read.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.client import Pipeline
from rq import Queue
from rq.defaults import DEFAULT_FAILURE_TTL
from rq.job import Job, JobStatus
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from consumers.worker.jobs import MAX_BESIDE_BYTES, BoundedJob, ReservedJob, Run, shown_call

logger = logging.getLogger(__name__)

_NO_CALL = bytes(JSONSerializer.dumps(("removed", None, [], {})))
_LONGEST_TTL_SECONDS = 10**9  # some thirty years; Redis knows no time much longer
_DESCRIPTION_CHARACTERS = 1000
_FOR_EVER = -1

# KEYS jobs; ARGV bytes. For each all fields but its data, or nothing when it is no hash or has more than that.
_FIELDS = """
local found = {}
for n, key in ipairs(KEYS) do
    found[n] = false
    if redis.call('TYPE', key).ok == 'hash' and redis.call('HLEN', key) <= 1000 then
        local bytes, names = 0, {}
        for _, field in ipairs(redis.call('HKEYS', key)) do
            if field ~= 'data' then
                bytes = bytes + #field + redis.call('HSTRLEN', key, field)
                names[#names + 1] = field
            end
            if bytes > tonumber(ARGV[1]) then break end
        end
        if bytes <= tonumber(ARGV[1]) then
            found[n] = {names, #names > 0 and redis.call('HMGET', key, unpack(names)) or {}}
        end
    end
end
return found
"""

# KEYS failed registry; ARGV seconds now, seconds that a job is kept unless it says otherwise, then for each job its
# key, the key of its results, its id, whether it is replaced, its own wish for how long it is kept, how many words of
# fields follow and of its result, and those.
_FAIL = """
local at = 3
while at <= #ARGV do
    local job, results, id, replaced, wish = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
    local fields = at + 7
    local result = fields + ARGV[at + 5]
    at = result + ARGV[at + 6]
    if replaced == '1' or redis.call('TYPE', job).ok ~= 'hash' then redis.call('DEL', job) end
    redis.call('HSET', job, unpack(ARGV, fields, result - 1))
    redis.call('PERSIST', job)  -- an expiry of an earlier end, or of its time in the queue
    local added = redis.pcall('XADD', results, 'MAXLEN', '~', 10, '*', unpack(ARGV, result, at - 1))
    if type(added) == 'table' and added.err then
        redis.call('DEL', results)
        redis.call('XADD', results, '*', unpack(ARGV, result, at - 1))
    end
    local ttl = tonumber(wish ~= '' and wish or ARGV[2])
    if ttl >= 0 then
        redis.call('EXPIRE', job, ttl)
        redis.call('EXPIRE', job .. ':dependents', ttl)
        redis.call('EXPIRE', job .. ':dependencies', ttl)
    end
    if wish ~= '' then
        if ttl >= 0 then redis.call('EXPIRE', results, ttl) else redis.call('PERSIST', results) end
    end
    redis.call('ZADD', KEYS[1], ttl >= 0 and ARGV[1] + ttl or -1, id)
end
"""

Failure = tuple[ReservedJob, BaseException]


class RqFailures:
    """Fails jobs of one queue in the pipelines that it is given."""

    def __init__(self, redis: Redis, queue: Queue) -> None:
        self._redis = redis
        self._queue = queue
        self._fields = redis.register_script(_FIELDS)
        self._fail = redis.register_script(_FAIL)

    def fail(self, pipe: Pipeline, failures: Sequence[Failure], run: Run) -> None:
        """Add to `pipe`: these jobs failed for good, each with its error."""
        if not failures:
            return
        keys = [Job.key_for(job.job_id) for job, _ in failures]
        found: Any = self._fields(keys=keys, args=[MAX_BESIDE_BYTES])
        arguments: list[Any] = [int(run.ended_at.timestamp()), DEFAULT_FAILURE_TTL]
        for key, (job, error), fields in zip(keys, failures, found, strict=True):
            kept = None if fields is None else self._as_rq_made_it(job.job_id, dict(zip(*fields, strict=True)))
            written = self._written(job, error, run, replaced=kept is None)
            result = self._result(job.job_id, error, run)
            wish = _FOR_EVER if kept is None else kept.failure_ttl
            arguments += [key, Result.get_key(job.job_id), job.job_id, int(kept is None), "" if wish is None else wish]
            arguments += [2 * len(written), 2 * len(result)]
            arguments += [word for pair in (*written.items(), *result.items()) for word in pair]
        self._fail(keys=[self._queue.failed_job_registry.key], args=arguments, client=pipe)

    def fail_by_id(self, pipe: Pipeline, job_id: str) -> None:
        """Add to `pipe`: this job failed for good, without another word in it."""
        pipe.zadd(self._queue.failed_job_registry.key, {job_id: _FOR_EVER})

    def _as_rq_made_it(self, job_id: str, fields: dict[bytes, bytes]) -> Job | None:
        """The job, without its call; None unless RQ can read it and could write it again."""
        job = BoundedJob(job_id, connection=self._redis, serializer=JSONSerializer)
        try:
            job.restore({**fields, b"data": _NO_CALL})
            job.to_dict()
        except Exception as error:  # RQ raises as many kinds of errors as there are fields
            logger.debug("job %s is replaced: %s", job_id, type(error).__name__, extra={"job_id": job_id})
            return None
        return job if job.failure_ttl is None or -1 <= job.failure_ttl <= _LONGEST_TTL_SECONDS else None

    def _written(self, reserved: ReservedJob, error: BaseException, run: Run, *, replaced: bool) -> dict[str, Any]:
        """The fields of its hash that are written."""
        call = shown_call(reserved.data) if reserved.data else None
        ended = utcformat(run.ended_at)
        written: dict[str, Any] = {}
        if replaced:
            job = Job(reserved.job_id, connection=self._redis, serializer=JSONSerializer)
            job.data, job.origin, job.created_at, job.failure_ttl = _NO_CALL, self._queue.name, now(), _FOR_EVER
            job.description = _encodable(str(error))[:_DESCRIPTION_CHARACTERS]
            written |= job.to_dict()
        if call is None:
            written["data"] = zlib.compress(_NO_CALL)
        elif replaced or reserved.data.startswith(b"["):
            written["data"] = zlib.compress(call)
        return written | {
            "status": JobStatus.FAILED.value,
            "started_at": utcformat(run.started_at),
            "ended_at": ended,
            "last_heartbeat": ended,
            "worker_name": run.worker,
        }

    def _result(self, job_id: str, error: BaseException, run: Run) -> dict[str, Any]:
        told = Result(
            job_id=job_id,
            type=Result.Type.FAILED,
            connection=self._redis,
            exc_string=_encodable(f"{type(error).__name__}: {error}"),
            worker_name=run.worker,
            serializer=JSONSerializer,
            execution_started_at=run.started_at,
            execution_ended_at=run.ended_at,
        )
        return dict(told.serialize())


def _encodable(text: str) -> str:
    """A surrogate without its other half, as JSON may have it, cannot be encoded."""
    return text.encode(errors="backslashreplace").decode()
