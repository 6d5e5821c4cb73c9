"""RQ's pool, `rq worker-pool`, with HistoryWorker: a dead worker is replaced, and each event is stored once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from redis import Redis
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from rq.utils import as_text
from rq.worker_pool import WorkerPool
from sqlalchemy import make_url, text

from consumers.db.engine import get_db
from consumers.operations import get_portfolio_history
from consumers.worker.history_worker import HistoryWorker
from tests.compose_file import free_port
from tests.deliveries import assert_stored_once, burst, enqueue_snapshots, history_queue
from tests.rq_programs import ignoring, registered_workers, rq_process, somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

OURS = "consumers.worker.HistoryWorker"
_LOCK = text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE")


def _sockets(process: psutil.Process) -> set[str]:
    """Return the open sockets of a process, without its standard streams."""
    folder = Path(f"/proc/{process.pid}/fd")
    return {link for fd in os.listdir(folder) if int(fd) > 2 if (link := os.readlink(folder / fd)).startswith("socket")}


def _active(pool: WorkerPool) -> int:
    pool.check_workers(respawn=False)
    return pool.number_of_active_workers


def _states(redis: Redis) -> set[str]:
    return {as_text(redis.hget(f"rq:worker:{name}", "state") or b"") for name in registered_workers(redis).values()}


def test_a_pool_replaces_a_killed_worker_and_ends_on_sigterm(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is started during a suspension, as a background process of a script, which ignores SIGINT.

    No two of its processes share a connection: each worker opens its own after the fork. All of them have one metrics
    port in their settings: the first worker serves metrics there, and the others work without.
    """
    monkeypatch.setenv("HISTORY_METRICS_PORT", str(free_port()))
    suspend(redis)
    enqueue_snapshots(redis, 10)
    log = tmp_path / "log"
    with (
        ignoring(signal.SIGINT),
        rq_process("worker-pool", "--num-workers", "3", "--verbose", "-w", OURS, "history", log=log) as pool,
    ):
        until(lambda: len(registered_workers(redis)) == 3 and _states(redis) == {"suspended"})
        assert history_queue(redis).count == 10
        resume(redis)
        until(lambda: len(get_portfolio_history()) == 10)

        with get_db() as db:
            db.execute(_LOCK)
            recorded = 10
            while len(redis.keys("history:reserved:*")) < 6:  # two threads of three workers; one may take two events
                enqueue_snapshots(redis, 1, first=recorded)
                recorded += 1
                until(lambda: history_queue(redis).count == 0)
            enqueue_snapshots(redis, 14, first=recorded)
            recorded += 14
            workers = pool.children()
            until(lambda: all(len(_sockets(one)) >= 4 for one in workers))  # two threads, with Redis and PostgreSQL
            sockets = [_sockets(one) for one in (pool, *workers)]
            assert len(set().union(*sockets)) == sum(map(len, sockets))

            victim = workers[0].pid
            name = registered_workers(redis)[victim]
            os.kill(victim, signal.SIGKILL)
            redis.delete(*redis.keys(f"history:lease:history:{name}:*"))  # instead of waiting until they expire
            until(lambda: len(registered_workers(redis)) == 4)  # the dead worker stays in RQ's list for 2 minutes
        until(lambda: len(get_portfolio_history()) == recorded)
        assert f"with pid {victim} is dead" in log.read_text()

        workers = pool.children()
        assert len(workers) == 3
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(30) == 0
        assert not any(one.is_running() for one in workers)
    assert_stored_once(redis, recorded)
    assert set(registered_workers(redis)) == {victim}
    assert log.read_text().count("does not run a scheduler") == 4
    # If the killed worker had the port, then its successor has it.
    assert log.read_text().count("cannot serve metrics") in (2, 3)
    assert "Traceback" not in log.read_text()
    assert "sent heartbeat" in log.read_text()  # which RQ logs at DEBUG


