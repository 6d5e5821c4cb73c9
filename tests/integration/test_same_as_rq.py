"""The same jobs leave the same data in Redis and PostgreSQL, whether RQ's worker or HistoryWorker runs them.

Times are compared as phases of the run, row ids as the event of the row. Lists name each allowed difference with its
reason. A difference in a list that no longer occurs makes a test fail too.
"""

from __future__ import annotations

import json
import re
import threading
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from rq import Callback, Queue, RateLimit, Repeat, Retry, SimpleWorker, Worker
from rq.exceptions import NoSuchJobError
from rq.job import Dependency, Job, JobStatus
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.operations import get_portfolio_history
from consumers.worker import completion
from consumers.worker.completion import KEPT_OF_A_BATCH
from consumers.worker.dependents import Dependents
from consumers.worker.history_worker import HistoryWorker
from producers.events import Payload, encode, event_of
from tests.factories import a_snapshot, an_archive
from tests.redis_state import EXPIRES, TYPE, Difference, Phases, State, error_fields, state_of, unexpected
from tests.rq_programs import WORKER_NAME, rq, rq_worker, somebody_waits_for_a_lock, until

SNAPSHOT_FUNCTION = "consumers.handlers.record_portfolio_snapshot"
ARCHIVE_FUNCTION = "consumers.handlers.record_signal_archive"
_REGISTRIES = ("finished", "failed", "started", "deferred", "scheduled", "canceled")
# First ids of the rows: no other number in Redis looks like them.
_FIRST_ROW = {"portfolio_history": 71_000_000_001, "signal_archives": 72_000_000_001}

_ONE_LINE = "the reason of a rejection is one readable line, without a traceback of our code"
_NO_RETRY = "an event is rejected at once; RQ uses the retries of its job in vain"
_NO_EXECUTION = "a reserved list and a lease replace RQ's executions"
_NOT_FAILED = "a job that succeeds leaves the failed registry; RQ removes it only if it was requeued"
_NO_GROUPS = "RQ's lock for the clean-up of groups; our jobs are in no group"
_BATCH = "it reserves many jobs at once in its own list, and marks no job as started"

_ORPHANS = "RQ does not search for jobs that are in no list; one of our workers does, once a minute"
ALLOWED_IN_REDIS = [
    Difference("rq:results:*", "* execution_id", "an id", None, _NO_EXECUTION),
    Difference("rq:results:*", "* exc_string form", "traceback", "1 line", _ONE_LINE),
    Difference("rq:failed:history", "rejected-then-sent-again", "during the run + 31536000 s", None, _NOT_FAILED),
    Difference("rq:job:retry-in-vain", "retries_left", "0", "2", _NO_RETRY),
    Difference("rq:job:retry-in-vain", "enqueued_at", "first work", "first enqueue", _NO_RETRY),
    Difference("rq:clean_groups", TYPE, "string", None, _NO_GROUPS),
    Difference("rq:clean_groups", EXPIRES, "first work + 599 s", None, _NO_GROUPS),
    Difference("rq:clean_groups", "(value)", "1", None, _NO_GROUPS),
    Difference("history:orphans:history:scanned", TYPE, None, "string", _ORPHANS),
    Difference("history:orphans:history:scanned", EXPIRES, None, "first work + 60 s", _ORPHANS),
    Difference("history:orphans:history:scanned", "(value)", None, "1", _ORPHANS),
]
ALLOWED_IN_READS = [
    Difference("job *", "exc_string form", "traceback", "1 line", _ONE_LINE),
    Difference("job rejected-then-sent-again", "in failed registry", "True", "False", _NOT_FAILED),
    Difference("registries", "failed", "11", "10", _NOT_FAILED),
    Difference("job retry-in-vain", "retries_left", "0", "2", _NO_RETRY),
    Difference("job retry-in-vain", "enqueued_at", "first work", "first enqueue", _NO_RETRY),
    Difference("worker after first work", "failed_job_count", "14", "12", _NO_RETRY),
]
ALLOWED_WHILE_RUNNING = [
    Difference("busy", "current job", "one", "None", _NO_EXECUTION),
    Difference("busy", "started", "1", "0", _BATCH),
    Difference("busy", "job one", "started the-worker", "queued None", _BATCH),
    Difference("busy", "job_ids", "['two']", "[]", _BATCH),
    Difference(
        "busy",
        "rq info, line 0",
        "history      |█ 1, 1 executing, 0 finished, 0 failed",
        "history      | 0, 0 executing, 0 finished, 0 failed",
        _BATCH,
    ),
    Difference("busy", "rq info, line 1", "1 queues, 1 jobs total", "1 queues, 0 jobs total", _BATCH),
]


