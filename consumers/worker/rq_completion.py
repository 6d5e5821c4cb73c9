"""What RQ keeps of a job, read and written for whole batches on the server.

RQ's own bookkeeping takes some 60 commands a job. Here taking jobs is part of the script that reserves them, and
finishing them is one script; a test compares every key with what RQ's SimpleWorker leaves behind.

What the consuming side knows of the layout of RQ's keys is here, for failures in consumers.worker.rq_failures, and for
leftovers in consumers.worker.orphans.
"""

from __future__ import annotations

import contextlib
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.client import Pipeline
from rq import Queue
from rq.job import Job
from rq.rate_limit import release_slot
from rq.repeat import Repeat
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from consumers.errors import OversizedJob, RefusedJob
from consumers.worker.batch import Delivery, logger
from consumers.worker.jobs import MAX_BESIDE_BYTES, MAX_JOB_BYTES, BoundedJob, ReservedJob, Run, check_wishes, read_call
from consumers.worker.quarantine import is_redis_trouble

# For the dashboard, about 6 MB of snapshots; by time they are kept as long as RQ keeps them.
KEPT_FINISHED_JOBS = 1000
KEPT_OF_A_BATCH = 25
_UNTIL_LET_GO_SECONDS = 600  # for a job of which nothing is to be kept, but others wait for its end
_DEPENDENTS_BESIDE_BYTES = 8 * 1024 * 1024  # of all together, some 18,000 jobs, which RQ reads at once
_READY_JOBS = 100  # at a time
JOB_PREFIX = Job.redis_job_namespace_prefix

# A piece of the reserving script. Tells of jobs, until their data have so many bytes: the state of each, its data, and
# how long its result is to be kept. What is larger than any job of ours stays where it is.
# What asks for more than to be run (callbacks, repetitions ...) is `unusual`, and goes RQ's own way.
READ_JOBS = """
local function read_jobs(prefix, ids, enough, largest)
    local data, odd, bytes = {}, {}, 0
    for n, id in ipairs(ids) do
        if bytes >= enough then break end
        local state, found, size = 'usual', {}, redis.pcall('HSTRLEN', prefix .. id, 'data')
        if type(size) == 'table' then  -- an error: it is no hash
            state = 'unreadable'
        elseif size > largest then
            state = 'oversized'
        else
            found = redis.call('HMGET', prefix .. id, 'data', 'result_ttl', 'success_callback_name',
                'failure_callback_name', 'stopped_callback_name', 'webhooks', 'repeats_left', 'rate_limit_key')
            if not found[1] then
                state = redis.call('EXISTS', prefix .. id) == 1 and 'unreadable' or 'gone'
            else
                for field = 3, 8 do
                    if found[field] and found[field] ~= '' then state = 'unusual' end
                end
            end
        end
        data[n] = found[1] or ''
        bytes = bytes + #data[n]
        -- What is as usual is told by its data alone. No number has more digits than these.
        local ttl = found[2] and #found[2] < 20 and found[2] or ''
        if state ~= 'usual' or ttl ~= '' then odd[#odd + 1] = {n, state, ttl} end
    end
    return data, odd
end
"""

# KEYS jobs; ARGV bytes. Of all of them together the bytes of data, and of what they have beside it, names of fields
# included; when that is more, it is not counted to its end. What is no hash has none.
_SIZES = """
local data, beside = 0, 0
for _, key in ipairs(KEYS) do
    if redis.call('TYPE', key).ok == 'hash' then
        if redis.call('HLEN', key) > 1000 then return {data, tonumber(ARGV[1]) + 1} end
        for _, field in ipairs(redis.call('HKEYS', key)) do
            local bytes = redis.call('HSTRLEN', key, field)
            if field == 'data' then data = data + bytes else beside = beside + #field + bytes end
            if beside > tonumber(ARGV[1]) then return {data, beside} end
        end
    end
end
return {data, beside}
"""

