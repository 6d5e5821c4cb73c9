"""HistoryWorker with real servers: no event is lost if it crashes, and it waits while a server is away."""

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
from tests.rq_programs import end, somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")


def _batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of deliveries of each later transaction is added."""
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
    """Run RQ's own command with our worker class, as an operator starts it, and end it with the block."""
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
        end(process)


def test_a_burst_stores_all_events_and_leaves_no_reservation(redis: Redis) -> None:
    """No reserved list, lease, owner or worker is left. The jobs are finished, with the ids of their rows in order."""
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
    """The last of each batch and the last of all are kept, with their results. No key of the others is left."""
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


def test_many_finished_jobs_of_a_stock_worker_are_deleted_in_parts(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's own worker limits them by time only, so there can be more than one script call can delete."""
    monkeypatch.setattr(completion, "KEPT_FINISHED_JOBS", 30)
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 20)
    registry = history_queue(redis).finished_job_registry
    with redis.pipeline(transaction=False) as pipe:
        for number in range(9000):
            pipe.hset(f"rq:job:stock-{number}", mapping={"status": "finished"})
            pipe.zadd(registry.key, {f"stock-{number}": time.time() + 100})
        pipe.execute()
    enqueue_snapshots(redis, 200)
    burst(redis)

    assert registry.count == len(redis.keys("rq:job:*")) == 30
    assert redis.keys("rq:job:stock-*") == []
    assert len(get_portfolio_history()) == 200


def test_redis_does_not_grow_with_the_number_of_events(
    producer: HistoryProducer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the hash and the result of the last finished jobs, and no acknowledgement or other key."""
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


def test_one_bad_event_in_a_batch_is_rejected_alone(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is halved until the event is alone: 1 of 300 takes some 20 transactions, not 300."""
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


def test_a_batch_can_have_the_same_event_and_the_same_job_twice(redis: Redis) -> None:
    """There is one row. Another delivery of the event is a duplicate, and other content is a conflict."""
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


def test_two_workers_with_the_same_events_in_opposite_order_do_not_deadlock(redis: Redis) -> None:
    """Rows are inserted in sorted order, so there is no deadlock, and each event is one row.

    The trigger waits before the first and the last row, so that each worker has its first one before it needs the
    other's. PostgreSQL plans a small batch in such a way that its rows are in the same order anyway.
    """
    with get_db() as db:
        db.exec_driver_sql(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF NEW.sequence IN (0, 499) THEN PERFORM pg_sleep(0.4); END IF; RETURN NEW; END $$;"
            " CREATE TRIGGER slow BEFORE INSERT ON portfolio_history FOR EACH ROW EXECUTE FUNCTION slow()"
        )
    events = [event_of(a_snapshot(after=timedelta(n)), source="other/1", sequence=n) for n in range(500)]
    barrier = threading.Barrier(2)

    def insert(chosen: list[Any]) -> None:
        with get_db() as db:
            barrier.wait(10)
            insert_events(db, chosen)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(insert, [events, events[::-1]]))
    assert len(get_portfolio_history()) == 500


