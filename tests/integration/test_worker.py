"""HistoryWorker on real servers: nothing is lost when it dies, and it waits when a server is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import BusyLoadingError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import Queue
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import as_text
from sqlalchemy import text

from consumers.db.engine import create_store_engine, engine, get_db
from consumers.db.inserts import insert_events
from consumers.db.schema import apply_schema
from consumers.operations import get_portfolio_history
from consumers.ops.queue_health import read_queue
from consumers.worker import batch, completion, maintenance, orphans
from consumers.worker import history_worker as worker_module
from consumers.worker import worker_thread as thread_module
from consumers.worker.batch import process_batch
from consumers.worker.completion import Completion
from consumers.worker.deliveries import POISON_CRASHES
from consumers.worker.history_worker import HistoryWorker
from consumers.worker.orphans import Orphans
from consumers.worker.reservations import LEASE_SECONDS, Reservations, requeue_expired
from consumers.worker.worker_thread import WorkerThread
from producers.errors import SettingsError
from producers.events import encode, event_of
from producers.history_producer import HistoryProducer
from producers.redis_keys import orphans_key
from tests.deliveries import burst, enqueue_snapshots, history_queue
from tests.factories import a_signal, a_snapshot, an_archive
from tests.faults.proxy import Proxy
from tests.legacy_databases import OUTCOMES_BEFORE_DUPLICATE
from tests.rq_programs import somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")


def _batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many deliveries each transaction was tried with from now on."""
    together, sizes = batch._process_together, []

    def counted(deliveries: Any, statement_seconds: Any) -> Any:
        sizes.append(len(deliveries))
        return together(deliveries, statement_seconds)

    monkeypatch.setattr(batch, "_process_together", counted)
    return sizes


def _outcomes() -> list[tuple[Any, ...]]:
    with get_db() as db:
        return [tuple(row) for row in db.execute(text("SELECT job_id, outcome, reason FROM event_outcomes ORDER BY 1"))]


