"""Comparable projects with the same job: validate a snapshot, insert it once, commit. Each is measured if installed."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import make_url

from tests.benchmarks.checks import require, require_rows, rows
from tests.benchmarks.drains import Drain
from tests.benchmarks.environment import redis, reset
from tests.benchmarks.usage import Meter, syncs


@dataclass(frozen=True)
class Peer:
    """A project: the `packages` to install, the program `job` that is its worker, and its queue.

    `fresh_queue` creates empty tables of the queue; `unfinished` is the FROM clause that finds its unfinished jobs.
    """

    name: str
    packages: Sequence[str]
    job: str
    fresh_queue: Callable[[], Coroutine[None, None, None]]
    unfinished: str

    @property
    def contender(self) -> str:
        return f"{self.name}, one process"

    @property
    def installed(self) -> bool:
        with suppress(importlib.metadata.PackageNotFoundError):
            return all(importlib.metadata.version(package) for package in self.packages)
        return False

    def drain(self, folder: Path, count: int) -> Drain:
        """Time how one worker process stores `count` snapshots from the peer's own queue."""
        reset()
        asyncio.run(self.fresh_queue())
        command = [sys.executable, "-m", self.job, str(count)]
        with (
            open(folder / "peer.log", "ab") as log,
            redis() as client,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as worker,
        ):
            assert worker.stdin is not None
            assert worker.stdout is not None
            require(worker.stdout.readline() == "ready\n", f"{self.name}'s worker did not start")
            synced = syncs()
            meter = Meter(client, [worker.pid])
            before = meter.read()
            worker.stdin.write("go\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            require(bool(answer), f"{self.name}'s worker ended early")
            usage = meter.read().since(before)
            worker.stdin.close()
            worker.wait()
        require_rows(count)
        require(rows(self.unfinished) == 0, f"{self.name} has jobs left")
        return Drain(count, float(answer), usage, syncs() - synced)


async def _fresh_pgqueuer() -> None:
    """Create its tables with the fast settings of its guide: durable jobs, unlogged log table, eager autovacuum."""
    os.environ["PGQUEUER_DURABILITY"] = "balanced"  # PgQueuer reads it at its first use, below
    import asyncpg
    from pgqueuer import Queries
    from pgqueuer.db import AsyncpgDriver

    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    try:
        queries = Queries(AsyncpgDriver(connection))
        if await queries.schema_is_installed():
            await queries.uninstall()
        await queries.install()
        await queries.optimize_autovacuum()
    finally:
        await connection.close()


async def _fresh_awa() -> None:
    """Create its tables, or empty them, and choose its faster storage, as its first worker would do it."""
    import awa

    async with awa.AsyncClient(awa_url()) as client:
        await client.migrate()
        await client.install_queue_storage(reset=True)


def awa_url() -> str:
    """Return the database's URL with a host name, which awa's driver requires although it uses the socket."""
    return make_url(os.environ["DATABASE_URL"]).set(host="localhost").render_as_string(hide_password=False)


PGQUEUER = Peer(
    "PgQueuer", ("pgqueuer", "asyncpg", "uvloop"), "tests.benchmarks.pgqueuer_job", _fresh_pgqueuer, "pgqueuer"
)
AWA = Peer(
    "awa-pg",
    ("awa-pg", "asyncpg", "uvloop"),
    "tests.benchmarks.awa_job",
    _fresh_awa,
    "awa.jobs WHERE state <> 'completed'",
)
PEERS = (PGQUEUER, AWA)