def test_only_one_queue_and_a_tested_rq_are_accepted(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several queues or another RQ it does not start; the error says what to do instead."""
    with pytest.raises(SettingsError, match="exactly one queue"):
        HistoryWorker(["history", "other"], connection=redis)
    monkeypatch.setattr(worker_module, "VERSION", "3.9.1")
    with pytest.raises(
        SettingsError, match=r"tested with RQ 3\.0, but RQ 3\.9\.1 is installed: .* use RQ's own worker"
    ):
        HistoryWorker(["history"], connection=redis)


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("os.system", ["touch pwned"], "unsupported job: it calls a function other than our job functions"),
        (
            "consumers.handlers.record_portfolio_snapshot",
            [],
            "unsupported job: its call must have one argument, the event's text",
        ),
        ("consumers.handlers.record_portfolio_snapshot", ["{}"], "specversion: is missing"),
    ],
)
def test_a_job_without_a_valid_event_is_rejected_and_the_others_are_stored(
    redis: Redis, function: str, arguments: list[str], reason: str
) -> None:
    """The reason is in event_outcomes and in the first line that RQ shows."""
    rejected = history_queue(redis).enqueue(function, *arguments)
    enqueue_snapshots(redis, 2)
    burst(redis)

    ((job_id, outcome, recorded),) = _outcomes()
    assert (job_id, outcome) == (rejected.id, "rejected")
    assert str(recorded).startswith(reason)
    result = rejected.latest_result()
    assert result is not None
    assert str(recorded) in str(result.exc_string).splitlines()[0]
    assert history_queue(redis).failed_job_registry.get_job_ids() == [rejected.id]
    assert len(get_portfolio_history()) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("status", "zzz"), ("created_at", "garbage"), ("timeout", "abc"), ("description", b"\xff")]
)
def test_an_event_is_stored_although_other_fields_of_its_job_are_unreadable(
    redis: Redis, field: str, value: Any
) -> None:
    """The worker reads only the job's data: all events are stored."""
    job_ids = enqueue_snapshots(redis, 3)
    redis.hset(Job.key_for(job_ids[1]), field, value)
    burst(redis)

    assert (_outcomes(), len(get_portfolio_history())) == ([], 3)


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", "abc"), ("result_ttl", "abc"), ("created_at", "x"), ("webhooks", "x")]
)
def test_an_invalid_event_in_an_unreadable_job_does_not_stop_the_others(redis: Redis, field: str, value: str) -> None:
    """RQ cannot read its job, but its rejection is recorded, and the job is in the failed registry."""
    rejected = history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", "{}")
    redis.hset(rejected.key, field, value)
    enqueue_snapshots(redis, 2)
    burst(redis)

    assert [(job_id, outcome) for job_id, outcome, _ in _outcomes()] == [(rejected.id, "rejected")]
    assert history_queue(redis).failed_job_registry.get_job_ids() == [rejected.id]
    assert len(get_portfolio_history()) == 2