@contextmanager
def _worker_process(**environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """RQ's own command with our worker class, as an operator starts it."""
    command = [sys.executable, "-m", "rq.cli", "worker", "--url", os.environ["REDIS_URL"]]
    process = subprocess.Popen(
        [*command, "--worker-class", "consumers.worker.HistoryWorker", "history"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_burst_stores_everything_and_leaves_nothing_behind(redis: Redis) -> None:
    """No reserved list, no lease, no owner, no worker; jobs are finished and have the row's id, in their order."""
    job_ids = enqueue_snapshots(redis, completion.KEPT_OF_A_BATCH)
    burst(redis)

    rows = {row["sequence"]: row["id"] for row in get_portfolio_history()}
    jobs = [Job.fetch(job_id, connection=redis, serializer=JSONSerializer) for job_id in job_ids]
    assert {job.get_status() for job in jobs} == {"finished"}
    assert [job.return_value() for job in jobs] == [rows[sequence] for sequence in range(len(jobs))]
    assert [rows[sequence] for sequence in range(len(jobs))] == list(range(1, len(jobs) + 1))
    assert history_queue(redis).finished_job_registry.count == len(jobs)
    assert {as_text(key).split(":")[1] for key in redis.keys("history:*")} == {"ack", "orphans"}
    assert redis.ttl("history:orphans:history:scanned") > 0
    assert redis.keys("rq:workers:history") == []


def test_the_number_of_finished_jobs_that_are_kept_is_bounded(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number: the last ones of a batch and the last ones of all, results included; nothing else of them stays."""
    monkeypatch.setattr(completion, "KEPT_OF_A_BATCH", 20)
    monkeypatch.setattr(completion, "KEPT_FINISHED_JOBS", 30)
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 50)
    job_ids = enqueue_snapshots(redis, 200)
    burst(redis)

    assert history_queue(redis).finished_job_registry.count == 30
    assert len(redis.keys("rq:job:*")) == len(redis.keys("rq:results:*")) == 30
    kept = {as_text(key).removeprefix("rq:job:") for key in redis.keys("rq:job:*")}
    assert kept <= {job_id for start in range(30, 200, 50) for job_id in job_ids[start : start + 20]}
    assert len(get_portfolio_history()) == 200


def test_many_finished_jobs_of_another_worker_are_dropped_in_parts(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's own worker bounds them by time alone; more than one script could name at once are there then."""
    monkeypatch.setattr(completion, "KEPT_FINISHED_JOBS", 30)
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 20)
    registry = history_queue(redis).finished_job_registry
    with redis.pipeline(transaction=False) as pipe:
        for number in range(9000):
            pipe.hset(f"rq:job:theirs-{number}", mapping={"status": "finished"})
            pipe.zadd(registry.key, {f"theirs-{number}": time.time() + 100})
        pipe.execute()
    enqueue_snapshots(redis, 200)
    burst(redis)

    assert registry.count == len(redis.keys("rq:job:*")) == 30
    assert redis.keys("rq:job:theirs-*") == []
    assert len(get_portfolio_history()) == 200


def test_redis_keeps_no_more_after_more_events(
    producer: HistoryProducer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last finished jobs a hash and a result each; no acknowledgement, no trace of the others."""
    monkeypatch.setattr(completion, "KEPT_OF_A_BATCH", 20)
    monkeypatch.setattr(completion, "KEPT_FINISHED_JOBS", 30)
    for round_ in range(2):
        receipts = producer.record_many([a_snapshot(after=timedelta(seconds=100 * round_ + n)) for n in range(100)])
        producer.flush(20)
        burst(redis)
        receipts[-1].wait(20)
        until(lambda: redis.keys("history:ack:*") == [])
        kinds = Counter(as_text(key).rsplit(":", 1)[0] for key in redis.keys("*"))
        jobs = kinds.pop("rq:job")
        assert kinds.pop("rq:results") == redis.zcard("rq:finished:history") == jobs <= 30
        assert redis.keys("history:reserved:*") == []
        assert kinds.total() < 10


def test_one_bad_event_in_a_batch_costs_only_itself(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the database refuses is found by halving: 1 of 300 takes some 20 transactions, not 300."""
    job_ids = enqueue_snapshots(redis, 300)
    with get_db() as db:
        db.execute(text("ALTER TABLE portfolio_history ADD CONSTRAINT unlucky CHECK (sequence <> 77)"))
    sizes = _batch_sizes(monkeypatch)
    burst(redis)

    ((job_id, outcome, reason),) = _outcomes()
    assert (job_id, outcome) == (job_ids[77], "rejected")
    assert reason.startswith("PostgreSQL refused the values: ")
    assert reason.endswith("(SQLSTATE 23514)")
    assert len(get_portfolio_history()) == 299
    assert len(sizes) < 25


def test_a_batch_may_have_the_same_fact_and_the_same_job_twice(redis: Redis) -> None:
    """One row; another delivery of the fact is a duplicate, another content refused, the same delivery is its row's."""
    first, same, other = (
        encode(event_of(a_snapshot(balance=balance), source=f"other/{n}", sequence=7))
        for n, balance in enumerate((1, 1, 2))
    )
    for job_id, event in (("first", first), ("same", same), ("other", other), ("first", first)):
        history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", event, job_id=job_id)
    burst(redis)

    (row,) = get_portfolio_history()
    assert (row["source"], row["balance"]) == ("other/0", 1.0)
    assert [(job_id, outcome) for job_id, outcome, _ in _outcomes()] == [("other", "rejected"), ("same", "duplicate")]
    values = [as_text(value) for key in (0, 1) for value in redis.hvals(f"history:ack:other/{key}")]
    assert {value.rpartition(" ")[2] for value in values} == {f"duplicate:{row['id']}"}
    assert redis.keys("history:reserved:*") == []


def test_two_workers_with_the_same_facts_in_opposite_order_do_not_lock_each_other_out(redis: Redis) -> None:
    """Rows go in sorted: no deadlock, and each fact is one row."""
    events = [event_of(a_snapshot(after=timedelta(n)), source="other/1", sequence=n) for n in range(500)]
    engine().dispose()
    barrier = threading.Barrier(2)

    def insert(chosen: list[Any]) -> None:
        for start in range(0, 500, 100):
            barrier.wait(10)
            with get_db() as db:
                insert_events(db, chosen[start : start + 100])

    halves = [events, [event for at in range(0, 500, 100) for event in reversed(events[at : at + 100])]]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(insert, halves))
    assert len(get_portfolio_history()) == 500


def test_only_one_queue_and_a_tested_rq_are_accepted(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it does not start, and says what to do instead."""
    with pytest.raises(SettingsError, match="exactly one queue"):
        HistoryWorker(["history", "other"], connection=redis)
    monkeypatch.setattr(worker_module, "VERSION", "3.9.1")
    with pytest.raises(SettingsError, match=r"tested with RQ 3\.0, this is 3\.9\.1: use RQ's own worker"):
        HistoryWorker(["history"], connection=redis)


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("os.system", ["touch pwned"], "refused: it names a function that is not one of ours"),
        ("consumers.handlers.record_portfolio_snapshot", [], "refused: it must have one argument, the event's text"),
        ("consumers.handlers.record_portfolio_snapshot", ["{}"], "specversion: is missing"),
    ],
)
def test_a_job_that_is_no_delivery_is_rejected_and_the_rest_is_stored(
    redis: Redis, function: str, arguments: list[str], reason: str
) -> None:
    """The reason is the first line of what RQ shows, and stands in event_outcomes."""
    refused = history_queue(redis).enqueue(function, *arguments)
    enqueue_snapshots(redis, 2)
    burst(redis)

    ((job_id, outcome, recorded),) = _outcomes()
    assert (job_id, outcome) == (refused.id, "rejected")
    assert str(recorded).startswith(reason)
    result = refused.latest_result()
    assert result is not None
    assert str(recorded) in str(result.exc_string).splitlines()[0]
    assert history_queue(redis).failed_job_registry.get_job_ids() == [refused.id]
    assert len(get_portfolio_history()) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("status", "zzz"), ("created_at", "garbage"), ("timeout", "abc"), ("description", b"\xff")]
)
def test_an_event_is_stored_although_other_fields_of_its_job_are_unreadable(
    redis: Redis, field: str, value: Any
) -> None:
    """Only the data of a job is of interest: the event is stored, and so is the rest."""
    job_ids = enqueue_snapshots(redis, 3)
    redis.hset(Job.key_for(job_ids[1]), field, value)
    burst(redis)

    assert (_outcomes(), len(get_portfolio_history())) == ([], 3)


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", "abc"), ("result_ttl", "abc"), ("created_at", "x"), ("webhooks", "x")]
)
def test_a_job_that_is_both_unreadable_and_refused_does_not_stop_the_others(
    redis: Redis, field: str, value: str
) -> None:
    """Its failure cannot be written into it; its event is recorded all the same."""
    refused = history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", "{}")
    redis.hset(refused.key, field, value)
    enqueue_snapshots(redis, 2)
    burst(redis)

    assert [(job_id, outcome) for job_id, outcome, _ in _outcomes()] == [(refused.id, "rejected")]
    assert history_queue(redis).failed_job_registry.get_job_ids() == [refused.id]
    assert len(get_portfolio_history()) == 2


def test_max_jobs_may_be_more_than_a_batch(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after as many, in batches of the usual size."""
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 10)
    enqueue_snapshots(redis, 40)
    sizes = _batch_sizes(monkeypatch)
    HistoryWorker([history_queue(redis)], connection=redis).work(logging_level="WARNING", max_jobs=25)

    assert (sizes, history_queue(redis).count) == ([10, 10, 5], 15)


@pytest.mark.parametrize("field", ["created_at", "timeout", "status"])
def test_a_job_that_cannot_be_read_is_refused_and_stops_nobody(redis: Redis, field: str) -> None:
    """Without data, whatever else somebody has done to its hash: recorded, failed, and the rest goes on."""
    job_ids = enqueue_snapshots(redis, 3)
    redis.hset(Job.key_for(job_ids[1]), field, "garbage")
    redis.hdel(Job.key_for(job_ids[1]), "data")
    burst(redis)

    assert _outcomes() == [(job_ids[1], "rejected", "refused: its job cannot be read")]
    assert len(get_portfolio_history()) == 2
    assert history_queue(redis).failed_job_registry.get_job_ids() == [job_ids[1]]


def test_a_job_that_is_no_hash_is_refused_too(redis: Redis) -> None:
    """A string in the place of the job."""
    job_ids = enqueue_snapshots(redis, 2)
    redis.delete(Job.key_for(job_ids[0]))
    redis.set(Job.key_for(job_ids[0]), "not a hash")
    burst(redis)

    assert [job_id for job_id, _, _ in _outcomes()] == job_ids[:1]
    assert len(get_portfolio_history()) == 1


def test_an_error_that_is_redis_own_refuses_no_event(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is still loading answers each command with an error: that is an outage, not a bad job."""
    refused = history_queue(redis).enqueue("os.system", "true")
    enqueue_snapshots(redis, 1)
    read, loading = Completion._failed, [True]

    def still_loading(*args: Any) -> Any:
        if loading:
            loading.clear()
            raise BusyLoadingError("LOADING")
        return read(*args)

    monkeypatch.setattr(Completion, "_failed", still_loading)
    HistoryWorker([history_queue(redis)], connection=redis).work(burst=True, logging_level="WARNING")

    assert _outcome_ids() == history_queue(redis).failed_job_registry.get_job_ids() == [refused.id]
    assert len(get_portfolio_history()) == 1


def test_the_lease_is_renewed_until_the_reservations_are_released(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of a batch: no other worker may take its jobs until the batch has ended."""
    enqueue_snapshots(redis, 3)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    leases = []

    def stopped_meanwhile(deliveries: Any, statement_seconds: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        redis.delete(*redis.keys("history:lease:*") or ["none"])
        deadline = time.monotonic() + 10
        while not redis.keys("history:lease:*") and time.monotonic() < deadline:
            time.sleep(0.02)
        leases.append(bool(redis.keys("history:lease:*")))  # of this thread, or of both
        return process_batch(deliveries)

    monkeypatch.setattr(worker_module, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(thread_module, "process_batch", stopped_meanwhile)
    worker.work(burst=True, logging_level="WARNING")

    assert leases == [True]
    assert len(get_portfolio_history()) == 3


def test_a_worker_that_is_stuck_loses_its_lease(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress for long: others may take over what it holds, though its process lives."""
    enqueue_snapshots(redis, 1)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    found: list[Any] = []

    def stuck(deliveries: Any, statement_seconds: Any) -> Any:
        time.sleep(0.4)  # beyond what counts as stuck
        redis.delete(*redis.keys("history:lease:*"))
        time.sleep(0.4)  # several renewals, if there were any
        found.append((redis.keys("history:lease:*"), requeue_expired(redis, history_queue(redis))))
        return process_batch(deliveries)

    monkeypatch.setattr(worker_module, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "_STUCK_SECONDS", 0.2)
    monkeypatch.setattr(thread_module, "process_batch", stuck)
    job_ids = history_queue(redis).job_ids
    worker.work(burst=True, logging_level="WARNING", max_jobs=1)

    assert found == [([], job_ids)]
    assert len(get_portfolio_history()) == 1


def test_a_poison_candidate_that_times_out_does_not_delay_the_others(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes alone, and goes to the tail alone."""
    monkeypatch.setattr(worker_module, "STATEMENT_SECONDS", 0.3)
    job_ids = enqueue_snapshots(redis, 3)
    redis.hset("history:crashes:history", job_ids[0], 0)
    administrator = create_store_engine(SecretStr(os.environ["DATABASE_URL"]))
    with administrator.connect() as db:
        insert_events(db, [event_of(a_snapshot(), source="other/1", sequence=0)])
        HistoryWorker([history_queue(redis)], connection=redis).work(logging_level="WARNING", max_jobs=2)
        assert len(get_portfolio_history()) == 2
        db.rollback()
    administrator.dispose()
    burst(redis)

    assert len(get_portfolio_history()) == 3


def test_pickled_data_is_never_unpickled(redis: Redis) -> None:
    """A job of a producer with RQ's default serializer is refused; loading it would have made a file."""
    Queue("history", connection=redis).enqueue("consumers.handlers.record_portfolio_snapshot", _Trap())
    burst(redis)

    ((_, outcome, reason),) = _outcomes()
    assert (outcome, reason) == ("rejected", "refused: its data cannot be read as JSON")
    assert not os.path.exists("pwned")


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_the_jobs_of_a_dead_worker_return_to_the_front_and_run_alone(redis: Redis) -> None:
    """In their order, before later jobs; one at a time, so that a crash counts against one job."""
    job_ids = enqueue_snapshots(redis, 5)
    dead = Reservations(redis, history_queue(redis), "dead")
    dead.renew_lease()
    assert [job.job_id for job in dead.reserve(3).jobs] == job_ids[:3]
    living = Reservations(redis, history_queue(redis), "living")
    assert requeue_expired(redis, history_queue(redis)) == []
    redis.delete(*redis.keys("history:lease:history:dead:*"))

    assert requeue_expired(redis, history_queue(redis)) == job_ids[:3]
    assert history_queue(redis).job_ids == job_ids
    reservation = living.reserve(10)
    assert ([job.job_id for job in reservation.jobs], reservation.crashes) == (job_ids[:1], 0)
    living.requeue()
    burst(redis)
    assert len(get_portfolio_history()) == 5
    assert redis.keys("history:crashes*") == []


def test_a_lease_from_before_redis_clock_was_set_back_ends_in_time(redis: Redis) -> None:
    """Its owner is dead: without a bound, its jobs would wait as long as the clock has jumped."""
    job_ids = enqueue_snapshots(redis, 2)
    dead = Reservations(redis, history_queue(redis), "dead")
    dead.reserve(2)
    (lease,) = redis.keys("history:lease:history:dead:*")
    redis.expire(lease, 2 * 86400)

    assert requeue_expired(redis, history_queue(redis)) == []
    assert 0 < redis.ttl(lease) <= LEASE_SECONDS
    redis.delete(lease)
    assert requeue_expired(redis, history_queue(redis)) == job_ids


def test_a_job_that_kills_three_workers_alone_is_a_poison_event(redis: Redis) -> None:
    """Each death alone counts one; then it is rejected, and the queue goes on."""
    job_ids = enqueue_snapshots(redis, 2)
    for number in range(POISON_CRASHES):
        dying = Reservations(redis, history_queue(redis), f"dying-{number}")
        dying.renew_lease()
        assert [job.job_id for job in dying.reserve(1).jobs] == job_ids[:1]
        dying.run_alone()
        redis.delete(*redis.keys(f"history:lease:history:dying-{number}:*"))
        requeue_expired(redis, history_queue(redis))
    burst(redis)

    assert [(job_id, reason) for job_id, _, reason in _outcomes()] == [
        (job_ids[0], "poison event: 3 workers crashed or failed while processing it alone")
    ]
    assert len(get_portfolio_history()) == 1


def test_a_defect_of_ours_is_tried_three_times_and_stops_nobody(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody expected counts like a death of the worker."""
    job_ids = enqueue_snapshots(redis, 2)
    together = batch._process_together

    def defective(deliveries: Any, statement_seconds: Any) -> Any:
        if any(delivery.job_id == job_ids[0] and delivery.error is None for delivery in deliveries):
            raise ZeroDivisionError("a defect")
        return together(deliveries, statement_seconds)

    monkeypatch.setattr(batch, "_process_together", defective)
    burst(redis)

    assert [job_id for job_id, _, _ in _outcomes()] == job_ids[:1]
    assert len(get_portfolio_history()) == 1


def test_without_a_database_in_the_settings_it_ends_and_returns_its_work(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting would not help; nothing is held against the events."""
    job_ids = enqueue_snapshots(redis, 3)

    def unset(*arguments: Any, **keywords: Any) -> Any:
        raise SettingsError("DATABASE_URL: is not set")

    monkeypatch.setattr(batch, "get_db", unset)
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        burst(redis)

    assert history_queue(redis).job_ids == job_ids
    assert redis.hgetall("history:crashes:history") == {}


def test_an_answer_that_was_lost_costs_nothing(redis: Redis) -> None:
    """Reserved on the server, never heard of here: the next reservation has them again."""
    job_ids = enqueue_snapshots(redis, 3)
    reservations = Reservations(redis, history_queue(redis), "one")
    reservations.reserve(2)
    assert [job.job_id for job in reservations.reserve(10).jobs] == job_ids


def test_orphans_of_stock_workers_are_requeued_not_failed(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job in the intermediate list, one expired in the started registry."""
    monkeypatch.setattr(orphans, "ORPHAN_SECONDS", 0.0)
    job_ids = enqueue_snapshots(redis, 3)
    queue = history_queue(redis)
    redis.lmove(queue.key, queue.intermediate_queue_key, "LEFT", "RIGHT")
    redis.lrem(queue.key, 1, job_ids[1])
    redis.hset(Job.key_for(job_ids[1]), "status", "started")
    redis.zadd(StartedJobRegistry(queue=queue).key, {f"{job_ids[1]}:execution": time.time() - 1})
    worker = HistoryWorker([queue], connection=redis)
    for _ in range(2):
        worker._maintenance.due_at = 0.0
        worker._maintain()
        time.sleep(0.01)
    burst(redis)

    assert len(get_portfolio_history()) == 3
    assert (queue.failed_job_registry.count, redis.exists(queue.intermediate_queue_key)) == (0, 0)


def test_the_work_of_a_killed_worker_is_done_by_the_next(redis: Redis, database_url: str) -> None:
    """kill -9 while it waits for a lock in the middle of an insert; nothing is lost, nothing fails."""
    with get_db() as db:
        db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
        with _worker_process() as victim:
            job_ids = enqueue_snapshots(redis, 20)
            until(lambda: len(redis.keys("history:reserved:*")) == 1)
            victim.send_signal(signal.SIGKILL)
            victim.wait()
    assert get_portfolio_history() == []
    started = time.monotonic()
    with _worker_process():
        until(lambda: len(get_portfolio_history()) == 20, seconds=60)
    assert time.monotonic() - started < 60
    assert history_queue(redis).failed_job_registry.count == 0
    assert _outcomes() == []
    assert len(job_ids) == 20


def _backend_of_the_worker() -> int:
    """The process of PostgreSQL that waits for a lock."""
    waiting = text("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        until(lambda: db.execute(waiting).scalar() is not None)
        return int(db.execute(waiting).scalar_one())


def test_a_death_during_a_stall_of_the_database_is_not_held_against_the_job(redis: Redis, database_url: str) -> None:
    """However often deploys kill a worker that waits for an answer with one job in its hands."""
    (job_id,) = enqueue_snapshots(redis, 1)
    with get_db() as db:
        db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
        for number in range(3):
            with _worker_process() as victim:
                until(somebody_waits_for_a_lock)
                if number:  # it is a poison candidate by now, until the wait shows that it is the database's doing
                    until(lambda: b"alone" in redis.hvals("history:owners:history"))
                    until(lambda: b"alone" not in redis.hvals("history:owners:history"))
                victim.kill()
                victim.wait()
            redis.delete(*redis.keys("history:lease:*"))
            assert requeue_expired(redis, history_queue(redis)) == [job_id]
    assert redis.hgetall("history:crashes:history") == {job_id.encode(): b"0"}
    burst(redis)
    assert len(get_portfolio_history()) == 1


def test_sigterm_ends_it_while_the_database_is_frozen(redis: Redis, database_url: str) -> None:
    """Connected, but never an answer: what it holds goes back to the queue, and it exits 0."""
    with get_db() as db:
        db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
        with _worker_process() as worker:
            job_ids = enqueue_snapshots(redis, 3)
            backend = _backend_of_the_worker()
            os.kill(backend, signal.SIGSTOP)
            try:
                worker.terminate()
                assert worker.wait(10) == 0
            finally:
                os.kill(backend, signal.SIGCONT)
    assert history_queue(redis).job_ids == job_ids
    burst(redis)
    assert len(get_portfolio_history()) == 3


def test_it_waits_for_a_redis_that_is_away_when_it_starts(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """It says so, and begins when Redis has come."""
    enqueue_snapshots(redis, 1)
    kept: Any = redis.connection_pool.connection_kwargs["path"]
    with Path(tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "consumers.cli", "worker"],
            stderr=log,
            env={**os.environ, "REDIS_URL": f"unix://{tmp_path / 'proxy.sock'}?db={_database_number(redis)}"},
        )
    try:
        until(lambda: b"waits for Redis and tries again" in (tmp_path / "log").read_bytes())
        with Proxy(tmp_path / "proxy.sock", Path(kept)).running():
            until(lambda: len(get_portfolio_history()) == 1)
            worker.terminate()
            assert worker.wait(10) == 0
    finally:
        worker.kill()
        worker.wait()


def _database_number(redis: Redis) -> int:
    return int(redis.connection_pool.connection_kwargs.get("db", 0))


def test_a_job_in_no_list_at_all_is_found(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock worker died between taking it and noting it; it needs two looks, and others are left alone."""
    monkeypatch.setattr(orphans, "ORPHAN_SECONDS", 0.0)
    job_ids = enqueue_snapshots(redis, 4)
    other = Queue("other", connection=redis).enqueue("os.getpid")
    redis.lpop("rq:queue:other")
    queue = history_queue(redis)
    redis.lrem(queue.key, 1, job_ids[0])
    redis.lrem(queue.key, 1, job_ids[1])
    redis.hset(Job.key_for(job_ids[1]), "status", "finished")
    owner = Reservations(redis, queue, "owner")
    assert [job.job_id for job in owner.reserve(1).jobs] == job_ids[2:3]
    found = []
    for _ in range(3):
        redis.delete("history:orphans:history:scanned")
        found.append(Orphans(redis, queue).requeue())

    assert found == [[], job_ids[:1], []]
    assert queue.job_ids == [job_ids[0], job_ids[3]]
    assert Job.fetch(other.id, connection=redis).get_status() == "queued"


def test_a_job_in_no_list_is_found_after_redis_clock_was_set_back(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was first seen two days from now, and so was the last look."""
    monkeypatch.setattr(orphans, "ORPHAN_SECONDS", 0.0)
    (job_id,) = enqueue_snapshots(redis, 1)
    queue = history_queue(redis)
    redis.lpop(queue.key)
    redis.hset(orphans_key(queue.name), job_id, redis.time()[0] + 2 * 86400)
    looked = f"{orphans_key(queue.name)}:scanned"
    redis.set(looked, "1", ex=2 * 86400)

    assert Orphans(redis, queue).requeue() == []
    assert 0 < redis.ttl(looked) <= 60
    redis.persist(looked)
    assert Orphans(redis, queue).requeue() == []
    assert 0 < redis.ttl(looked) <= 60
    found = []
    for _ in range(2):
        redis.delete(looked)
        found.append(Orphans(redis, queue).requeue())
    assert found == [[], [job_id]]


def test_sigterm_lets_it_finish_its_batch(redis: Redis, database_url: str) -> None:
    """Exit status 0, and the worker is gone from RQ's list; while idle it ends within moments."""
    with _worker_process() as worker:
        enqueue_snapshots(redis, 2000)
        until(lambda: len(get_portfolio_history(limit=1)) == 1)
        worker.terminate()
        assert worker.wait(20) == 0
    stored = len(get_portfolio_history())
    assert stored + history_queue(redis).count == 2000
    assert redis.keys("history:reserved:*") == []
    assert redis.smembers("rq:workers") == set()
    with _worker_process() as worker:
        until(lambda: len(get_portfolio_history()) == 2000 and redis.scard("rq:workers") == 1)
        worker.terminate()
        assert worker.wait(5) == 0


def test_a_database_that_was_read_only_is_used_again(redis: Redis, database_url: str) -> None:
    """A session keeps what it was given at its start: after trouble the worker connects anew."""
    name = engine().url.database
    with engine().begin() as db:
        db.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    with _worker_process():
        enqueue_snapshots(redis, 2)
        until(lambda: any(b"waiting for the database" in redis.hvals(key) for key in redis.keys("rq:worker:*")))
        with engine().connect() as db:
            db.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"))
            db.commit()
            db.execute(text(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'))
            db.commit()
        until(lambda: len(get_portfolio_history()) == 2, seconds=30)


@pytest.mark.parametrize("unusable", [b"\xff\xfe", b"a\0b", b"x" * 4000, b"odd id", b"a:b", b"a.b", b""])
def test_an_unusable_job_id_is_quarantined(redis: Redis, unusable: bytes) -> None:
    """In the queue, with a job or without; the jobs around it are stored."""
    enqueue_snapshots(redis, 2)
    redis.lpush("rq:queue:history", unusable)
    fields: dict[Any, Any] = {"data": "[]", "status": "queued"} | {f"f{number}": "x" for number in range(1100)}
    redis.hset(b"rq:job:" + unusable, mapping=fields)
    for key in ("rq:queue:history:intermediate", "history:reserved:history:gone"):
        redis.rpush(key, unusable)
    redis.zadd("rq:wip:history", {unusable: 1})
    redis.hset("history:owners:history", unusable, "")
    burst(redis)

    assert len(get_portfolio_history()) == 2
    assert redis.lrange("history:quarantine:history", 0, -1)[:1] == [unusable]


def test_texts_that_are_much_longer_than_their_jobs_are_taken_one_by_one(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has them compressed; the worker's memory and a transaction's length are bounded by what they are."""
    for number in range(6):
        archive = an_archive(after=timedelta(number), signals=[a_signal(reason="x" * 3_000_000)])
        event = event_of(archive, source="o/1", sequence=number)
        history_queue(redis).enqueue("consumers.handlers.record_signal_archive", encode(event))
    enqueue_snapshots(redis, 3)
    sizes = _batch_sizes(monkeypatch)
    burst(redis)

    assert sizes == [2, 2, 2, 3]
    assert len(get_portfolio_history()) == 3


@pytest.mark.parametrize("error", ["RAISE EXCEPTION 'a rule'", "RETURN NULL"])
def test_an_event_that_a_trigger_stops_does_not_stop_the_others(redis: Redis, error: str) -> None:
    """It is not refused, since nothing is wrong with it, but goes to the tail."""
    job_ids = enqueue_snapshots(redis, 20)
    with get_db() as db:
        db.exec_driver_sql(
            "CREATE FUNCTION rule() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN IF NEW.sequence = 7 THEN {error}; END IF; RETURN NEW; END $$"
        )
        db.exec_driver_sql(
            "CREATE TRIGGER rule BEFORE INSERT ON portfolio_history FOR EACH ROW EXECUTE FUNCTION rule()"
        )
    HistoryWorker([history_queue(redis)], connection=redis).work(logging_level="WARNING", max_jobs=19)

    assert (len(get_portfolio_history()), _outcomes(), history_queue(redis).job_ids) == (19, [], [job_ids[7]])
    with get_db() as db:
        db.exec_driver_sql("DROP TRIGGER rule ON portfolio_history")
    burst(redis)
    assert len(get_portfolio_history()) == 20


def test_row_numbers_that_are_taken_are_not_held_against_the_events(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restore that did not bring the sequences along: it waits, and goes on when they are right."""
    with get_db() as db:
        db.exec_driver_sql(
            "INSERT INTO portfolio_history (id, event_id, source, snapshot_date, timestamp, balance, total_invested,"
            " total_profit_loss, total_value, open_positions, trade_count)"
            " SELECT n, gen_random_uuid(), 'x', '2026-01-01', now(), 1, 1, 1, 1, 1, 1 FROM generate_series(1, 50) AS n"
        )
    enqueue_snapshots(redis, 3)
    waited = WorkerThread._wait_for_recovery

    def mend(thread: WorkerThread, error: Any) -> None:
        with get_db() as db:
            db.exec_driver_sql("SELECT setval(pg_get_serial_sequence('portfolio_history', 'id'), 50)")
        waited(thread, error)

    monkeypatch.setattr(WorkerThread, "_wait_for_recovery", mend)
    burst(redis)

    assert (len(get_portfolio_history()), _outcomes()) == (53, [])


def test_an_event_that_can_neither_be_stored_nor_rejected_is_dead_lettered(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After as many tries as a poison event has it is in the failed registry, with the reason, and stops nobody."""
    job_ids = enqueue_snapshots(redis, 3)
    together = batch._process_together

    def defective(deliveries: Any, statement_seconds: Any) -> Any:
        if any(delivery.job_id == job_ids[1] for delivery in deliveries):
            raise ZeroDivisionError("a defect")
        return together(deliveries, statement_seconds)

    monkeypatch.setattr(batch, "_process_together", defective)
    burst(redis)

    assert len(get_portfolio_history()) == 2
    assert history_queue(redis).failed_job_registry.get_job_ids() == [job_ids[1]]
    result = Job.fetch(job_ids[1], connection=redis, serializer=JSONSerializer).latest_result()
    assert result is not None
    assert result.exc_string == "ZeroDivisionError: a defect"
    assert history_queue(redis).count == 0


def test_without_tables_it_waits_and_goes_on_by_itself(redis: Redis, database_url: str) -> None:
    """The work goes back to the queue, the worker says what it waits for, nothing fails."""
    with get_db() as db:
        db.execute(text("ALTER TABLE portfolio_history RENAME TO elsewhere"))
    with _worker_process():
        enqueue_snapshots(redis, 5)
        until(lambda: any(b"waiting for the database" in redis.hvals(key) for key in redis.keys("rq:worker:*")))
        with get_db() as db:
            db.execute(text("ALTER TABLE elsewhere RENAME TO portfolio_history"))
        until(lambda: len(get_portfolio_history()) == 5)
    assert (history_queue(redis).failed_job_registry.count, _outcomes()) == (0, [])


_CONSTRAINTS_BEFORE_DUPLICATE = """
    ALTER TABLE event_outcomes DROP CONSTRAINT event_outcomes_outcome_is_known,
        DROP CONSTRAINT event_outcomes_refusal_has_a_reason,
        ADD CONSTRAINT event_outcomes_outcome_is_known CHECK (outcome IN ('absorbed', 'rejected', 'discarded'))
"""


@pytest.mark.parametrize("beside", [0, 3])
@pytest.mark.parametrize("before", [OUTCOMES_BEFORE_DUPLICATE, _CONSTRAINTS_BEFORE_DUPLICATE])
def test_a_database_that_was_not_upgraded_rejects_no_event(
    redis: Redis, producer: HistoryProducer, caplog: pytest.LogCaptureFixture, before: str, beside: int
) -> None:
    """A duplicate cannot be recorded there: the worker waits and names init-db, and after that everything is stored."""
    with get_db() as db:
        insert_events(db, [event_of(a_snapshot(), source="other/1", sequence=0)])
        db.exec_driver_sql(before)
    engine().dispose()
    receipts = producer.record_many([a_snapshot(after=timedelta(seconds=n)) for n in range(beside + 1)])
    producer.flush(10)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    worker._install_signal_handlers = lambda: None  # type: ignore[method-assign]  # only the main thread may
    thread = threading.Thread(target=worker.work, kwargs={"logging_level": "WARNING"})
    thread.start()
    try:
        until(lambda: "run trading-history init-db" in caplog.text)
        assert (_outcomes(), history_queue(redis).failed_job_registry.count) == ([], 0)
        apply_schema(engine())
        for receipt in receipts:
            assert receipt.wait(30) > 0
    finally:
        worker._stopping.set()
        thread.join(30)
    assert [outcome for _, outcome, _ in _outcomes()] == ["duplicate"]
    assert len(get_portfolio_history()) == beside + 1


def test_one_event_that_times_out_alone_does_not_hold_up_the_others(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has its row in an open transaction: it goes to the tail, and is stored when they are gone."""
    monkeypatch.setattr(worker_module, "STATEMENT_SECONDS", 0.3)
    job_ids = enqueue_snapshots(redis, 4)
    administrator = create_store_engine(SecretStr(os.environ["DATABASE_URL"]))
    with administrator.connect() as db:
        insert_events(db, [event_of(a_snapshot(), source="other/1", sequence=0)])
        worker = HistoryWorker([history_queue(redis)], connection=redis)
        worker.work(burst=False, logging_level="WARNING", max_jobs=3)
        assert len(get_portfolio_history()) == 3
        assert history_queue(redis).job_ids == job_ids[:1]
        assert redis.hgetall("history:timeouts:history") == {job_ids[0].encode(): b"1"}
        assert 0 < redis.ttl("history:timeouts:history") <= 7 * 86400
        db.rollback()
    administrator.dispose()
    burst(redis)

    assert len(get_portfolio_history()) == 4
    assert redis.exists("history:timeouts:history") == 0


def test_it_survives_that_redis_loses_everything(redis: Redis, producer: HistoryProducer) -> None:
    """It registers again and goes on; the outbox sends again what was lost."""
    with _worker_process():
        assert producer.record(a_snapshot()).wait(20) == 1
        redis.flushall()
        assert producer.record(a_snapshot(after=timedelta(1))).wait(20)
        until(lambda: len(redis.smembers("rq:workers:history")) == 1)


def test_no_clock_of_a_host_decides_which_jobs_are_orphans(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker host whose clock is hours ahead takes nothing from the others: only Redis' clock counts."""
    job_ids = enqueue_snapshots(redis, 2)
    queue = history_queue(redis)
    redis.delete(queue.key)
    soon = redis.time()[0] + 60
    redis.zadd(StartedJobRegistry("history", connection=redis).key, {f"{job_ids[0]}:execution": soon})
    assert Orphans(redis, queue).requeue() == []
    redis.delete("history:orphans:history:scanned")
    ahead = time.time() + 36_000
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert Orphans(redis, queue).requeue() == []


def test_an_answer_that_takes_too_long_does_not_end_the_ear_for_commands(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's handler survives a lost connection, but not a time-out: nobody could stop such a worker from afar."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    worker._pubsub_exception_handler(RedisTimeoutError("slow"), None, None)


def test_many_entries_that_are_no_ids_end_no_burst(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a batch of them in front of an event."""
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 10)
    redis.rpush("rq:queue:history", *["no id"] * 35)
    enqueue_snapshots(redis, 1)
    burst(redis)
    assert (len(get_portfolio_history()), redis.llen("history:quarantine:history")) == (1, 35)


def _outcome_ids() -> list[str]:
    return [job_id for job_id, outcome, _ in _outcomes() if outcome == "rejected"]


@pytest.mark.parametrize(
    "value",
    [
        '{"a":[]}',
        "1",
        "true",
        "null",
        "x",
        '"\\ud800"',
        '["\\ud800"]',
        "[null]",
        "[[]]",
        "[{}]",
        '["a b"]',
        "[" * 60_000,
    ],
)
def test_dependencies_that_are_none_cost_only_the_job_that_names_them(redis: Redis, value: str) -> None:
    """It stands in Failed with its reason and its call, in a shape that RQ can read and send again."""
    refused = history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", "{}")
    redis.hset(refused.key, "dependency_ids", value)
    enqueue_snapshots(redis, 2)
    worker = burst(redis)

    assert worker._shared.waits_for is None
    assert (_outcome_ids(), len(get_portfolio_history())) == ([refused.id], 2)
    queue = history_queue(redis)
    assert queue.failed_job_registry.get_job_ids() == [refused.id]
    found = queue.fetch_job(refused.id)
    assert found is not None
    result = found.latest_result()
    assert result is not None
    assert str(result.exc_string).startswith("InvalidEvent: specversion: is missing")
    assert (found.is_failed, found.origin, found.args) == (True, "history", ["{}"])
    queue.failed_job_registry.requeue(refused.id)


def test_a_job_whose_failure_cannot_be_written_does_not_affect_the_others(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever defect of ours it is: an exception, or what redis-py does not send; Redis is not away for that."""
    refused = [history_queue(redis).enqueue("os.system", str(number)).id for number in range(4)]
    enqueue_snapshots(redis, 3)
    failed_job = Completion._failed_job

    def defective(self: Any, job: Any, *args: Any) -> Any:
        if job.job_id == refused[1]:
            raise ZeroDivisionError("a defect")
        found = failed_job(self, job, *args)
        return found | ({"fields": {b"bytes"}} if job.job_id == refused[2] else {})

    monkeypatch.setattr(Completion, "_failed_job", defective)
    worker = burst(redis)

    assert worker._shared.waits_for is None
    assert (sorted(_outcome_ids()), len(get_portfolio_history())) == (sorted(refused), 3)
    assert sorted(history_queue(redis).failed_job_registry.get_job_ids()) == sorted(refused)
    assert redis.hget(Job.key_for(refused[3]), "status") == b"failed"
    assert redis.keys("history:reserved:*") == []


def test_many_refused_jobs_cost_few_commands(redis: Redis) -> None:
    """Junk in front of an event must not keep it waiting: it is refused by the batch."""
    history_queue(redis).enqueue_many([Queue.prepare_data("os.system", args=("true",)) for _ in range(300)])
    redis.config_resetstat()
    burst(redis)

    assert len(_outcome_ids()) == history_queue(redis).failed_job_registry.count == 300
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] < 50


@pytest.mark.parametrize(
    "key", ["crashes", "timeouts", "owners", "quarantine", "rq:finished", "rq:failed", "rq:results", "ack", "rq:worker"]
)
def test_a_key_of_a_wrong_type_is_quarantined(redis: Redis, key: str) -> None:
    """Without it nothing would be stored any more."""
    *_, last = enqueue_snapshots(redis, 2)
    redis.rpush("rq:queue:history", "no id")
    refused = history_queue(redis).enqueue("os.system", "true")
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    names = {"ack": "history:ack:other/1", "rq:results": f"rq:results:{last}", "rq:worker": worker.key}
    name = names.get(key) or (f"{key}:history" if key.startswith("rq:") else f"history:{key}:history")
    arrive = worker._register

    def arrived(*args: Any) -> bool:
        there = arrive(*args)
        redis.delete(name)
        redis.set(name, "x")
        return there

    worker._register = arrived  # type: ignore[method-assign]  # after all that happens at the start
    worker.work(burst=True, logging_level="WARNING")

    assert (_outcome_ids(), len(get_portfolio_history())) == ([refused.id], 2)
    assert history_queue(redis).failed_job_registry.get_job_ids() == [refused.id]
    assert redis.exists(f"{name}:quarantined") == (key != "rq:results")
    assert key != "ack" or redis.hlen(name) == 2
    assert redis.hmget(worker.key, "successful_job_count", "failed_job_count") == [b"2", b"1"]


def test_a_crash_is_counted_once_though_the_queue_cannot_be_written(redis: Redis) -> None:
    """Its key is of another type: the owner's jobs stay where they are until it is gone, and so do the counts."""
    (job_id,) = enqueue_snapshots(redis, 1)
    dead = Reservations(redis, history_queue(redis), "dead")
    dead.reserve(1)
    dead.run_alone()
    redis.delete(*redis.keys("history:lease:*"))
    redis.set("rq:queue:history", "x")
    for _ in range(5):
        with pytest.raises(ResponseError, match="rq:queue:history is a string and not a list"):
            requeue_expired(redis, history_queue(redis))
    redis.delete("rq:queue:history")
    assert requeue_expired(redis, history_queue(redis)) == [job_id]
    assert redis.hgetall("history:crashes:history") == {job_id.encode(): b"1"}


def test_a_worker_whose_own_key_has_another_type_starts(redis: Redis) -> None:
    """The key is renamed, as it is in a running worker."""
    enqueue_snapshots(redis, 1)
    redis.sadd("rq:worker:named", "x")
    HistoryWorker([history_queue(redis)], "named", connection=redis).work(burst=True, logging_level="WARNING")
    assert len(get_portfolio_history()) == 1
    assert redis.smembers("rq:worker:named:quarantined") == {b"x"}


def test_unusable_ids_are_kept_though_their_list_has_another_type(redis: Redis) -> None:
    """The list's key is renamed first."""
    redis.rpush("rq:queue:history", "bad:1", "bad:2", "bad:3")
    redis.set("history:quarantine:history", "x")
    enqueue_snapshots(redis, 1)
    burst(redis)
    assert len(get_portfolio_history()) == 1
    assert sorted(redis.lrange("history:quarantine:history", 0, -1)) == [b"bad:1", b"bad:2", b"bad:3"]


@pytest.mark.parametrize("which", ["crashes", "timeouts"])
def test_a_count_that_is_no_number_counts_as_none(redis: Redis, which: str) -> None:
    """Of deaths and of delays: the job runs alone, and the worker goes on."""
    job_ids = enqueue_snapshots(redis, 2)
    redis.hset(f"history:{which}:history", job_ids[0], "abc")
    burst(redis)
    assert len(get_portfolio_history()) == 2


def test_a_queue_that_is_no_list_is_named(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """It is not ours to move; the worker waits, and goes on when it is gone."""
    redis.set("rq:queue:history", "x")
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    working = threading.Thread(target=lambda: worker.work(burst=True, logging_level="WARNING"))
    worker._install_signal_handlers = lambda: None  # type: ignore[method-assign]  # not in a thread
    working.start()
    until(lambda: "rq:queue:history is a string and not a list" in caplog.text)
    redis.delete("rq:queue:history")
    enqueue_snapshots(redis, 1)
    working.join(30)
    assert len(get_portfolio_history()) == 1


def test_one_unusable_reservation_list_does_not_prevent_recovery_of_the_others(redis: Redis) -> None:
    """It is quarantined; the jobs of the other dead workers are requeued."""
    job_ids = enqueue_snapshots(redis, 3)
    for owner in ("a-evil", "b-dead", "c-evil", "d-dead"):
        redis.hset("history:owners:history", owner, "")
        if owner.endswith("evil"):
            redis.set(f"history:reserved:history:{owner}", "x")
        else:
            redis.lmove("rq:queue:history", f"history:reserved:history:{owner}", "RIGHT", "LEFT")
    assert sorted(requeue_expired(redis, history_queue(redis))) == sorted(job_ids[1:])
    assert requeue_expired(redis, history_queue(redis)) == []
    assert redis.hgetall("history:owners:history") == {}


def test_an_unusable_entry_among_rqs_workers_ends_no_maintenance(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """RQ cannot read its list of workers then: the log says so once, and events are stored."""
    redis.sadd("rq:workers:history", b"\xff", "rq:worker:gone")
    redis.hset("history:owners:history", b"\xff", "")
    redis.set("history:reserved:history:evil", "x")
    redis.hset("history:owners:history", "evil", "")
    assert read_queue(redis, "history").reserved == 0
    enqueue_snapshots(redis, 1)
    burst(redis)

    assert len(get_portfolio_history()) == 1
    assert (
        "maintenance of queue history: step dead workers failed; it runs again in the next pass: UnicodeDecodeError"
        in caplog.text
    )


def test_each_part_of_the_maintenance_goes_on_without_the_others(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is told of once, until it has passed again."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    worker.bootstrap("WARNING")

    def defective(*args: Any) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(maintenance, "clean_worker_registry", defective)
    monkeypatch.setattr(maintenance, "requeue_expired", defective)
    redis.set("rq:finished:history", "x")
    redis.rpush("rq:queue:history:intermediate", "x")
    monkeypatch.setattr(orphans, "ORPHAN_SECONDS", -1.0)
    for _ in range(3):
        worker._maintenance.run()
    assert redis.lrange("rq:queue:history", 0, -1) == [b"x"]
    assert caplog.text.count("failed; it runs again in the next pass") == 3
    worker._deregister()


@pytest.mark.parametrize("value", ["garbage", b"\xff", None])
def test_a_job_that_does_not_tell_since_when_it_waits(redis: Redis, value: Any) -> None:
    """The age is unknown; everything else is told."""
    (job_id,) = enqueue_snapshots(redis, 1)
    if value is None:
        redis.delete(Job.key_for(job_id))
        redis.set(Job.key_for(job_id), "no hash")
    else:
        redis.hset(Job.key_for(job_id), "enqueued_at", value)
    health = read_queue(redis, "history")
    assert (health.queued, health.oldest_waiting_seconds) == (1, None)


@pytest.mark.parametrize("junk", [b"\xff", b"x", b"1", b"{}", b"[" * 100_000, b'{"command":"stop-job"}'])
def test_junk_among_its_commands_leaves_the_ear_open(redis: Redis, junk: bytes) -> None:
    """The thread that listens would end by it, and no later command be heard."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    worker.handle_payload({"data": junk})
