"""Starting a HistoryWorker, and RQ's commands for a running one: suspend, resume, shutdown, info.

A test that runs with both worker classes expects of HistoryWorker what RQ's own worker does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from redis.client import PubSubWorkerThread
from rq import Queue, SimpleWorker, Worker
from rq.command import send_shutdown_command
from rq.serializers import JSONSerializer
from rq.suspension import suspend
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.operations import get_portfolio_history
from consumers.worker.history_worker import HistoryWorker
from producers.events import encode, event_of
from tests.documents import block
from tests.factories import a_snapshot
from tests.rq_programs import WORKER_NAME, ignoring, rq, rq_worker, somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

OURS = "consumers.worker.HistoryWorker"
ROOT = Path(__file__).parents[2]


def _queue(redis: Redis) -> Queue:
    return Queue("history", connection=redis, serializer=JSONSerializer)


def _enqueue(redis: Redis, *hours: int) -> None:
    for hour in hours:
        event = event_of(a_snapshot(after=timedelta(hours=hour)), source="other/1", sequence=hour)
        _queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", encode(event), job_id=f"job-{hour}")


def _states(redis: Redis) -> list[str]:
    return [worker.get_state() for worker in Worker.all(connection=redis)]


def _wait_for_two_checks(redis: Redis) -> None:
    """Return after the suspended worker has checked twice whether it still is: each check writes a heartbeat."""
    key = f"rq:worker:{WORKER_NAME}"
    for _ in range(2):
        before = redis.hget(key, "last_heartbeat")
        until(lambda before=before: redis.hget(key, "last_heartbeat") != before)  # type: ignore[misc]


def test_a_suspended_worker_takes_no_job_until_it_is_resumed(redis: Redis, tmp_path: Path) -> None:
    """After `rq suspend` its state is suspended; after `rq resume` it works again."""
    with rq_worker(OURS, tmp_path / "log"):
        _enqueue(redis, 0)
        until(lambda: len(get_portfolio_history()) == 1 and _states(redis) == ["idle"])
        rq("suspend")
        until(lambda: _states(redis) == ["suspended"])
        _enqueue(redis, 1, 2)
        _wait_for_two_checks(redis)
        assert (_queue(redis).job_ids, _states(redis)) == (["job-1", "job-2"], ["suspended"])
        assert len(get_portfolio_history()) == 1

        rq("resume")
        until(lambda: len(get_portfolio_history()) == 3 and _states(redis) == ["idle"])
    assert _queue(redis).finished_job_registry.count == 3


def test_a_suspended_worker_takes_no_job_when_it_is_stopped(redis: Redis, tmp_path: Path) -> None:
    """After SIGTERM, it ends with status 0, and the queue is unchanged."""
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
    """`work` returns False, since no job was completed, and raises no error."""
    suspend(redis)
    _enqueue(redis, 1)
    worker = worker_class([_queue(redis)], connection=redis, serializer=JSONSerializer)

    assert worker.work(burst=True, logging_level="CRITICAL") is False
    assert _queue(redis).job_ids == ["job-1"]
    assert _states(redis) == []


def test_the_thread_that_listens_for_commands_ends_with_its_worker(redis: Redis) -> None:
    """Otherwise the end of a worker would take a second longer."""
    for _ in range(5):
        HistoryWorker([_queue(redis)], connection=redis).work(burst=True, logging_level="WARNING")
        assert not [thread for thread in threading.enumerate() if isinstance(thread, PubSubWorkerThread)]


def test_the_shutdown_command_ends_an_idle_worker(redis: Redis, tmp_path: Path) -> None:
    """It ends within 5 s with status 0 and leaves RQ's list, even if it ignores SIGINT as background processes do."""
    with ignoring(signal.SIGINT), rq_worker(OURS, tmp_path / "log") as process:
        until(lambda: _states(redis) == ["idle"])
        send_shutdown_command(redis, WORKER_NAME)
        assert process.wait(5) == 0
    assert _states(redis) == []


def test_after_the_shutdown_command_a_worker_completes_its_batch(redis: Redis, tmp_path: Path) -> None:
    """It takes no later job, and ends with status 0."""
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


def test_the_commands_of_the_document_start_a_worker_that_stores_events(redis: Redis, tmp_path: Path) -> None:
    """The document installs an extra that exists. Its worker runs here until the queue is empty."""
    install, *commands = block("consumers/README.md", "run a worker").splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert re.findall(r"\[(\w+)\]", install)[0] in extras
    _enqueue(redis, 1)
    program = str(Path(sys.executable).with_name("trading-history"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (commands[0], f"{commands[1]} --burst"):
        line = [program, *command.split()[1:]]
        assert command.split()[0] == "trading-history"
        subprocess.run(line, check=True, capture_output=True, timeout=60, cwd=tmp_path, env=environment)
    assert (len(commands), len(get_portfolio_history())) == (2, 1)


def test_rqs_commands_accept_our_class(redis: Redis, tmp_path: Path) -> None:
    """RQ_WORKER_CLASS may be set for all of them: `rq info` then reads the workers through our class."""
    with rq_worker(OURS, tmp_path / "log"):
        until(lambda: _states(redis) == ["idle"])

        assert [worker.name for worker in HistoryWorker.all(connection=redis)] == [WORKER_NAME]
        assert f"worker {WORKER_NAME} " in rq("info", "--raw", "--worker-class", OURS)