# KEYS finished registry, failed registry, held list; ARGV prefixes of jobs and results, worker, start and end as text
# and as seconds, seconds now, finished jobs to keep, seconds until others are let go, how many jobs are not kept and
# their ids, then for each job that is kept its id, seconds to keep the result, the result, whether it is unusual.
# What somebody has put in the place of a job or its results ends nothing.
# Others may have come to wait for a job at any time until now, when its status changes. Such jobs, and unusual ones,
# are held on, and neither expire nor are pushed out: others must be let go first. Those are the answer.
# Each call from a script costs some microseconds: what can be asked of all jobs at once is not asked of each.
_FINISH = """
local ended, first, width = {}, 12 + tonumber(ARGV[11]), 4
for n = 12, first - 1 do ended[#ended + 1] = ARGV[n] end
for n = first, #ARGV, width do ended[#ended + 1] = ARGV[n] end
redis.call('ZREM', KEYS[2], unpack(ended))
local dependents, awaited, forgotten, held, keep = {}, {}, {}, {}, {}
for n, id in ipairs(ended) do dependents[n] = ARGV[1] .. id .. ':dependents' end
if redis.call('EXISTS', unpack(dependents)) > 0 then
    for n, id in ipairs(ended) do awaited[id] = redis.call('EXISTS', dependents[n]) == 1 end
end
for n = 12, first - 1 do
    local job = ARGV[1] .. ARGV[n]
    if awaited[ARGV[n]] and redis.call('EXISTS', job) == 1 then
        redis.pcall('HSET', job, 'status', 'finished')
        redis.call('EXPIRE', job, ARGV[10])
        held[#held + 1] = ARGV[n]
    else
        forgotten[#forgotten + 1] = job
        forgotten[#forgotten + 1] = ARGV[2] .. ARGV[n]
        forgotten[#forgotten + 1] = ARGV[1] .. ':' .. ARGV[n] .. ':dependencies'
    end
end
if #forgotten > 0 then redis.call('DEL', unpack(forgotten)) end
for n = first, #ARGV, width do
    local id, ttl = ARGV[n], tonumber(ARGV[n + 1])
    local hold = awaited[id] or ARGV[n + 3] ~= ''
    if hold then held[#held + 1], keep[id] = id, true end
    local job, results = ARGV[1] .. id, ARGV[2] .. id
    if redis.call('EXISTS', job) == 1 then
        redis.pcall('HSET', job, 'status', 'finished', 'started_at', ARGV[4], 'ended_at', ARGV[5],
            'last_heartbeat', ARGV[5], 'worker_name', ARGV[3])
        redis.pcall('XADD', results, 'MAXLEN', 10, '*', 'type', '1', 'worker_name', ARGV[3],
            'return_value', ARGV[n + 2], 'execution_started_at', ARGV[6], 'execution_ended_at', ARGV[7])
        if ttl > 0 then
            redis.call('EXPIRE', results, ttl)
            redis.call('EXPIRE', job, hold and math.max(ttl, tonumber(ARGV[10])) or ttl)
            redis.call('EXPIRE', ARGV[1] .. ':' .. id .. ':dependencies', ttl)
        else
            redis.call('PERSIST', results)
            redis.call('PERSIST', job)
        end
        redis.call('ZADD', KEYS[1], ttl > 0 and ARGV[8] + ttl or '+inf', id)
    end
end
-- What is to be kept for ever is somebody's wish, and not counted. A thousand at once is more than a batch adds.
local extra = redis.call('ZCOUNT', KEYS[1], 0, '(+inf') - tonumber(ARGV[9])
if extra > 0 then
    local oldest = redis.call('ZRANGEBYSCORE', KEYS[1], 0, '(+inf', 'LIMIT', 0, math.min(extra, 1000))
    local dropped, removed = {}, {}
    for _, id in ipairs(oldest) do
        if not keep[id] then
            removed[#removed + 1] = id
            if redis.pcall('HGET', ARGV[1] .. id, 'status') == 'finished' then
                dropped[#dropped + 1] = ARGV[1] .. id
                dropped[#dropped + 1] = ARGV[2] .. id
            end
        end
    end
    if #dropped > 0 then redis.call('DEL', unpack(dropped)) end
    if #removed > 0 then redis.call('ZREM', KEYS[1], unpack(removed)) end
end
if #held > 0 then redis.call('RPUSH', KEYS[3], unpack(held)) end
return held
"""