def _queue(redis: Redis) -> Queue:
    return Queue("history", connection=redis, serializer=JSONSerializer)


@dataclass(frozen=True)
class Outcome:
    """The data that one worker left."""

    in_redis: State
    in_reads: State
    in_postgresql: list[str]


class _Run:
    """A run of one worker class with an empty Redis and empty tables."""

    def __init__(self, redis: Redis, worker_class: type[SimpleWorker]) -> None:
        self._redis = redis
        self._queue = _queue(redis)
        self._worker_class = worker_class
        self._phases = Phases()
        self._numbers = iter(range(1000))
        self._job_ids: set[str] = set()
        self._statistics: State = {}

    def outcome(self) -> Outcome:
        _empty(self._redis)
        with self._phases.phase("first enqueue"):
            self._enqueue_first()
        self._work("first work")
        with self._phases.phase("second enqueue"):
            self._enqueue_second()
        self._work("second work")
        events = _events_of_rows()
        in_redis = state_of(self._redis, self._phases)
        return Outcome(_named(in_redis, events), _named(self._reads(), events), _rows(events))

    def _work(self, phase: str) -> None:
        with self._phases.phase(phase):
            worker = self._worker_class([self._queue], WORKER_NAME, connection=self._redis, serializer=JSONSerializer)
            assert worker.work(burst=True, logging_level="CRITICAL") is True
        found = Worker.find_by_key(f"rq:worker:{WORKER_NAME}", connection=self._redis)
        assert found is not None
        statistics = {
            "state": found.get_state(),
            "successful_job_count": str(found.successful_job_count),
            "failed_job_count": str(found.failed_job_count),
            "total_working_time within the run": str(0 < found.total_working_time <= self._phases.seconds),
        }
        self._statistics |= {(f"worker after {phase}", name): value for name, value in statistics.items()}

    def _enqueue_first(self) -> None:
        """Enqueue one job of every kind."""
        self._send("snapshot", a_snapshot())
        self._send("archive", an_archive())
        self._send("duplicate", a_snapshot())
        self._send("conflict", a_snapshot(balance="1.00"))
        self._send("invalid", "{}")
        self._send("unreadable-source", '{"source": "other/1", "sequence": 999, "specversion": "0.3"}')
        self._send("result-ttl-0", _at(1), result_ttl=0)
        self._send("result-ttl-forever", _at(2), result_ttl=-1)
        self._send("result-ttl-900", _at(3), result_ttl=900)
        self._send("failure-ttl-700", "{}", failure_ttl=700)
        self._send("failure-ttl-forever", "{}", failure_ttl=-1)
        self._send("invalid-result-ttl-0", "{}", result_ttl=0)
        self._send("meta", _at(4), meta={"note": ["a", 1]}, description="written by a producer", job_timeout=77)
        self._send("meta-invalid", "{}", meta={"note": "b"})
        self._send("deleted", _at(5))
        self._redis.delete(Job.key_for("deleted"))
        self._send("retry-that-succeeds", _at(6), retry=Retry(max=2))
        self._send("retry-in-vain", "{}", retry=Retry(max=2))
        self._send("ttl", _at(7), ttl=3600, result_ttl=-1)
        self._send("ttl-invalid", "{}", ttl=3600, failure_ttl=-1)
        for job_id, hour in _SENT_TWICE.items():
            self._send(job_id, _at(hour))
        self._send("rejected-then-sent-again", "{}")
        self._send("rejected-then-relayed-again", "{}", failure_ttl=-1)
        self._send("rejected-then-requeued", a_snapshot(balance="2.00"))

    def _enqueue_second(self) -> None:
        """Enqueue deliveries again, with the same job ids, after they were stored or rejected."""
        self._send("stored-then-sent-again", _at(20))
        self._send("stored-then-sent-again-for-900-s", _at(21), result_ttl=900)
        self._send("stored-then-sent-again-for-ever", _at(22), result_ttl=-1)
        self._send("stored-then-discarded", _at(23), result_ttl=0)
        self._send("stored-then-rejected-for-ever", "{}", failure_ttl=-1)
        self._send("rejected-then-sent-again", _at(30))
        failed = self._queue.failed_job_registry
        self._redis.zrem(failed.key, "rejected-then-relayed-again")
        again = self._text(_at(31))
        self._queue.enqueue_many(
            [Queue.prepare_data(SNAPSHOT_FUNCTION, args=(again,), job_id="rejected-then-relayed-again", failure_ttl=-1)]
        )
        with get_db() as db:  # now the conflict is gone
            db.execute(text("DELETE FROM portfolio_history WHERE source = 'other/1' AND sequence = 0"))
        failed.requeue("rejected-then-requeued")

    def _send(self, job_id: str, event: Payload | str, **options: Any) -> None:
        self._job_ids.add(job_id)
        function = ARCHIVE_FUNCTION if job_id == "archive" else SNAPSHOT_FUNCTION
        self._queue.enqueue(function, self._text(event), job_id=job_id, **options)

    def _text(self, event: Payload | str) -> str:
        return (
            event if isinstance(event, str) else encode(event_of(event, source="other/1", sequence=next(self._numbers)))
        )

    def _reads(self) -> State:
        """Return everything that RQ's interface returns about jobs, registries and workers."""
        failed = self._queue.failed_job_registry.get_job_ids()
        reads = self._statistics | _registries(self._queue)
        for job_id in self._job_ids:
            reads |= {(f"job {job_id}", name): value for name, value in self._job(job_id).items()}
            reads[f"job {job_id}", "in failed registry"] = str(job_id in failed)
        reads["workers", "all"] = str([worker.name for worker in Worker.all(connection=self._redis)])
        return reads

    def _job(self, job_id: str) -> dict[str, str]:
        try:
            job = Job.fetch(job_id, connection=self._redis, serializer=JSONSerializer)
        except NoSuchJobError:
            return {"fetch": "no such job"}
        result = job.latest_result()
        times = {"enqueued_at": job.enqueued_at, "started_at": job.started_at, "ended_at": job.ended_at}
        known = [at for at in times.values() if at is not None]
        return {
            "status": job.get_status().value,
            "flags": str((job.is_failed, job.is_finished, job.is_queued, job.is_started)),
            "return_value": str(job.return_value()),
            "result": f"{result.type.name} {result.return_value}" if result else "none",
            "results": str(len(job.results())),
            "in order": str(known == sorted(known)),
            "meta": json.dumps(job.meta),
            "worker_name": str(job.worker_name),
            "retries_left": str(job.retries_left),
            **{name: self._phases.of(at.timestamp() * 1000) if at else "none" for name, at in times.items()},
            **(error_fields("exc_string", result.exc_string) if result and result.exc_string else {}),
        }


