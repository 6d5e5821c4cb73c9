"""Deliveries as RQ jobs: RQ reads them like jobs that it has enqueued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakeredis
import pytest
from rq import Queue
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.serializers import JSONSerializer

from producers.entries import Entry
from producers.events import KINDS
from producers.outbox import Outbox
from producers.redis_keys import owners_key, reserved_key
from producers.rq_queue import TIMEOUT_SECONDS, enqueue, in_no_list
from tests.factories import a_signal, a_snapshot, an_archive
from tests.unit.conftest import queue_of, sent_commands

_TIMES = ("created_at", "enqueued_at")
_OTHER_JOBS = ("job-1", "job-2", "job-3")


def _entries(tmp_path: Path, *payloads: Any) -> list[Entry]:
    outbox = Outbox(tmp_path / "outbox.db")
    outbox.append("trading-controller", payloads)
    return outbox.deliveries.pending(10)


def _enqueue(redis: fakeredis.FakeRedis, entries: list[Entry]) -> list[Any]:
    with redis.pipeline(transaction=True) as pipe:
        enqueue(pipe, queue_of(redis), entries)
        return pipe.execute()


def _facts(job: Job) -> dict[str, Any]:
    """Return all attributes of a job except its times."""
    facts = dict(vars(job)) | {"call": (job.func_name, job.args, job.kwargs), "status": job.get_status()}
    # Caches, and attributes of the connection.
    for name in ("connection", "_data", "_func_name", "_instance", "_args", "_kwargs", *_TIMES):
        facts.pop(name, None)
    return facts


@pytest.mark.parametrize(
    "payload", [a_snapshot(), an_archive(), an_archive(signals=[a_signal()] * 50)], ids=["snapshot", "archive", "large"]
)
def test_rq_reads_a_delivery_like_its_own_job(tmp_path: Path, redis: fakeredis.FakeRedis, payload: Any) -> None:
    """Each attribute of the fetched job equals that of a job which RQ has enqueued."""
    (entry,) = _entries(tmp_path, payload)
    _enqueue(redis, [entry])
    ours = Job.fetch(entry.job_id, connection=redis, serializer=JSONSerializer)
    redis.flushall()
    queue = Queue("history", connection=redis, serializer=JSONSerializer)
    queue.enqueue_many(
        [
            Queue.prepare_data(
                KINDS[entry.type].job_function,
                args=(entry.event,),
                job_id=entry.job_id,
                description=entry.summary,
                failure_ttl=-1,
                timeout=TIMEOUT_SECONDS,
            )
        ]
    )
    theirs = Job.fetch(entry.job_id, connection=redis, serializer=JSONSerializer)

    assert _facts(ours) == _facts(theirs)
    for name in _TIMES:
        assert abs((getattr(theirs, name) - getattr(ours, name)).total_seconds()) < 60


@pytest.mark.parametrize(("signals", "is_compressed"), [(1, False), (50, True)])
def test_a_large_event_is_compressed(
    tmp_path: Path, redis: fakeredis.FakeRedis, signals: int, is_compressed: bool
) -> None:
    """It takes less memory of Redis. RQ reads both forms; a small one stays readable for people."""
    (entry,) = _entries(tmp_path, an_archive(signals=[a_signal()] * signals))
    _enqueue(redis, [entry])
    data: Any = redis.hget(Job.key_for(entry.job_id), "data")
    assert (len(data) < len(entry.event) / 2) == is_compressed
    assert data.startswith(b'["consumers.handlers.record_signal_archive"') != is_compressed


def test_enqueue_writes_the_keys_of_rq(tmp_path: Path, redis: fakeredis.FakeRedis) -> None:
    """The queue is one of RQ's queues, its list has the ids in order, and the last reply is its length."""
    entries = _entries(tmp_path, a_snapshot(), an_archive())
    answers = _enqueue(redis, entries)

    assert Queue.all(connection=redis) == [queue_of(redis)]
    assert queue_of(redis).job_ids == [entry.job_id for entry in entries]
    assert answers[-1] == 2
    assert {redis.ttl(Job.key_for(entry.job_id)) for entry in entries} == {-1}