class RqJobs:
    """Ends the jobs of one queue in the pipelines that it is given."""

    def __init__(self, redis: Redis, queue: Queue) -> None:
        self._redis = redis
        self._queue = queue
        self._finish = redis.register_script(_FINISH)
        self._sizes = redis.register_script(_SIZES)
        self._bounded = Queue(queue.name, connection=redis, job_class=BoundedJob, serializer=JSONSerializer)

    def delivery(self, reserved: ReservedJob) -> Delivery:
        """The event that a job carries, or why the job is refused. Raises whatever defect of ours reading it meets."""
        text: Any = ""
        try:
            text, model = read_call(reserved)
            if reserved.state == "unusual":
                check_wishes(self._read(reserved.job_id))
        except RefusedJob as refusal:
            return Delivery(reserved.job_id, text, None, refusal)
        return Delivery(reserved.job_id, text, model)

    def finish(self, pipe: Pipeline, done: Sequence[tuple[ReservedJob, int | None]], run: Run, held_key: str) -> None:
        """Add to `pipe`: these jobs succeeded, each with the id of its row as result.

        The answer is the ids of those that others wait for, or may: they are in the list at `held_key` again.
        """
        at = run.ended_at.timestamp()
        header: list[Any] = [JOB_PREFIX, Result.get_key(""), run.worker, utcformat(run.started_at)]
        header += [utcformat(run.ended_at), run.started_at.timestamp(), at, int(at), KEPT_FINISHED_JOBS]
        header.append(_UNTIL_LET_GO_SECONDS)
        forgotten: list[str] = []
        kept: list[Any] = []
        for left, (job, row_id) in zip(range(len(done), 0, -1), done, strict=True):
            ttl = run.result_ttl_of(job)
            unusual = job.state == "unusual"
            if unusual and ttl == 0:
                ttl = _UNTIL_LET_GO_SECONDS
            # Of a large batch only the last ones are kept: the others would be pushed out moments later.
            if ttl < 0 or (ttl > 0 and (unusual or left <= KEPT_OF_A_BATCH)):
                result = b64encode(b"%d" % row_id if row_id is not None else b"null")
                kept += [job.job_id, ttl, result, "unusual" if unusual else ""]
            else:
                forgotten.append(job.job_id)
        keys = [self._queue.finished_job_registry.key, self._queue.failed_job_registry.key, held_key]
        self._finish(keys=keys, args=[*header, len(forgotten), *forgotten, *kept], client=pipe)

    def fetch(self, job_id: str) -> Job | None:
        """The job as RQ has it; None when it is gone, too large, or cannot be read."""
        try:
            return self._read(job_id)
        except OversizedJob:
            return None

    def _read(self, job_id: str) -> Job | None:
        """Raises OversizedJob instead of reading one that is larger than any of ours."""
        try:
            self._check_sizes([job_id], MAX_BESIDE_BYTES)
            return BoundedJob.fetch(job_id, connection=self._redis, serializer=JSONSerializer)
        except OversizedJob:
            raise
        except Exception as error:
            if is_redis_trouble(error):
                raise
            # Whatever somebody has done to it: RQ raises as many kinds of errors as there are fields.
            logger.debug("job %s cannot be read: %s", job_id, type(error).__name__, extra={"job_id": job_id})
        return None

    def _check_sizes(self, job_ids: Sequence[str], beside_bytes: int) -> None:
        data, beside = self._sizes(keys=[Job.key_for(job_id) for job_id in job_ids], args=[beside_bytes])
        if data > MAX_JOB_BYTES:
            raise OversizedJob.in_all(MAX_JOB_BYTES)
        if beside > beside_bytes:
            raise OversizedJob.beside_its_call(beside_bytes)

    def let_go(self, reserved: ReservedJob, run: Run, *, refused: bool) -> None:
        """What others made to wait for the end of this job goes on, RQ's own way: dependents, its next repetition.

        What waits for a job that was `refused` unread stays where it is, but for those that share its rate limit.
        """
        try:
            if (job := self._read(reserved.job_id)) is None:
                return
            if not refused:
                self._enqueue_dependents(job)
                self._repeat_or_end(job, run.result_ttl_of(reserved))
            release_slot(job)
        except Exception as error:
            if is_redis_trouble(error):
                raise
            # Whatever somebody has put there must not end the worker: the event itself is settled.
            logger.error("what waits for job %s is left waiting: %s", reserved.job_id, type(error).__name__)

    def enqueue_ready(self) -> None:
        """Some of what RQ has left on its way from deferred to queued, as a death or a collision in between does."""
        registry = self._bounded.ready_job_registry
        found: Any = self._redis.zrange(registry.key, 0, _READY_JOBS - 1)
        for job_id in found:
            with contextlib.suppress(OversizedJob):
                self._check_sizes([job_id.decode(errors="replace")], MAX_BESIDE_BYTES)
                registry.enqueue_jobs([job_id.decode(errors="replace")])

    def _enqueue_dependents(self, job: Job) -> None:
        self._check_sizes(job.dependent_ids, _DEPENDENTS_BESIDE_BYTES)
        self._bounded.enqueue_dependents(job)

    def _repeat_or_end(self, job: Job, result_ttl: int) -> None:
        again = job.repeats_left and job.is_finished
        if result_ttl == 0:
            self._redis.delete(Result.get_key(job.id))
            self._queue.finished_job_registry.remove(job)
        if again:
            self._redis.persist(job.key)  # it would expire with its first result, maybe before it runs again
            Repeat.schedule(job, self._bounded)
        else:
            job.cleanup(result_ttl, remove_from_queue=False)  # with what it knows of dependencies
