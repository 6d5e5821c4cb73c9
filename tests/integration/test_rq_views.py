"""Tools that know RQ only, `rq info`, rq-dashboard and an exporter for Prometheus: they see our queue correctly."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from rq import Queue, Worker

from consumers.operations import get_portfolio_history
from tests.compose_file import free_port
from tests.dashboard_server import SNAPSHOT_FUNCTION
from tests.deliveries import burst, enqueue_snapshots, history_queue
from tests.relaying import a_worker
from tests.rq_programs import registered_workers, rq, until

pytestmark = pytest.mark.usefixtures("database_url")


def _leave_one_of_each(redis: Redis) -> None:
    """Leave two queued, one finished and one failed job."""
    history_queue(redis).enqueue(SNAPSHOT_FUNCTION, "{}")
    enqueue_snapshots(redis, 1)
    burst(redis)
    enqueue_snapshots(redis, 2, first=1)


def test_rq_info_counts_jobs_and_workers(redis: Redis, tmp_path: Path) -> None:
    """Queued jobs by queue; a worker with its queue and state; a suspension ends nothing."""
    _leave_one_of_each(redis)
    assert "queue history 2, 0 executing, 1 finished, 1 failed" in rq("info", "--raw") or rq("info", "--raw")
    rq("suspend")
    with a_worker(redis, tmp_path / "log"):
        until(lambda: "suspended" in rq("info", "--raw"))
        assert (len(get_portfolio_history()), "queue history 2" in rq("info", "--raw")) == (1, True)
        rq("resume")
        until(lambda: len(get_portfolio_history()) == 3)
        until(lambda: "idle" in rq("info", "--raw"))
        assert "queue history 0" in rq("info", "--raw")


def _exported(redis: Redis) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return jobs and workers as rq-exporter 3.1 reads them. It cannot be installed beside RQ 3: it needs RQ 2."""
    jobs = {}
    for one in Queue.all(redis):
        queue = Queue(connection=redis, name=one.name)
        registries = {
            "finished": queue.finished_job_registry,
            "failed": queue.failed_job_registry,
            "started": queue.started_job_registry,
            "deferred": queue.deferred_job_registry,
            "scheduled": queue.scheduled_job_registry,
        }
        counts = {name: registry.get_job_count(cleanup=False) for name, registry in registries.items()}
        jobs[one.name] = {"queued": queue.count, **counts}
    workers = [
        {
            "name": one.name,
            "queues": one.queue_names(),
            "state": one.get_state(),
            "successful": one.successful_job_count,
            "failed": one.failed_job_count,
            "worked": one.total_working_time > 0,
        }
        for one in Worker.all(redis)
    ]
    return jobs, workers


def test_an_exporter_counts_jobs_and_workers(redis: Redis, tmp_path: Path) -> None:
    """By state, queue and worker."""
    _leave_one_of_each(redis)
    counts = {"queued": 2, "finished": 1, "failed": 1, "started": 0, "deferred": 0, "scheduled": 0}
    assert _exported(redis) == ({"history": counts}, [])
    with a_worker(redis, tmp_path / "log"):
        until(lambda: len(get_portfolio_history()) == 3)
        until(lambda: _exported(redis)[1][0]["state"] == "idle")
        jobs, workers = _exported(redis)
        (name,) = registered_workers(redis).values()
    assert jobs == {"history": counts | {"queued": 0, "finished": 3}}
    assert workers == [
        {"name": name, "queues": ["history"], "state": "idle", "successful": 2, "failed": 0, "worked": True}
    ]


@contextmanager
def _stock_dashboard(log: Path) -> Iterator[httpx.Client]:
    """Run rq-dashboard itself, as its own documentation says for JSON jobs."""
    port = free_port()
    command = ["rq-dashboard", "--json", "--bind", "127.0.0.1", "--port", str(port), "--redis-url"]
    program = str(Path(sys.executable).with_name(command[0]))
    with log.open("wb") as output:
        process = subprocess.Popen([program, *command[1:], os.environ["REDIS_URL"]], stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            until(lambda: process.poll() is not None or _answers(client), 40)
            assert process.poll() is None, log.read_text()
            yield client
    finally:
        process.kill()
        process.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/").status_code < 500
    except httpx.TransportError:
        return False


def test_stock_dashboard_counts_jobs_and_workers(redis: Redis, tmp_path: Path) -> None:
    """Its pages of queues, workers and jobs answer, also for a HistoryWorker that is idle."""
    _leave_one_of_each(redis)
    with _stock_dashboard(tmp_path / "dashboard") as client:
        (queue,) = client.get("/0/data/queues.json").json()["queues"]
        failed = client.get("/0/data/jobs/history/failed/10/asc/1.json").json()["jobs"]
        with a_worker(redis, tmp_path / "log"):
            until(lambda: len(get_portfolio_history()) == 3)
            (worker,) = client.get("/0/data/workers.json").json()["workers"]
    assert (queue["name"], queue["count"], queue["failed_job_registry_count"]) == ("history", 2, 1)
    assert (len(failed), worker["queues"], worker["state"] in ("idle", "busy")) == (1, ["history"], True)