def test_max_jobs_can_be_more_than_a_batch(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker ends after that number of jobs, in batches of the usual size."""
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 10)
    enqueue_snapshots(redis, 40)
    sizes = _batch_sizes(monkeypatch)
    HistoryWorker([history_queue(redis)], connection=redis).work(logging_level="WARNING", max_jobs=25)

    assert (sizes, history_queue(redis).count) == ([10, 10, 5], 15)


@pytest.mark.parametrize("field", ["created_at", "timeout", "status"])
def test_an_unreadable_job_is_rejected_and_does_not_stop_the_others(redis: Redis, field: str) -> None:
    """A job without data is rejected and failed, whatever its other fields are; the others are stored."""
    job_ids = enqueue_snapshots(redis, 3)
    redis.hset(Job.key_for(job_ids[1]), field, "garbage")
    redis.hdel(Job.key_for(job_ids[1]), "data")
    burst(redis)

    assert _outcomes() == [(job_ids[1], "rejected", "unsupported job: it cannot be read")]
    assert len(get_portfolio_history()) == 2
    assert history_queue(redis).failed_job_registry.get_job_ids() == [job_ids[1]]


def test_a_job_whose_key_is_not_a_hash_is_rejected(redis: Redis) -> None:
    """Its key is a string."""
    job_ids = enqueue_snapshots(redis, 2)
    redis.delete(Job.key_for(job_ids[0]))
    redis.set(Job.key_for(job_ids[0]), "not a hash")
    burst(redis)

    assert [job_id for job_id, _, _ in _outcomes()] == job_ids[:1]
    assert len(get_portfolio_history()) == 1


def test_an_error_of_redis_itself_rejects_no_event(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is still loading answers each command with an error: that is an outage, not a bad job."""
    rejected = history_queue(redis).enqueue("os.system", "true")
    enqueue_snapshots(redis, 1)
    read, loading = Completion._failed, [True]

    def fail_while_loading(*args: Any) -> Any:
        if loading:
            loading.clear()
            raise BusyLoadingError("LOADING")
        return read(*args)

    monkeypatch.setattr(Completion, "_failed", fail_while_loading)
    HistoryWorker([history_queue(redis)], connection=redis).work(burst=True, logging_level="WARNING")

    assert _rejected_ids() == history_queue(redis).failed_job_registry.get_job_ids() == [rejected.id]
    assert len(get_portfolio_history()) == 1


def test_the_lease_is_renewed_until_the_reservations_are_released(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGTERM during a batch, no other worker can reserve its jobs until the batch has ended."""
    enqueue_snapshots(redis, 3)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    leases = []

    def stop_during_batch(deliveries: Any, statement_seconds: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        redis.delete(*redis.keys("history:lease:*") or ["none"])
        deadline = time.monotonic() + 10
        while not redis.keys("history:lease:*") and time.monotonic() < deadline:
            time.sleep(0.02)
        leases.append(bool(redis.keys("history:lease:*")))  # of this thread, or of both
        return process_batch(deliveries)

    monkeypatch.setattr(worker_module, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(thread_module, "process_batch", stop_during_batch)
    worker.work(burst=True, logging_level="WARNING")

    assert leases == [True]
    assert len(get_portfolio_history()) == 3


def test_a_thread_without_progress_loses_its_lease(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker then requeues its jobs, although its process still runs."""
    enqueue_snapshots(redis, 1)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    found: list[Any] = []

    def stuck(deliveries: Any, statement_seconds: Any) -> Any:
        time.sleep(0.4)  # longer than _STUCK_SECONDS
        redis.delete(*redis.keys("history:lease:*"))
        time.sleep(0.4)  # enough time for several renewals
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
    """It runs alone, and only its job goes to the tail of the queue."""
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
    """A job with RQ's default serializer is rejected. Loading its data would create a file."""
    Queue("history", connection=redis).enqueue("consumers.handlers.record_portfolio_snapshot", _Trap())
    burst(redis)

    ((_, outcome, reason),) = _outcomes()
    assert (outcome, reason) == ("rejected", "unsupported job: its data cannot be read as JSON")
    assert not os.path.exists("pwned")


class _Trap:
    """An object that creates a folder when pickle loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_the_jobs_of_a_dead_worker_return_to_the_front_and_run_alone(redis: Redis) -> None:
    """They keep their order, before later jobs, and run one at a time, so that a crash counts against one job."""
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


def test_a_lease_is_shortened_after_redis_clock_was_set_back(redis: Redis) -> None:
    """Otherwise the jobs of a dead owner would wait for as long as the clock was set back."""
    job_ids = enqueue_snapshots(redis, 2)
    dead = Reservations(redis, history_queue(redis), "dead")
    dead.reserve(2)
    (lease,) = redis.keys("history:lease:history:dead:*")
    redis.expire(lease, 2 * 86400)

    assert requeue_expired(redis, history_queue(redis)) == []
    assert 0 < redis.ttl(lease) <= LEASE_SECONDS
    redis.delete(lease)
    assert requeue_expired(redis, history_queue(redis)) == job_ids


def test_a_job_that_crashes_three_workers_alone_is_a_poison_event(redis: Redis) -> None:
    """Each crash while it runs alone counts. After three it is rejected, and the next job is stored."""
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


def test_a_defect_on_one_event_rejects_it_after_three_attempts(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception counts like a crash. The other event is stored."""
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


def test_without_a_database_in_the_settings_it_ends_and_requeues_its_jobs(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting would not help. No crash is counted."""
    job_ids = enqueue_snapshots(redis, 3)

    def unset(*arguments: Any, **keywords: Any) -> Any:
        raise SettingsError("DATABASE_URL: is not set")

    monkeypatch.setattr(batch, "get_db", unset)
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        burst(redis)

    assert history_queue(redis).job_ids == job_ids
    assert redis.hgetall("history:crashes:history") == {}


def test_a_reservation_whose_reply_was_lost_is_returned_again(redis: Redis) -> None:
    """The jobs are reserved in Redis, but the worker does not know it: the next reservation has them again."""
    job_ids = enqueue_snapshots(redis, 3)
    reservations = Reservations(redis, history_queue(redis), "one")
    reservations.reserve(2)
    assert [job.job_id for job in reservations.reserve(10).jobs] == job_ids


def test_orphans_of_stock_workers_are_requeued_not_failed(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job is in the intermediate list, and one has expired in the started registry."""
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


def test_an_intermediate_list_of_another_type_does_not_prevent_recovery_of_other_orphans(redis: Redis) -> None:
    (job_id,) = enqueue_snapshots(redis, 1)
    queue = history_queue(redis)
    redis.delete(queue.key)
    redis.zadd(queue.started_job_registry.key, {f"{job_id}:x": 1})
    redis.set(queue.intermediate_queue_key, "x")
    assert Orphans(redis, queue).requeue() == [job_id]


def test_the_events_of_a_killed_worker_are_stored_by_the_next(redis: Redis, database_url: str) -> None:
    """Within 30 s. It is killed while its insert waits for a lock. No event is lost, and no job fails."""
    with get_db() as db:
        db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
        with _worker_process() as victim:
            job_ids = enqueue_snapshots(redis, 20)
            until(lambda: len(redis.keys("history:reserved:*")) == 1)
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            killed_at = time.monotonic()
    assert get_portfolio_history() == []
    with _worker_process():
        until(lambda: len(get_portfolio_history()) == 20, seconds=60)
    assert time.monotonic() - killed_at < 30
    assert history_queue(redis).failed_job_registry.count == 0
    assert _outcomes() == []
    assert len(job_ids) == 20


def _backend_of_the_worker() -> int:
    """Return the process id of the PostgreSQL session that waits for a lock."""
    waiting = text("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        until(lambda: db.execute(waiting).scalar() is not None)
        return int(db.execute(waiting).scalar_one())


def test_a_crash_while_the_database_is_stalled_does_not_count(redis: Redis, database_url: str) -> None:
    """A deployment can kill any number of workers that wait for the database with one job."""
    (job_id,) = enqueue_snapshots(redis, 1)
    with get_db() as db:
        db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
        for number in range(3):
            with _worker_process() as victim:
                until(somebody_waits_for_a_lock)
                if (
                    number
                ):  # now it is a poison candidate, and counts as alone until the wait is long enough to be a stall
                    until(lambda: b"alone" in redis.hvals("history:owners:history"))
                    until(lambda: b"alone" not in redis.hvals("history:owners:history"))
                victim.kill()
                victim.wait()
            redis.delete(*redis.keys("history:lease:*"))
            assert requeue_expired(redis, history_queue(redis)) == [job_id]
    assert redis.hgetall("history:crashes:history") == {job_id.encode(): b"0"}
    burst(redis)
    assert len(get_portfolio_history()) == 1


def test_sigterm_ends_a_worker_while_the_database_is_frozen(redis: Redis, database_url: str) -> None:
    """The server is connected but does not answer: the jobs are requeued, and the worker exits with status 0."""
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


def test_a_worker_that_starts_without_redis_waits_for_it(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """It logs that it waits, and begins when Redis can be reached."""
    enqueue_snapshots(redis, 1)
    path: Any = redis.connection_pool.connection_kwargs["path"]
    with Path(tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "consumers.cli", "worker"],
            stderr=log,
            env={**os.environ, "REDIS_URL": f"unix://{tmp_path / 'proxy.sock'}?db={_database_number(redis)}"},
        )
    try:
        until(lambda: b"waits for Redis and tries again" in (tmp_path / "log").read_bytes())
        with Proxy(tmp_path / "proxy.sock", Path(path)).running():
            until(lambda: len(get_portfolio_history()) == 1)
            worker.terminate()
            assert worker.wait(10) == 0
    finally:
        worker.kill()
        worker.wait()


def _database_number(redis: Redis) -> int:
    return int(redis.connection_pool.connection_kwargs.get("db", 0))


def test_a_job_in_no_list_is_requeued(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock worker died after it had popped the job. Two scans must find it. Other jobs are not changed."""
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


def test_jobs_in_no_list_are_not_searched_while_the_queue_is_long(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading more than 1,000 ids would delay the worker. The search begins when the queue is short again."""
    monkeypatch.setattr(orphans, "ORPHAN_SECONDS", 0.0)
    (job_id,) = enqueue_snapshots(redis, 1)
    queue = history_queue(redis)
    redis.delete(queue.key)
    redis.rpush(queue.key, *(f"other-{number}" for number in range(1001)))
    found = []
    for _ in range(4):
        redis.delete("history:orphans:history:scanned")
        found.append(Orphans(redis, queue).requeue())
        if len(found) == 2:
            redis.lpop(queue.key)
    assert found == [[], [], [], [job_id]]


def test_a_job_in_no_list_is_requeued_after_redis_clock_was_set_back(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock, it was first seen two days in the future, and the last scan was then too."""
    monkeypatch.setattr(orphans, "ORPHAN_SECONDS", 0.0)
    (job_id,) = enqueue_snapshots(redis, 1)
    queue = history_queue(redis)
    redis.lpop(queue.key)
    redis.hset(orphans_key(queue.name), job_id, redis.time()[0] + 2 * 86400)
    scanned = f"{orphans_key(queue.name)}:scanned"
    redis.set(scanned, "1", ex=2 * 86400)

    assert Orphans(redis, queue).requeue() == []
    assert 0 < redis.ttl(scanned) <= 60
    redis.persist(scanned)
    assert Orphans(redis, queue).requeue() == []
    assert 0 < redis.ttl(scanned) <= 60
    found = []
    for _ in range(2):
        redis.delete(scanned)
        found.append(Orphans(redis, queue).requeue())
    assert found == [[], [job_id]]


def test_after_sigterm_a_worker_completes_its_batch(redis: Redis, database_url: str) -> None:
    """It ends with status 0 and leaves RQ's list. An idle worker ends within 5 s."""
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
    """A session keeps the settings of its start, so the worker opens a new connection after a failure."""
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


@pytest.mark.parametrize("unusable", [b"\xff\xfe", b"a\0b", b"x" * 4000, b"an id", b"a:b", b"a.b", b""])
def test_an_unusable_job_id_is_quarantined(redis: Redis, unusable: bytes) -> None:
    """It is in the queue, in lists of jobs, and among the owners. The other events are stored."""
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


def test_a_batch_is_limited_by_the_length_of_its_decompressed_texts(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has the texts compressed. The limit bounds the worker's memory and the length of a transaction."""
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
    """It is not rejected, since it is valid, but its job goes to the tail of the queue."""
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


def test_a_row_id_that_is_taken_rejects_no_event(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restore without the sequences, the worker waits until they are set, and then stores the events."""
    with get_db() as db:
        db.exec_driver_sql(
            "INSERT INTO portfolio_history (id, event_id, source, snapshot_date, timestamp, balance, total_invested,"
            " total_profit_loss, total_value, open_positions, trade_count)"
            " SELECT n, gen_random_uuid(), 'x', '2026-01-01', now(), 1, 1, 1, 1, 1, 1 FROM generate_series(1, 50) AS n"
        )
    enqueue_snapshots(redis, 3)
    waited = WorkerThread._wait_for_recovery

    def fix(thread: WorkerThread, error: Any) -> None:
        with get_db() as db:
            db.exec_driver_sql("SELECT setval(pg_get_serial_sequence('portfolio_history', 'id'), 50)")
        waited(thread, error)

    monkeypatch.setattr(WorkerThread, "_wait_for_recovery", fix)
    burst(redis)

    assert (len(get_portfolio_history()), _outcomes()) == (53, [])


def test_an_event_that_can_neither_be_stored_nor_rejected_is_dead_lettered(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the attempts of a poison event, it is in the failed registry with the reason; the others are stored."""
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


def test_without_tables_a_worker_waits_and_then_continues(redis: Redis, database_url: str) -> None:
    """It requeues the jobs and shows that it waits for the database. No job fails."""
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


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("before", [OUTCOMES_BEFORE_DUPLICATE, _CONSTRAINTS_BEFORE_DUPLICATE])
def test_a_database_that_was_not_upgraded_rejects_no_event(
    redis: Redis, producer: HistoryProducer, caplog: pytest.LogCaptureFixture, before: str, others: int
) -> None:
    """It cannot record a duplicate. The worker waits and names init-db; after that all events are stored."""
    with get_db() as db:
        insert_events(db, [event_of(a_snapshot(), source="other/1", sequence=0)])
        db.exec_driver_sql(before)
    engine().dispose()
    receipts = producer.record_many([a_snapshot(after=timedelta(seconds=n)) for n in range(others + 1)])
    producer.flush(10)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    worker._install_signal_handlers = lambda: None  # type: ignore[method-assign]  # only the main thread can
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
    assert len(get_portfolio_history()) == others + 1


def test_an_event_that_times_out_alone_does_not_delay_the_others(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another session has its row in an open transaction. Its job goes to the tail, and is stored after that."""
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


def test_a_worker_continues_after_redis_lost_everything(redis: Redis, producer: HistoryProducer) -> None:
    """It registers again, and the outbox sends its events again."""
    with _worker_process():
        assert producer.record(a_snapshot()).wait(20) == 1
        redis.flushall()
        assert producer.record(a_snapshot(after=timedelta(1))).wait(20)
        until(lambda: len(redis.smembers("rq:workers:history")) == 1)


def test_the_clock_of_a_worker_host_does_not_decide_which_jobs_are_orphans(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only Redis' clock does: a host whose clock is hours ahead requeues no job of others."""
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


def test_a_timeout_does_not_end_the_thread_that_listens_for_commands(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's own handler tolerates a lost connection but not a timeout. The worker would receive no later command."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    worker._pubsub_exception_handler(RedisTimeoutError("slow"), None, None)


def test_many_unusable_ids_do_not_end_a_burst(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is more than a batch of them before an event."""
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 10)
    redis.rpush("rq:queue:history", *["no id"] * 35)
    enqueue_snapshots(redis, 1)
    burst(redis)
    assert (len(get_portfolio_history()), redis.llen("history:quarantine:history")) == (1, 35)


def _rejected_ids() -> list[str]:
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
def test_unusable_dependencies_affect_only_the_job_that_has_them(redis: Redis, value: str) -> None:
    """It is in the failed registry with its reason and its call, and RQ can read and requeue it."""
    rejected = history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", "{}")
    redis.hset(rejected.key, "dependency_ids", value)
    enqueue_snapshots(redis, 2)
    worker = burst(redis)

    assert worker._shared.waits_for is None
    assert (_rejected_ids(), len(get_portfolio_history())) == ([rejected.id], 2)
    queue = history_queue(redis)
    assert queue.failed_job_registry.get_job_ids() == [rejected.id]
    found = queue.fetch_job(rejected.id)
    assert found is not None
    result = found.latest_result()
    assert result is not None
    assert str(result.exc_string).startswith("InvalidEvent: specversion: is missing")
    assert (found.is_failed, found.origin, found.args) == (True, "history", ["{}"])
    queue.failed_job_registry.requeue(rejected.id)


def test_a_job_whose_failure_cannot_be_written_does_not_affect_the_others(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defect is an exception, or a value that redis-py cannot send. It does not count as an outage of Redis."""
    rejected = [history_queue(redis).enqueue("os.system", str(number)).id for number in range(4)]
    enqueue_snapshots(redis, 3)
    failed_job = Completion._failed_job

    def defective(self: Any, job: Any, *args: Any) -> Any:
        if job.job_id == rejected[1]:
            raise ZeroDivisionError("a defect")
        found = failed_job(self, job, *args)
        return found | ({"fields": {b"bytes"}} if job.job_id == rejected[2] else {})

    monkeypatch.setattr(Completion, "_failed_job", defective)
    worker = burst(redis)

    assert worker._shared.waits_for is None
    assert (sorted(_rejected_ids()), len(get_portfolio_history())) == (sorted(rejected), 3)
    assert sorted(history_queue(redis).failed_job_registry.get_job_ids()) == sorted(rejected)
    assert redis.hget(Job.key_for(rejected[3]), "status") == b"failed"
    assert redis.keys("history:reserved:*") == []


def test_many_unsupported_jobs_cost_few_commands(redis: Redis) -> None:
    """They are rejected in batches, so that an event behind them does not wait long."""
    history_queue(redis).enqueue_many([Queue.prepare_data("os.system", args=("true",)) for _ in range(300)])
    redis.config_resetstat()
    burst(redis)

    assert len(_rejected_ids()) == history_queue(redis).failed_job_registry.count == 300
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] < 50


@pytest.mark.parametrize(
    "key", ["crashes", "timeouts", "owners", "quarantine", "rq:finished", "rq:failed", "rq:results", "ack", "rq:worker"]
)
def test_a_key_of_a_wrong_type_is_quarantined(redis: Redis, key: str) -> None:
    """Otherwise no event would be stored any more."""
    *_, last = enqueue_snapshots(redis, 2)
    redis.rpush("rq:queue:history", "no id")
    rejected = history_queue(redis).enqueue("os.system", "true")
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    names = {"ack": "history:ack:other/1", "rq:results": f"rq:results:{last}", "rq:worker": worker.key}
    name = names.get(key) or (f"{key}:history" if key.startswith("rq:") else f"history:{key}:history")
    register = worker._register

    def register_then_break_key(*args: Any) -> bool:
        registered = register(*args)
        redis.delete(name)
        redis.set(name, "x")
        return registered

    worker._register = register_then_break_key  # type: ignore[method-assign]  # after the start's own steps
    worker.work(burst=True, logging_level="WARNING")

    assert (_rejected_ids(), len(get_portfolio_history())) == ([rejected.id], 2)
    assert history_queue(redis).failed_job_registry.get_job_ids() == [rejected.id]
    assert redis.exists(f"{name}:quarantined") == (key != "rq:results")
    assert key != "ack" or redis.hlen(name) == 2
    assert redis.hmget(worker.key, "successful_job_count", "failed_job_count") == [b"2", b"1"]


def test_a_crash_is_counted_once_although_the_queue_cannot_be_written(redis: Redis) -> None:
    """The queue's key has another type: jobs and counts of the owner are unchanged until it is deleted."""
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
    """The key is quarantined, as it is while the worker runs."""
    enqueue_snapshots(redis, 1)
    redis.sadd("rq:worker:named", "x")
    HistoryWorker([history_queue(redis)], "named", connection=redis).work(burst=True, logging_level="WARNING")
    assert len(get_portfolio_history()) == 1
    assert redis.smembers("rq:worker:named:quarantined") == {b"x"}


def test_unusable_ids_are_kept_although_their_list_has_another_type(redis: Redis) -> None:
    """The list's key is quarantined first."""
    redis.rpush("rq:queue:history", "bad:1", "bad:2", "bad:3")
    redis.set("history:quarantine:history", "x")
    enqueue_snapshots(redis, 1)
    burst(redis)
    assert len(get_portfolio_history()) == 1
    assert sorted(redis.lrange("history:quarantine:history", 0, -1)) == [b"bad:1", b"bad:2", b"bad:3"]


@pytest.mark.parametrize("which", ["crashes", "timeouts"])
def test_a_count_that_is_not_a_number_counts_as_zero(redis: Redis, which: str) -> None:
    """This holds for crash counts and timeout counts. The job runs alone and is stored."""
    job_ids = enqueue_snapshots(redis, 2)
    redis.hset(f"history:{which}:history", job_ids[0], "abc")
    burst(redis)
    assert len(get_portfolio_history()) == 2


def test_a_queue_that_is_not_a_list_is_named_in_the_log(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """The worker does not move that key. It waits until the key is deleted, and then continues."""
    redis.set("rq:queue:history", "x")
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    working = threading.Thread(target=lambda: worker.work(burst=True, logging_level="WARNING"))
    worker._install_signal_handlers = lambda: None  # type: ignore[method-assign]  # only the main thread can
    working.start()
    until(lambda: "rq:queue:history is a string and not a list" in caplog.text)
    redis.delete("rq:queue:history")
    enqueue_snapshots(redis, 1)
    working.join(30)
    assert len(get_portfolio_history()) == 1


def test_one_unusable_reservation_list_does_not_prevent_recovery_of_the_others(redis: Redis) -> None:
    """It is quarantined; the jobs of the other dead workers are requeued."""
    job_ids = enqueue_snapshots(redis, 3)
    for owner in ("a-unusable", "b-dead", "c-unusable", "d-dead"):
        redis.hset("history:owners:history", owner, "")
        if owner.endswith("unusable"):
            redis.set(f"history:reserved:history:{owner}", "x")
        else:
            redis.lmove("rq:queue:history", f"history:reserved:history:{owner}", "RIGHT", "LEFT")
    assert sorted(requeue_expired(redis, history_queue(redis))) == sorted(job_ids[1:])
    assert requeue_expired(redis, history_queue(redis)) == []
    assert redis.hgetall("history:owners:history") == {}


def test_an_unusable_entry_in_rqs_list_of_workers_does_not_end_maintenance(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """RQ cannot read the list: that is logged once, and events are stored."""
    redis.sadd("rq:workers:history", b"\xff", "rq:worker:gone")
    redis.hset("history:owners:history", b"\xff", "")
    redis.set("history:reserved:history:unusable", "x")
    redis.hset("history:owners:history", "unusable", "")
    assert read_queue(redis, "history").reserved == 0
    enqueue_snapshots(redis, 1)
    burst(redis)

    assert len(get_portfolio_history()) == 1
    assert (
        "maintenance of queue history: step dead workers failed; it runs again in the next pass: UnicodeDecodeError"
        in caplog.text
    )


def test_each_step_of_maintenance_runs_although_others_fail(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure of a step is logged once, until the step succeeds again."""
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
def test_the_age_of_a_job_without_a_readable_time_is_unknown(redis: Redis, value: Any) -> None:
    """The number of queued jobs is known."""
    (job_id,) = enqueue_snapshots(redis, 1)
    if value is None:
        redis.delete(Job.key_for(job_id))
        redis.set(Job.key_for(job_id), "not a hash")
    else:
        redis.hset(Job.key_for(job_id), "enqueued_at", value)
    health = read_queue(redis, "history")
    assert (health.queued, health.oldest_age_seconds) == (1, None)


@pytest.mark.parametrize("junk", [b"\xff", b"x", b"1", b"{}", b"[" * 100_000, b'{"command":"stop-job"}'])
def test_an_unusable_command_does_not_end_the_listening_thread(redis: Redis, junk: bytes) -> None:
    """Otherwise the worker would receive no later command."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    worker.handle_payload({"data": junk})