_SENT_TWICE = {
    "stored-then-sent-again": 20,
    "stored-then-sent-again-for-900-s": 21,
    "stored-then-sent-again-for-ever": 22,
    "stored-then-discarded": 23,
    "stored-then-rejected-for-ever": 24,
}


def _at(hours: int) -> Payload:
    return a_snapshot(after=timedelta(hours=hours))


def _empty(redis: Redis) -> None:
    """Empty Redis and the tables, and let row ids begin at numbers that nothing else looks like."""
    redis.flushall()
    with get_db() as db:
        db.execute(text("TRUNCATE portfolio_history, signal_archives, event_outcomes"))
        for table, first in _FIRST_ROW.items():
            db.execute(text(f"ALTER TABLE {table} ALTER COLUMN id RESTART WITH {first}"))


def _events_of_rows() -> dict[str, str]:
    """Return the event of each row id. The ids themselves may differ between runs, since a sequence may have gaps."""
    with get_db() as db:
        return {
            str(row_id): f"row of {event_id}"
            for table in _FIRST_ROW
            for row_id, event_id in db.execute(text(f"SELECT id, event_id FROM {table}"))
        }


def _with_events(value: str, events: dict[str, str]) -> str:
    return re.sub(r"\b7[12]00000\d{4}\b", lambda found: events.get(found[0], "a deleted row"), value)


def _named(state: State, events: dict[str, str]) -> State:
    return {place: _with_events(value, events) for place, value in state.items()}