@pytest.mark.parametrize("registry", [FailedJobRegistry, FinishedJobRegistry])
def test_a_job_that_is_sent_again_is_like_a_new_job(tmp_path: Path, redis: fakeredis.FakeRedis, registry: Any) -> None:
    """It is in no registry and has no expiry, times or error of its first run."""
    (entry,) = _entries(tmp_path, a_snapshot())
    _enqueue(redis, [entry])
    first = Job.fetch(entry.job_id, connection=redis, serializer=JSONSerializer)
    ended = registry("history", connection=redis, serializer=JSONSerializer)
    redis.hset(first.key, mapping={"exc_info": "boom", "ended_at": "2026-01-01T00:00:00Z", "worker_name": "w"})
    first.set_status(JobStatus.FAILED)
    ended.add(first, -1)
    redis.expire(first.key, 500)
    redis.lpop(queue_of(redis).key)

    _enqueue(redis, [entry])

    again = Job.fetch(entry.job_id, connection=redis, serializer=JSONSerializer)
    assert (again.get_status(), again.ended_at, again.worker_name) == (JobStatus.QUEUED, None, None)
    assert not redis.hexists(first.key, "exc_info")
    assert (ended.count, redis.ttl(first.key)) == (0, -1)


@pytest.mark.parametrize("what", ["nothing", "taken", "taken by a stock worker", "finished"])
def test_a_job_that_is_reserved_or_finished_meanwhile_is_not_lost(
    tmp_path: Path, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """While the lists are read, a new owner reserves it, or a worker finishes it."""
    queue = queue_of(redis)
    with Outbox(tmp_path / "outbox.db") as outbox:
        outbox.append("trading-controller", [a_snapshot()])
        (entry,) = outbox.deliveries.pending(10)
    with redis.pipeline() as pipe:
        enqueue(pipe, queue, [entry])
        pipe.execute()
    redis.lpop(queue.key)
    if what == "taken by a stock worker":  # which has not started it yet
        redis.rpush(queue.intermediate_queue_key, *_OTHER_JOBS, entry.job_id)
    hkeys = redis.hkeys

    def meanwhile(name: str) -> Any:
        found = hkeys(name)
        if what == "taken":
            redis.hset(owners_key(queue.name), "new", "")
            redis.rpush(reserved_key(queue.name, "new"), entry.job_id)
        elif what == "finished":
            redis.hset(Job.key_for(entry.job_id), "status", "finished")
        return found

    monkeypatch.setattr(redis, "hkeys", meanwhile)
    assert in_no_list(redis, queue, [entry]) == ([entry] if what == "nothing" else [])


def test_all_lists_of_jobs_are_read_at_one_moment(
    tmp_path: Path, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one transaction of Redis: otherwise a job that moves from a list to one that was read before would be lost."""
    entries = _entries(tmp_path, a_snapshot())
    _enqueue(redis, entries)
    sent = sent_commands(redis, monkeypatch)
    in_no_list(redis, queue_of(redis), entries)
    (lists,) = [commands for commands in sent if b"LRANGE" in commands]
    assert lists.index(b"MULTI") < lists.index(b"HKEYS") < lists.index(b"LPOS") < lists.index(b"EXEC")


@pytest.mark.parametrize(
    ("place", "is_lost"),
    [("queue", False), ("reservation", False), ("started", False), ("started too long ago", True), ("no list", True)],
)
def test_a_job_is_lost_if_it_is_in_no_list_of_jobs(
    tmp_path: Path, redis: fakeredis.FakeRedis, place: str, is_lost: bool
) -> None:
    """Another job of the same batch is in the queue, and in no case lost."""
    queue = queue_of(redis)
    entries = _entries(tmp_path, a_snapshot(), an_archive())
    _enqueue(redis, entries)
    if place != "queue":
        redis.lpop(queue.key)
    if place == "reservation":
        redis.hset(owners_key(queue.name), "owner", "")
        redis.rpush(reserved_key(queue.name, "owner"), *_OTHER_JOBS, entries[0].job_id)
    elif place.startswith("started"):
        seconds = 60 if place == "started" else -60  # until a stock worker's job counts as abandoned
        redis.zadd(queue.started_job_registry.key, {f"{entries[0].job_id}:execution": redis.time()[0] + seconds})
    assert in_no_list(redis, queue, entries) == (entries[:1] if is_lost else [])
