"""Resource usage: CPU seconds of process trees, Redis commands, WAL syncs of PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import engine


@dataclass(frozen=True)
class Usage:
    """CPU seconds of the three so far, and commands that Redis has executed, including those of scripts."""

    worker: float
    postgres: float
    valkey: float
    commands: int

    def since(self, before: Usage) -> Usage:
        return Usage(
            self.worker - before.worker,
            self.postgres - before.postgres,
            self.valkey - before.valkey,
            self.commands - before.commands,
        )


class Meter:
    """Reader of the usage of both servers and of the given worker processes, or of this process if there are none."""

    def __init__(self, redis: Redis, workers: Sequence[int] = ()) -> None:
        self._redis = redis
        self._workers = [psutil.Process(pid) for pid in workers] or [psutil.Process(os.getpid())]
        self._own = not workers
        with engine().connect() as db:
            backend = psutil.Process(db.execute(text("SELECT pg_backend_pid()")).scalar_one())
        postmaster = backend.parent()
        assert postmaster is not None
        self._postgres = postmaster
        self._valkey = psutil.Process(redis.info("server")["process_id"])

    def read(self) -> Usage:
        if self._own:  # without the child processes, which are servers and earlier workers
            worker = sum(self._workers[0].cpu_times()[:2])
        else:
            worker = sum(_tree_seconds(process) for process in self._workers)
        return Usage(worker, _tree_seconds(self._postgres), _tree_seconds(self._valkey), self._commands())

    def _commands(self) -> int:
        stats = self._redis.info("commandstats")
        return sum(one["calls"] for one in stats.values())


def _tree_seconds(root: psutil.Process) -> float:
    """Return the user and system seconds of a process and of its descendants, including those that have ended."""
    seconds = 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # its parent's times now include its seconds
            seconds += sum(process.cpu_times()[:4])
    return seconds


def syncs() -> int:
    """Return how often PostgreSQL has synced its WAL so far; the last second of an open connection may be missing."""
    with engine().connect() as db:
        return int(db.execute(text("SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal'")).scalar_one())