def _rows(events: dict[str, str]) -> list[str]:
    """Return every row of every table, without its id and the time when it was written."""
    rows = []
    with get_db() as db:
        for table in (*_FIRST_ROW, "event_outcomes"):
            found = db.execute(text(f"SELECT (to_jsonb(t) - 'id' - 'created_at')::text FROM {table} t"))
            rows += [f"{table} {_with_events(row, events)}" for row in found.scalars()]
    return sorted(rows)


def _registries(queue: Queue) -> State:
    counts = {name: str(getattr(queue, f"{name}_job_registry").count) for name in _REGISTRIES}
    return {("registries", name): count for name, count in counts.items()} | {("queue", "job_ids"): str(queue.job_ids)}


@pytest.fixture(scope="module")
def made() -> list[Outcome]:
    """Outcomes of both workers, made by the first test that needs them; no test changes them."""
    return []


@pytest.fixture
def outcomes(redis: Redis, database_url: str, made: list[Outcome]) -> list[Outcome]:
    """Return the outcomes of RQ's worker and of HistoryWorker."""
    if not made:
        made += [_Run(redis, worker_class).outcome() for worker_class in (SimpleWorker, HistoryWorker)]
    return made


def test_an_allowed_difference_must_occur_in_each_place_and_exactly_so() -> None:
    """Otherwise the lists would allow differences that nobody has seen."""
    allowed = [Difference("job *", "status", "finished", "failed", "the reason")]
    differing, same = {("job 1", "status"): "finished"}, {("job 2", "status"): "finished"}

    assert unexpected(differing, {("job 1", "status"): "failed"}, allowed) == {}
    assert unexpected(differing, {("job 1", "status"): "queued"}, allowed) == {
        ("job 1", "status"): ("finished", "queued")
    }
    assert unexpected(differing | same, {("job 1", "status"): "failed"} | same, allowed) == {
        ("job 2", "status"): ("finished", "finished")
    }
    assert unexpected({}, {}, allowed) == {("job *", "status"): "does not occur: the reason"}


def test_every_key_in_redis_equals_that_of_rqs_worker(outcomes: list[Outcome]) -> None:
    """Keys, types, expiries, fields, members, scores and stream entries are equal, except for allowed differences."""
    rq_outcome, our_outcome = outcomes

    assert unexpected(rq_outcome.in_redis, our_outcome.in_redis, ALLOWED_IN_REDIS) == {}


def test_every_read_through_rqs_interface_returns_the_same(outcomes: list[Outcome]) -> None:
    """Jobs, results, registries and the statistics of workers are equal, except for allowed differences."""
    rq_outcome, our_outcome = outcomes

    assert unexpected(rq_outcome.in_reads, our_outcome.in_reads, ALLOWED_IN_READS) == {}


def test_the_rows_in_postgresql_are_the_same(outcomes: list[Outcome]) -> None:
    """Events and outcomes are equal, without exception."""
    rq_outcome, our_outcome = outcomes

    assert rq_outcome.in_postgresql == our_outcome.in_postgresql


_WATCHED = ("one", "two")


def _watched(redis: Redis, worker_class: str, log: Path) -> State:
    """Return the visible state of one worker process while it is idle, busy and idle again, and after its end."""
    _empty(redis)
    queue = _queue(redis)
    with rq_worker(worker_class, log) as process:
        until(lambda: _worker_states(redis) == ["idle"])
        seen = _seen(redis, "idle")
        with get_db() as db:
            db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
            events = {
                job_id: event_of(_at(hour), source="other/1", sequence=hour) for hour, job_id in enumerate(_WATCHED)
            }
            queue.enqueue_many(
                [
                    Queue.prepare_data(SNAPSHOT_FUNCTION, (encode(event),), job_id=job_id)
                    for job_id, event in events.items()
                ]
            )
            until(somebody_waits_for_a_lock)
            seen |= _seen(redis, "busy")
        until(lambda: queue.finished_job_registry.count == 2 and _worker_states(redis) == ["idle"])
        seen |= _seen(redis, "idle again")
        process.terminate()
        assert process.wait(20) == 0
    return seen | _seen(redis, "gone")


def _worker_states(redis: Redis) -> list[str]:
    return [worker.get_state() for worker in Worker.all(connection=redis)]


