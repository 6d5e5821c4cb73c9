"""The threads of one worker: they run in parallel, except for a poison candidate, and operators see one worker."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import text

from consumers.db.engine import engine, get_db
from consumers.db.inserts import insert_events
from consumers.embedded.child_processes import stop, worker_process
from consumers.errors import StoreUnavailable
from consumers.operations import get_portfolio_history
from consumers.ops.rejections import rejections
from consumers.worker import batch, maintenance
from consumers.worker import worker_thread as thread_module
from consumers.worker.batch import process_batch
from consumers.worker.history_worker import HistoryWorker
from consumers.worker.reservations import Reservations, requeue_expired
from consumers.worker.shared_state import SharedState
from consumers.worker.worker_thread import WorkerThread
from producers.events import event_of
from tests.deliveries import burst, enqueue_snapshots, history_queue
from tests.factories import a_snapshot
from tests.faults.proxy import Proxy
from tests.rq_programs import somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")


@contextmanager
def _running(worker: HistoryWorker) -> Iterator[threading.Thread]:
    """Run the worker in a thread of this process, and stop it at the end of the block."""
    worker._install_signal_handlers = lambda: None  # type: ignore[method-assign]  # only the main thread can
    thread = threading.Thread(target=worker.work, kwargs={"logging_level": "WARNING"})
    thread.start()
    try:
        yield thread
    finally:
        worker._stopping.set()
        thread.join(30)
    assert not thread.is_alive()


def test_a_thread_continues_while_the_other_waits_for_the_database(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An uncommitted insert of the first event in another session delays the first batch, not the second."""
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 1)
    enqueue_snapshots(redis, 2)
    with engine().connect() as db:
        insert_events(db, [event_of(a_snapshot(), source="other/2", sequence=1)])
        with _running(HistoryWorker([history_queue(redis)], connection=redis)) as thread:
            until(lambda: [row["sequence"] for row in get_portfolio_history()] == [1], seconds=4)
            db.rollback()
            until(lambda: len(get_portfolio_history()) == 2)
    assert not thread.is_alive()


