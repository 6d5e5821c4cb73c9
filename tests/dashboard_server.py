"""Runs `trading-history dashboard` as a process, lists its addresses, and writes jobs of any content to Redis."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from rq.job import Job
from rq.registry import FailedJobRegistry

from tests.rq_programs import end

PASSWORD = "a-pass:word-of-this-run-ü"
QUEUE_KEY = "rq:queue:history"
FAILED_KEY = FailedJobRegistry.key_template.format("history")
SNAPSHOT_FUNCTION = "consumers.handlers.record_portfolio_snapshot"


class Dashboard:
    """Running `trading-history dashboard`, its address and its log."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8")

    def client(self) -> httpx.Client:
        """Return a client that sends the login and the headers of the dashboard's own pages."""
        return httpx.Client(
            base_url=self.url,
            auth=("history", PASSWORD),
            headers={"Origin": self.url.rstrip("/")},
            timeout=20,
            follow_redirects=True,
        )


@contextmanager
def dashboard_of(redis_url: str, log: Path, *arguments: str, **environment: str) -> Iterator[Dashboard]:
    """Run a dashboard at a free port; it ends with the block."""
    settings = {"REDIS_URL": redis_url, "HISTORY_DASHBOARD_PASSWORD": PASSWORD}
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "consumers.cli", "dashboard", "--port", "0", *arguments],
            stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **settings, **environment},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        yield Dashboard(process, process.stdout.readline().partition(" - ")[0], log)
    finally:
        end(process)
        process.communicate()


def pages(job_ids: list[str]) -> list[str]:
    """Return every address that shows something, for each list and each of these jobs."""
    registries = ("queued", "started", "finished", "failed", "deferred", "scheduled", "canceled")
    lists = [f"history/{registry}/200/{order}/1" for registry in registries for order in ("asc", "dsc")]
    return [
        "", "0/", "0/view", "0/view/queues", "0/view/workers", "0/view/jobs", "favicon.ico",
        "0/data/queues.json", "0/data/workers.json",
        *(f"0/view/jobs/{one}" for one in lists), *(f"0/data/jobs/{one}.json" for one in lists),
        *(f"0/view/job/{job_id}" for job_id in job_ids), *(f"0/data/job/{job_id}.json" for job_id in job_ids),
    ]  # fmt: skip


def plant(redis: Redis, job_id: str, fields: Mapping[str, bytes], *, failed: bool = True, result: Any = None) -> None:
    """Write a job with these fields to Redis, in Failed or in the queue, with `result` as its newest result."""
    written: Any = dict(fields)
    if written:
        redis.hset(Job.key_for(job_id), mapping=written)
    if result:
        redis.xadd(f"rq:results:{job_id}", result)
    redis.sadd("rq:queues", QUEUE_KEY)
    if failed:
        redis.zadd(FAILED_KEY, {job_id: 1})
    else:
        redis.rpush(QUEUE_KEY, job_id)


def failure(text: str) -> dict[str, bytes]:
    """Return the result of a failed job, as RQ stores it."""
    return {"type": b"2", "exc_string": b64encode(zlib.compress(text.encode()))}