def _seen(redis: Redis, when: str) -> State:
    seen = {field: value for (_, field), value in _registries(_queue(redis)).items()}
    for worker in Worker.all(connection=redis):
        seen["worker"] = f"{worker.name} {worker.get_state()} on {worker.queue_names()}"
        seen["jobs done"] = f"{worker.successful_job_count} {worker.failed_job_count}"
        seen["current job"] = str(worker.get_current_job_id())
    for job_id in _WATCHED:
        if redis.exists(Job.key_for(job_id)):
            job = Job.fetch(job_id, connection=redis, serializer=JSONSerializer)
            seen[f"job {job_id}"] = f"{job.get_status().value} {job.worker_name}"
    for number, line in enumerate(rq("info").splitlines() if when in ("idle", "busy") else []):
        shown = re.sub(r"\(\S+ \S+ \d+\)", "(where it runs)", line)
        seen[f"rq info, line {number}"] = re.sub("Updated: .*", "Updated: now", shown)
    return {(when, what): value for what, value in seen.items()}


def test_a_running_worker_looks_like_rqs_own_worker(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """Worker.all(), the states of jobs and `rq info` are equal while it is idle, busy and gone, except as allowed."""
    rq_seen = _watched(redis, "rq.SimpleWorker", tmp_path / "rq.log")
    our_seen = _watched(redis, "consumers.worker.HistoryWorker", tmp_path / "our.log")

    assert unexpected(rq_seen, our_seen, ALLOWED_WHILE_RUNNING) == {}


@pytest.mark.parametrize("others", [0, 2 * KEPT_OF_A_BATCH])
@pytest.mark.parametrize("worker_class", [SimpleWorker, HistoryWorker])
@pytest.mark.parametrize("options", [{}, {"result_ttl": 0}])
def test_dependents_of_a_stored_event_run(
    redis: Redis, database_url: str, options: dict[str, Any], worker_class: type[SimpleWorker], others: int
) -> None:
    """Also if the job itself is not kept: because of its result_ttl, or since many other jobs finish after it."""
    queue = _queue(redis)
    texts = iter([encode(event_of(_at(hour), source="other/1", sequence=hour)) for hour in range(2 + others)])
    first = queue.enqueue(SNAPSHOT_FUNCTION, next(texts), job_id="first", **options)
    queue.enqueue(SNAPSHOT_FUNCTION, next(texts), job_id="dependent", depends_on=first)
    for _ in range(others):
        queue.enqueue(SNAPSHOT_FUNCTION, next(texts))
    worker_class([queue], connection=redis, serializer=JSONSerializer).work(burst=True, logging_level="CRITICAL")

    dependent = Job.fetch("dependent", connection=redis, serializer=JSONSerializer)
    assert (dependent.get_status(), len(dependent.results())) == ("finished", 1)
    assert queue.deferred_job_registry.count == 0
    assert redis.ttl(first.key) <= 600  # with a result_ttl of 0, RQ's worker deletes it at once


@pytest.mark.parametrize("allow_failure", [True, False])
@pytest.mark.parametrize("worker_class", [SimpleWorker, HistoryWorker])
def test_dependents_of_a_rejected_event_run_if_they_allow_its_failure(
    redis: Redis, database_url: str, worker_class: type[SimpleWorker], allow_failure: bool
) -> None:
    """RQ decides that. Other dependents stay deferred until the rejected job is requeued and succeeds."""
    queue = _queue(redis)
    rejected = queue.enqueue(SNAPSHOT_FUNCTION, "{}")
    text_of_event = encode(event_of(_at(1), source="other/1", sequence=1))
    dependency = Dependency([rejected], allow_failure=allow_failure)
    dependent = queue.enqueue(SNAPSHOT_FUNCTION, text_of_event, depends_on=dependency)
    worker_class([queue], connection=redis, serializer=JSONSerializer).work(burst=True, logging_level="CRITICAL")

    assert dependent.get_status() == ("finished" if allow_failure else "deferred")
    assert redis.keys("history:reserved:*") == []


@pytest.mark.parametrize(
    "problem", ["repeats too", "failure_ttl 0", "no data", "dependents of another type", "deleted"]
)
def test_a_slot_of_a_rate_limit_is_freed_however_its_job_ends(redis: Redis, database_url: str, problem: str) -> None:
    """The other jobs of the rate limit get the slot, and are rejected too."""
    queue = _queue(redis)
    texts = [encode(event_of(_at(hour), source="other/1", sequence=hour)) for hour in range(3)]
    options: dict[str, Any] = {"repeat": Repeat(times=2, interval=1)} if problem == "repeats too" else {}
    options |= {"failure_ttl": 0} if problem == "failure_ttl 0" else {}
    limit = RateLimit("one at a time", 1)
    first, *others = (
        queue.enqueue(SNAPSHOT_FUNCTION, one, rate_limit=limit, **(options if n == 0 else {}))
        for n, one in enumerate(texts)
    )
    if problem == "no data":
        redis.hdel(first.key, "data")
    elif problem == "dependents of another type":
        redis.set(Job.dependents_key_for(first.id), "x")
    elif problem == "deleted":
        redis.delete(first.key)
    worker = HistoryWorker([queue], connection=redis)
    for _ in range(4):  # each run begins with maintenance
        worker.work(burst=True, logging_level="CRITICAL")
        worker = HistoryWorker([queue], connection=redis)
    assert {job.get_status() for job in others} == {"failed"}


@pytest.mark.parametrize("failure_ttl", [0, 1])
def test_dependents_of_a_rejected_job_that_expires_at_once_run(
    redis: Redis, database_url: str, failure_ttl: int
) -> None:
    """The job is kept until RQ has enqueued its dependents."""
    queue = _queue(redis)
    rejected = queue.enqueue(SNAPSHOT_FUNCTION, "{}", failure_ttl=failure_ttl)
    text_of_event = encode(event_of(_at(1), source="other/1", sequence=1))
    dependent = queue.enqueue(SNAPSHOT_FUNCTION, text_of_event, depends_on=Dependency([rejected], allow_failure=True))
    HistoryWorker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
    assert dependent.get_status() == "finished"


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"repeat": Repeat(times=1)}, "repetitions"),
        ({"rate_limit": RateLimit("one at a time", 1)}, "a rate limit"),
        ({"on_success": Callback("builtins.print")}, "a callback"),
    ],
)
def test_a_job_that_asks_rq_for_more_is_unsupported_with_a_reason(
    redis: Redis, database_url: str, options: dict[str, Any], feature: str
) -> None:
    """The other jobs of its rate limit get their slots, and are rejected too."""
    queue = _queue(redis)
    texts = [encode(event_of(_at(hour), source="other/1", sequence=hour)) for hour in range(3)]
    jobs = [queue.enqueue(SNAPSHOT_FUNCTION, text_of_event, **options) for text_of_event in texts]
    HistoryWorker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")

    assert sorted(queue.failed_job_registry.get_job_ids()) == sorted(job.id for job in jobs)
    with get_db() as db:
        reasons = db.execute(text("SELECT DISTINCT reason FROM event_outcomes")).scalars().all()
    assert reasons == [f"unsupported job: it asks RQ for {feature}, which is not supported"]
    assert (queue.count, redis.keys("history:reserved:*")) == (0, [])


