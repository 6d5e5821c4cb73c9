"""How operators control a HistoryWorker with RQ's own commands: suspend, resume, shutdown, and looking at it.

Where RQ's own worker stands beside it, it is the measure.
"""

from __future__ import annotations

import signal
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue, SimpleWorker, Worker
from rq.command import send_shutdown_command
from rq.serializers import JSONSerializer
from rq.suspension import suspend
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.operations import get_portfolio_history
from consumers.worker.history_worker import HistoryWorker
from producers.events import encode, event_of
from tests.factories import a_snapshot
from tests.rq_programs import WORKER_NAME, ignoring, rq, rq_worker, somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

OURS = "consumers.worker.HistoryWorker"


def _queue(redis: Redis) -> Queue:
    return Queue("history", connection=redis, serializer=JSONSerializer)


def _enqueue(redis: Redis, *hours: int) -> None:
    for hour in hours:
        event = event_of(a_snapshot(after=timedelta(hours=hour)), source="other/1", sequence=hour)
        _queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", encode(event), job_id=f"job-{hour}")


def _states(redis: Redis) -> list[str]:
    return [worker.get_state() for worker in Worker.all(connection=redis)]


def _looks_again(redis: Redis) -> None:
    """Return once the suspended worker has looked twice whether it still is: each look is a heartbeat."""
    key = f"rq:worker:{WORKER_NAME}"
    for _ in range(2):
        before = redis.hget(key, "last_heartbeat")
        until(lambda before=before: redis.hget(key, "last_heartbeat") != before)  # type: ignore[misc]


def test_a_suspended_worker_takes_nothing_new_until_it_is_resumed(redis: Redis, tmp_path: Path) -> None:
    """`rq suspend` and `rq resume`; its state says so meanwhile."""
    with rq_worker(OURS, tmp_path / "log"):
        _enqueue(redis, 0)
        until(lambda: len(get_portfolio_history()) == 1 and _states(redis) == ["idle"])
        rq("suspend")
        until(lambda: _states(redis) == ["suspended"])
        _enqueue(redis, 1, 2)
        _looks_again(redis)
        assert (_queue(redis).job_ids, _states(redis)) == (["job-1", "job-2"], ["suspended"])
        assert len(get_portfolio_history()) == 1

        rq("resume")
        until(lambda: len(get_portfolio_history()) == 3 and _states(redis) == ["idle"])
    assert _queue(redis).finished_job_registry.count == 3


def test_a_suspended_worker_that_is_stopped_takes_nothing_on_its_way_out(redis: Redis, tmp_path: Path) -> None:
    """SIGTERM: exit status 0, and the queue is as it was."""
    with rq_worker(OURS, tmp_path / "log") as process:
        until(lambda: _states(redis) == ["idle"])
        suspend(redis)
        until(lambda: _states(redis) == ["suspended"])
        _enqueue(redis, 1, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert (_queue(redis).job_ids, len(get_portfolio_history())) == (["job-1", "job-2"], 0)
    assert _states(redis) == []


@pytest.mark.parametrize("worker_class", [SimpleWorker, HistoryWorker])
def test_a_burst_during_a_suspension_ends_at_once(redis: Redis, worker_class: type[SimpleWorker]) -> None:
    """Without an error: it has done nothing, and says so."""
    suspend(redis)
    _enqueue(redis, 1)
    worker = worker_class([_queue(redis)], connection=redis, serializer=JSONSerializer)

    assert worker.work(burst=True, logging_level="CRITICAL") is False
    assert _queue(redis).job_ids == ["job-1"]
    assert _states(redis) == []


def test_the_shutdown_command_ends_an_idle_worker(redis: Redis, tmp_path: Path) -> None:
    """Exit status 0 within moments, and it is gone from RQ's list; also in a script's background, without SIGINT."""
    with ignoring(signal.SIGINT), rq_worker(OURS, tmp_path / "log") as process:
        until(lambda: _states(redis) == ["idle"])
        send_shutdown_command(redis, WORKER_NAME)
        assert process.wait(5) == 0
    assert _states(redis) == []


def test_after_the_shutdown_command_a_worker_finishes_its_batch(redis: Redis, tmp_path: Path) -> None:
    """That and nothing that comes later; exit status 0."""
    log = tmp_path / "log"
    with rq_worker(OURS, log) as process:
        until(lambda: _states(redis) == ["idle"])
        with get_db() as db:
            db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
            _enqueue(redis, 0)
            until(somebody_waits_for_a_lock)
            assert _states(redis) == ["busy"]
            send_shutdown_command(redis, WORKER_NAME)
            until(lambda: b"received shutdown command" in log.read_bytes())
            _enqueue(redis, 1)
        assert process.wait(20) == 0
    assert (len(get_portfolio_history()), _queue(redis).job_ids) == (1, ["job-1"])
    assert _queue(redis).finished_job_registry.get_job_ids() == ["job-0"]
    assert (_states(redis), redis.keys("history:reserved:*"), redis.keys("history:lease:*")) == ([], [], [])


def test_rqs_commands_may_name_our_class_too(redis: Redis, tmp_path: Path) -> None:
    """RQ_WORKER_CLASS may be set for all of them: `rq info` then lists the worker through our class."""
    with rq_worker(OURS, tmp_path / "log"):
        until(lambda: _states(redis) == ["idle"])

        assert [worker.name for worker in HistoryWorker.all(connection=redis)] == [WORKER_NAME]
        assert f"worker {WORKER_NAME} " in rq("info", "--raw", "--worker-class", OURS)