def test_a_poison_candidate_runs_while_no_other_job_runs(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a job that runs at the same time could be the cause of a crash."""
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 5)
    job_ids = enqueue_snapshots(redis, 60)
    candidates = {job_ids[10], job_ids[11], job_ids[40]}
    for job_id in candidates:
        redis.hset("history:crashes:history", job_id, 0)
    running: list[set[str]] = []
    with_candidate: list[set[str]] = []
    together: list[int] = []

    def watched(deliveries: Sequence[Any], **options: Any) -> Iterator[Any]:
        mine = {delivery.job_id for delivery in deliveries}
        running.append(mine)
        time.sleep(0.02)  # long enough for the other thread to begin
        together.append(len(running))
        if any(one & candidates for one in running):
            with_candidate.append(set().union(*running))
        yield from process_batch(deliveries, **options)
        running.remove(mine)

    monkeypatch.setattr(thread_module, "process_batch", watched)
    burst(redis)

    assert sorted(map(sorted, with_candidate)) == sorted([[job_id] for job_id in candidates])
    assert max(together) == 2
    assert len(get_portfolio_history()) == 60


def test_a_crash_counts_only_against_a_poison_candidate_that_ran_alone(redis: Redis) -> None:
    """A crash of a job that was alone by chance does not count, nor one before the candidate begins to run."""
    (job_id,) = enqueue_snapshots(redis, 1)
    counts = []
    for alone in (False, False, True):
        dying = Reservations(redis, history_queue(redis), "dying")
        assert [job.job_id for job in dying.reserve(1).jobs] == [job_id]
        if alone:
            dying.run_alone()
            dying.renew_lease()
        redis.delete(*redis.keys("history:lease:*"))
        assert requeue_expired(redis, history_queue(redis)) == [job_id]
        counts.append(redis.hget("history:crashes:history", job_id))
    assert counts == [b"0", b"0", b"1"]


def test_a_worker_is_busy_while_one_thread_is_busy(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state names the server that it waits for, until a job is completed."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    shared, seen = worker._shared, list[str]()
    monkeypatch.setattr(worker, "set_state", seen.append)
    shared.publish()
    with shared.working(alone=False):
        with shared.working(alone=False):
            pass
        shared.note_outage(StoreUnavailable("no route"))
        shared.note_outage(StoreUnavailable("no route"))
        shared.note_progress(worked=False)  # the other thread found no job: it has not used the database
        assert seen[-1] == "waiting for the database"
        shared.note_progress(worked=True)
    assert seen == ["idle", "busy", "waiting for the database", "busy", "idle"]


def test_a_stop_at_the_moment_of_the_commit_requeues_no_stored_event(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue_snapshots(redis, 5)
    worker = HistoryWorker([history_queue(redis)], connection=redis)

    def stopped(events: Sequence[Any], results: Sequence[Any]) -> None:
        worker._stopping.set()

    monkeypatch.setattr(batch, "_log", stopped)
    worker.work(logging_level="WARNING")
    assert len(get_portfolio_history()) == 5
    assert history_queue(redis).count == 0


def test_an_outage_is_logged_once_although_both_threads_meet_it(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The threads reserve the one job in turn. A thread that finds no job does not end the outage."""
    enqueue_snapshots(redis, 1)
    tries = []
    noted: list[tuple[bool, bool]] = []
    note_progress = SharedState.note_progress

    def watched(shared: SharedState, *, worked: bool) -> bool:
        noted.append((worked, note_progress(shared, worked=worked)))
        return noted[-1][1]

    def failing(deliveries: Sequence[Any], **options: Any) -> Iterator[Any]:
        tries.append(len(deliveries))
        if len(tries) == 4:
            until(lambda: (False, False) in noted)
        if len(tries) < 8:
            time.sleep(0.05)
            raise StoreUnavailable("no answer")
        yield from process_batch(deliveries, **options)

    monkeypatch.setattr(SharedState, "note_progress", watched)
    monkeypatch.setattr(thread_module, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(thread_module, "process_batch", failing)
    monkeypatch.setattr(thread_module, "_LAST_BACKOFF_SECONDS", 0.5)
    with _running(HistoryWorker([history_queue(redis)], connection=redis)):
        until(lambda: len(get_portfolio_history()) == 1)
        until(lambda: "continues after" in caplog.text)
    logged = [
        record.message.split()[2:5] for record in caplog.records if record.name == "consumers.worker.shared_state"
    ]
    assert [words[:2] for words in logged] == [["waits", "for"], ["continues", "after"]]


def test_a_worker_waits_for_redis_if_its_maintenance_cannot_reach_it(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It continues, and makes the next pass."""
    run, passes = maintenance.Maintenance.run, list[float]()

    def failing(self: maintenance.Maintenance) -> None:
        run(self)
        self.due_at = time.monotonic()
        passes.append(self.due_at)
        if len(passes) == 2:
            raise RedisConnectionError("connection lost")

    monkeypatch.setattr(maintenance.Maintenance, "run", failing)
    with _running(HistoryWorker([history_queue(redis)], connection=redis)):
        until(lambda: len(passes) > 2)
        enqueue_snapshots(redis, 1)
        until(lambda: len(get_portfolio_history()) == 1)
        until(lambda: "continues after" in caplog.text)
    assert "waits for Redis and tries again: connection lost" in caplog.text


def test_the_state_of_a_worker_is_suspended_during_a_suspension_and_idle_afterwards(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is suspended it waits for no server, even if it did before."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    seen = list[str]()
    monkeypatch.setattr(worker, "set_state", seen.append)
    with _running(worker):
        worker._shared.note_outage(StoreUnavailable("no route"))
        redis.set("rq:suspended", 1)
        until(lambda: seen[-1] == "suspended")
        redis.delete("rq:suspended")
        until(lambda: seen[-1] == "idle")
    assert "waiting for the database" in seen


def test_a_worker_registers_again_while_a_thread_writes_a_heartbeat(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has lost the registration. A thread writes a heartbeat into its key before the worker registers again."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    register = worker.register_birth

    def after_a_heartbeat() -> None:
        redis.hset(worker.key, "last_heartbeat", "2026-11-22T17:02:46.101234Z")
        register()  # type: ignore[no-untyped-call]  # RQ's

    with _running(worker):
        until(lambda: redis.scard("rq:workers") == 1)
        monkeypatch.setattr(worker, "register_birth", after_a_heartbeat)
        redis.flushall()
        worker._maintenance.due_at = 0.0
        enqueue_snapshots(redis, 1)  # ends a thread's wait, not the main thread's
        until(lambda: redis.scard("rq:workers") == 1)
        until(lambda: redis.hget(worker.key, "state") == b"idle")
        assert redis.hexists(worker.key, "death") is False
        until(lambda: len(get_portfolio_history()) == 1)


def test_a_stopping_worker_waits_for_its_threads_without_polling(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polling would take processor time from the thread that has to finish."""
    enqueue_snapshots(redis, 1)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    checks = []
    monkeypatch.setattr(maintenance, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(worker, "_maintain", lambda: checks.append(1))
    release = threading.Event()

    def slow(deliveries: Sequence[Any], **options: Any) -> Iterator[Any]:
        worker._stopping.set()
        release.wait(10)
        yield from process_batch(deliveries, **options)

    monkeypatch.setattr(thread_module, "process_batch", slow)
    with _running(worker):
        until(worker._stopping.is_set)
        checks.clear()
        time.sleep(0.3)
        checked = len(checks)
        release.set()
    assert checked <= 1
    assert len(get_portfolio_history()) == 1


def test_a_stop_requeues_a_poison_candidate_that_has_not_begun(redis: Redis) -> None:
    (job_id,) = enqueue_snapshots(redis, 1)
    redis.hset("history:crashes:history", job_id, 0)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    stopping = threading.Event()
    thread = WorkerThread(worker, history_queue(redis), worker._shared, stopping, thread_module.Limits(True, None, 0))
    reserved = thread.reservations.reserve(1)
    with worker._shared.working(alone=False):
        turn = threading.Thread(target=thread._run_reservation, args=(reserved,))
        turn.start()
        until(lambda: worker._shared._alone)
        stopping.set()
    turn.join(10)
    assert (history_queue(redis).job_ids, get_portfolio_history()) == ([job_id], [])
    assert redis.hgetall("history:crashes:history") == {job_id.encode(): b"0"}


def test_a_worker_that_watches_its_parent_ends_with_status_0(redis: Redis, tmp_path: Path) -> None:
    """It reads standard input until its end, which must not disturb the exit of the interpreter."""
    with worker_process(tmp_path / "log") as worker:
        until(lambda: redis.scard("rq:workers") == 1)
        stop(worker)
    assert worker.returncode == 0
    assert "Fatal" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_a_worker_while_redis_is_frozen(redis: Redis, tmp_path: Path, busy: bool) -> None:
    """It ends after one command's limit of 10 s, not after several. Its leases expire later."""
    socket = tmp_path / "proxy.sock"
    target, number = (redis.connection_pool.connection_kwargs[name] for name in ("path", "db"))
    proxy = Proxy(socket, Path(target))
    with proxy.running(), ExitStack() as stack:
        environment = {**os.environ, "REDIS_URL": f"unix://{socket}?db={number}"}
        worker = subprocess.Popen([sys.executable, "-m", "consumers.cli", "worker"], env=environment)
        stack.callback(worker.wait)
        stack.callback(worker.kill)
        until(lambda: redis.scard("rq:workers") == 1)
        if busy:
            db = stack.enter_context(get_db())
            db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
            enqueue_snapshots(redis, 1)
            until(somebody_waits_for_a_lock)
        proxy.set_mode("swallow")
        began = time.monotonic()
        worker.terminate()
        assert worker.wait(40) == 0
        assert time.monotonic() - began < 18


@pytest.mark.timeout(30)
def test_a_defect_of_a_thread_ends_the_worker_with_the_error(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with only one thread left would look healthy."""
    job_ids = enqueue_snapshots(redis, 3)
    work, defective = WorkerThread._contain_defects, list[WorkerThread]()

    def once(thread: WorkerThread, reserved: Any) -> None:
        if not defective:
            defective.append(thread)
            raise ZeroDivisionError("a defect")
        work(thread, reserved)

    monkeypatch.setattr(WorkerThread, "_contain_defects", once)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        HistoryWorker([history_queue(redis)], connection=redis).work(logging_level="CRITICAL")
    assert history_queue(redis).count + len(get_portfolio_history()) == len(job_ids)
    assert (redis.keys("history:lease:*"), redis.smembers("rq:workers")) == ([], set())


def test_a_defect_outside_of_the_processing_rejects_only_the_event_that_causes_it(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The jobs of its batch are tried one by one. The event is rejected after three attempts alone."""
    job_ids = enqueue_snapshots(redis, 3)

    def defective(deliveries: Sequence[Any], **options: Any) -> Iterator[Any]:
        if any(one.job_id == job_ids[1] and one.error is None for one in deliveries):
            raise ZeroDivisionError("a defect")
        return process_batch(deliveries, **options)

    monkeypatch.setattr(thread_module, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(thread_module, "process_batch", defective)
    burst(redis)
    assert sorted(row["sequence"] for row in get_portfolio_history()) == [0, 2]
    (rejection,) = rejections()
    assert (rejection.job_id, rejection.reason.startswith("poison event: 3 workers crashed or failed")) == (
        job_ids[1],
        True,
    )
    (line,) = [one for one in caplog.messages if "failed on a batch" in one]
    assert line.endswith(" failed on a batch and tries its jobs one by one: ZeroDivisionError: a defect")


def test_a_thread_that_works_alone_first_waits_for_the_working_threads(redis: Redis) -> None:
    shared = SharedState(HistoryWorker([history_queue(redis)], connection=redis))
    order: list[str] = []

    def alone() -> None:
        with shared.working(alone=True):
            order.append("alone")

    def normal() -> None:
        with shared.working(alone=False):
            order.append("normal")

    with shared.working(alone=False):
        first = threading.Thread(target=alone)
        first.start()
        until(lambda: shared._alone)
        second = threading.Thread(target=normal)
        second.start()
        time.sleep(0.05)  # a thread that does not wait has begun by then
        order.append("working")
    first.join(10)
    second.join(10)
    assert order == ["working", "alone", "normal"]
    idle = shared.idle_seconds()
    with shared.working(alone=False):
        assert shared.idle_seconds() == 0.0 < idle


def test_max_jobs_is_exact(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_module, "BATCH_JOBS", 4)
    enqueue_snapshots(redis, 30)
    assert HistoryWorker([history_queue(redis)], connection=redis).work(logging_level="WARNING", max_jobs=10)
    assert (len(get_portfolio_history()), history_queue(redis).count) == (10, 20)
    rows = get_portfolio_history()
    assert {row["timestamp"] - rows[-1]["timestamp"] for row in rows} == {timedelta(seconds=n) for n in range(10)}