@pytest.mark.parametrize("others", [0, 2 * KEPT_OF_A_BATCH])
@pytest.mark.parametrize("worker_class", [SimpleWorker, HistoryWorker])
def test_a_dependent_that_is_added_while_its_job_runs_is_enqueued_too(
    redis: Redis, database_url: str, worker_class: type[SimpleWorker], others: int
) -> None:
    """The job had no dependents when it was reserved. The keys that link both jobs expire with them."""
    queue = _queue(redis)
    texts = iter([encode(event_of(_at(hour), source="other/1", sequence=hour)) for hour in range(2 + others)])
    first = queue.enqueue(SNAPSHOT_FUNCTION, next(texts))
    for _ in range(others):
        queue.enqueue(SNAPSHOT_FUNCTION, next(texts))
    worker = worker_class([queue], connection=redis, serializer=JSONSerializer)
    working = threading.Thread(target=lambda: worker.work(burst=True, logging_level="CRITICAL"))
    with get_db() as db, pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_class, "_install_signal_handlers", lambda _: None)  # only the main thread can
        patch.setattr(SimpleWorker, "death_penalty_class", TimerDeathPenalty)  # it uses signals too
        db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
        working.start()
        until(somebody_waits_for_a_lock)
        dependent = queue.enqueue(SNAPSHOT_FUNCTION, next(texts), depends_on=first)
        db.rollback()
        working.join(30)
    assert dependent.get_status() == "finished"
    assert redis.ttl(dependent.key) > 0
    assert [key for key in redis.keys("rq:job:*depend*") if redis.ttl(key) < 0] == []


