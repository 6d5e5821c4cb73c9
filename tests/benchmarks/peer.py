"""Drain of PgQueuer, the fastest comparable project, with the same job: validate a snapshot, insert it once, commit."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.checks import require, require_rows, rows
from tests.benchmarks.drains import Drain
from tests.benchmarks.environment import redis, reset
from tests.benchmarks.usage import Meter, syncs


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("pgqueuer", "asyncpg", "uvloop"))


def drain_pgqueuer(folder: Path, count: int) -> Drain:
    """Time how one worker process of PgQueuer stores `count` snapshots from its own queue."""
    reset()
    asyncio.run(fresh_queue())
    command = [sys.executable, "-m", "tests.benchmarks.pgqueuer_job", str(count)]
    with (
        open(folder / "pgqueuer.log", "ab") as log,
        redis() as client,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as worker,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None
        require(worker.stdout.readline() == "ready\n", "PgQueuer's worker did not start")
        synced = syncs()
        meter = Meter(client, [worker.pid])
        before = meter.read()
        worker.stdin.write("go\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        require(bool(answer), "PgQueuer's worker ended early")
        usage = meter.read().since(before)
        worker.stdin.close()
        worker.wait()
    require_rows(count)
    require(rows("pgqueuer") == 0, "PgQueuer has jobs left")
    return Drain(count, float(answer), usage, syncs() - synced)


async def fresh_queue() -> None:
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