def test_a_pool_without_a_database_restarts_its_workers_slowly(
    redis: Redis, tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker says in one line what to do. A setting that is added to .env meanwhile takes effect."""
    monkeypatch.delenv("DATABASE_URL")
    log = tmp_path / "log"
    with rq_process("worker-pool", "-n", "2", "--quiet", "-w", OURS, "history", log=log) as pool:
        until(lambda: log.read_text().count("error: DATABASE_URL is not set") == 2)
        workers = pool.children()
        (tmp_path / ".env").write_text(f"DATABASE_URL={database_url}\n")
        time.sleep(4)  # the pool looks for dead workers every second
        assert pool.children() == workers
        until(lambda: len(registered_workers(redis)) == 2, 40)
        assert log.read_text().count("stop the pool, correct this and start it again (next attempt in 15 s)") == 2
        (tmp_path / ".env").unlink()
        for worker in pool.children():
            worker.kill()
        until(lambda: log.read_text().count("error: DATABASE_URL is not set") == 4)
        assert "Traceback" not in log.read_text()
        # The pause does not delay the end. RQ shows a traceback of a worker that it ends while it starts.
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(10) == 0


def test_a_burst_of_a_pool_without_a_database_ends_at_once(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL")
    with rq_process("worker-pool", "--burst", "-w", OURS, "history", log=tmp_path / "log") as pool:
        assert pool.wait(12) == 0  # RQ's pool does not report a failed worker
    assert (tmp_path / "log").read_text().count("error: DATABASE_URL is not set") == 1


@pytest.mark.parametrize("wrong", ["name", "no tables"])
def test_the_workers_of_a_pool_wait_for_their_database(
    redis: Redis, empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """None ends and none is started again; each says once what is missing."""
    monkeypatch.setenv("DATABASE_URL", empty_database_url)
    message = "run trading-history init-db"
    if wrong == "name":
        another = make_url(empty_database_url).set(database="no_such_database")
        monkeypatch.setenv("DATABASE_URL", another.render_as_string(hide_password=False))
        message = 'database "no_such_database" does not exist: correct the name of the database in DATABASE_URL'
    log = tmp_path / "log"
    with rq_process("worker-pool", "-n", "2", "-w", OURS, "history", log=log) as pool:
        until(lambda: log.read_text().count(message) == 2)
        workers = pool.children()
        time.sleep(4)  # two attempts of each worker
        assert (pool.children(), log.read_text().count(message)) == (workers, 2)
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(20) == 0


def test_a_second_sigint_ends_a_pool_at_once_and_requeues_its_jobs(redis: Redis, tmp_path: Path) -> None:
    """An operator presses Ctrl-C twice while the database does not answer."""
    with get_db() as db:
        db.execute(_LOCK)
        enqueue_snapshots(redis, 4)
        with rq_process("worker-pool", "-n", "2", "--quiet", "-w", OURS, "history", log=tmp_path / "log") as pool:
            until(somebody_waits_for_a_lock)
            pool.send_signal(signal.SIGINT)
            time.sleep(1.2)  # within 1 s it counts as the first one, which the terminal and the pool both send
            pool.send_signal(signal.SIGINT)
            assert pool.wait(10) == 0
        log = (tmp_path / "log").read_text()
        assert ("cold shut down" in log, "Listening" in log) == (True, False)
        assert history_queue(redis).count == 4
    burst(redis)
    assert_stored_once(redis, 4)


def test_workers_can_be_added_to_and_removed_from_a_pool(redis: Redis) -> None:
    """Only RQ's class can do this, not its command. The pool's process uses the database before and after that."""
    pool = WorkerPool(["history"], connection=redis, worker_class=HistoryWorker, serializer=JSONSerializer)
    assert get_portfolio_history() == []
    try:
        pool.start_workers(burst=False, logging_level="WARNING")
        pool.start_worker(burst=False, logging_level="WARNING")
        until(lambda: len(registered_workers(redis)) == 2)
        enqueue_snapshots(redis, 20)
        pool.stop_worker(next(iter(pool.worker_dict.values())))
        until(lambda: len(registered_workers(redis)) == 1)
        enqueue_snapshots(redis, 20, first=20)
        until(lambda: len(get_portfolio_history()) == 40)
        until(lambda: _active(pool) == 1)
    finally:
        for worker in pool.worker_dict.values():
            pool.stop_worker(worker)
        until(pool.all_workers_have_stopped)
    assert_stored_once(redis, 40)