def test_a_dependent_whose_data_is_not_compressed_is_enqueued(redis: Redis, database_url: str) -> None:
    """RQ reads it as it is. The dependent is a pickled job of another program."""
    queue, other = _queue(redis), Queue("other", connection=redis)
    first = queue.enqueue(SNAPSHOT_FUNCTION, encode(event_of(_at(1), source="other/1", sequence=1)))
    dependent = other.enqueue("another.program", depends_on=first)
    data: Any = redis.hget(dependent.key, "data")
    pickled = zlib.decompress(data)
    redis.hset(dependent.key, "data", pickled)
    HistoryWorker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
    assert other.get_job_ids() == [dependent.id]
    data = redis.hget(dependent.key, "data")
    assert zlib.decompress(data) == pickled


def test_dependents_run_although_redis_fails_before_rq_enqueues_them(
    redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The completed job stays reserved, and is completed again."""
    queue = _queue(redis)
    texts = iter([encode(event_of(_at(hour), source="other/1", sequence=hour)) for hour in range(9)])
    first = queue.enqueue(SNAPSHOT_FUNCTION, next(texts), result_ttl=0)
    dependents = [queue.enqueue(SNAPSHOT_FUNCTION, next(texts), depends_on=first) for _ in range(2)]
    enqueue, failures = Dependents.enqueue, list[int]()

    def fail_twice(self: Dependents, job_id: str) -> None:
        if len(failures) < 2:
            failures.append(1)
            raise RedisConnectionError("connection lost")
        enqueue(self, job_id)

    monkeypatch.setattr(Dependents, "enqueue", fail_twice)
    HistoryWorker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
    assert {job.get_status() for job in dependents} == {"finished"}
    assert redis.keys("history:reserved:*") == []


def test_jobs_that_rq_left_between_deferred_and_queued_run(redis: Redis, database_url: str) -> None:
    """This state follows a crash of the process that moved them."""
    queue = _queue(redis)
    job = queue.create_job(SNAPSHOT_FUNCTION, (encode(event_of(_at(1), source="other/1", sequence=1)),))
    job.save()
    job.set_status(JobStatus.READY_TO_ENQUEUE)
    redis.zadd(queue.ready_job_registry.key, {job.id: 2})
    HistoryWorker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
    assert job.get_status() == "finished"


def test_an_unusable_registry_of_ready_jobs_does_not_prevent_storing(redis: Redis, database_url: str) -> None:
    """A job that waits for another one keeps waiting; the event of the other job is stored."""
    queue = _queue(redis)
    first = queue.enqueue(SNAPSHOT_FUNCTION, encode(event_of(_at(1), source="other/1", sequence=1)))
    waiting = queue.enqueue(SNAPSHOT_FUNCTION, encode(event_of(_at(2), source="other/1", sequence=2)), depends_on=first)
    redis.set(queue.ready_job_registry.key, "x")
    HistoryWorker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
    assert (first.get_status(), waiting.get_status()) == ("finished", "ready_to_enqueue")
    assert redis.keys("history:reserved:*") == []


def test_a_finished_job_is_not_deleted_before_its_dependents_are_enqueued(
    redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if more jobs finish than are kept, and the others have a longer result_ttl."""
    monkeypatch.setattr(completion, "KEPT_FINISHED_JOBS", 1)
    queue = _queue(redis)
    texts = iter([encode(event_of(_at(hour), source="other/1", sequence=hour)) for hour in range(6)])
    first = queue.enqueue(SNAPSHOT_FUNCTION, next(texts), result_ttl=1)
    dependent = queue.enqueue(SNAPSHOT_FUNCTION, next(texts), depends_on=first)
    for _ in range(4):
        queue.enqueue(SNAPSHOT_FUNCTION, next(texts))
    HistoryWorker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
    assert len(get_portfolio_history()) == 6
    assert dependent.id not in queue.deferred_job_registry.get_job_ids()
