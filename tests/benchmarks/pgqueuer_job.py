"""Worker process of PgQueuer: `python -m tests.benchmarks.pgqueuer_job [COUNT]`.

With COUNT it enqueues COUNT snapshots and prints `ready`. After reading a line it works until the last job is committed
and finished, and prints the seconds that this took. It exits when its standard input ends.

Without COUNT it works until it is ended, and tries a job that has failed again, as PgQueuer's own executor does that.
"""

from __future__ import annotations

import os
import sys
import time

import asyncpg
import uvloop
from pgqueuer import PgQueuer, Queries
from pgqueuer.db import AsyncpgDriver
from pgqueuer.executors import DatabaseRetryEntrypointExecutor
from pgqueuer.models import Job

from producers.events import PortfolioSnapshotEvent, decode
from tests.benchmarks.backlog import texts

# Its performance guide recommends larger batches for short jobs, and one connection for the queue manager beside a pool
# for the jobs; its own benchmark runs on uvloop. These numbers were the fastest of those tried here.
_BATCH = 50
_CONNECTIONS = 10
_ENQUEUE = 1000

_INSERT = """
INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
    total_invested, total_profit_loss, total_value, open_positions, trade_count)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
ON CONFLICT (event_id) DO NOTHING
"""


async def _store(pool: asyncpg.Pool, text: str) -> None:
    """Validate and insert one event, and commit."""
    event = decode(text, PortfolioSnapshotEvent)
    data = event.data
    await pool.execute(
        _INSERT, event.id, event.source, event.sequence, data.portfolio_id, data.snapshot_date, data.timestamp,
        data.balance, data.total_invested, data.total_profit_loss, data.total_value, data.open_positions,
        data.trade_count,
    )  # fmt: skip


async def _enqueue(queries: Queries, count: int) -> None:
    payloads = [text.encode() for text in texts(count)]
    for first in range(0, count, _ENQUEUE):
        some: list[bytes | None] = list(payloads[first : first + _ENQUEUE])
        await queries.enqueue(["store"] * len(some), some, [0] * len(some))


async def _work(count: int) -> None:
    url = os.environ["DATABASE_URL"]
    connection = await asyncpg.connect(url)
    pool = await asyncpg.create_pool(url, min_size=_CONNECTIONS, max_size=_CONNECTIONS)
    assert pool is not None
    queuer = PgQueuer(AsyncpgDriver(connection))
    left = count

    async def store(job: Job) -> None:
        nonlocal left
        assert job.payload is not None
        await _store(pool, job.payload.decode())
        left -= 1
        if not left:
            queuer.shutdown.set()

    queuer.entrypoint("store")(store)
    await _enqueue(Queries(queuer.connection), count)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    await queuer.qm.run(batch_size=_BATCH)
    print(time.perf_counter() - started, flush=True)
    sys.stdin.read()
    await pool.close()


async def _work_until_ended() -> None:
    url = os.environ["DATABASE_URL"]
    connection = await asyncpg.connect(url)
    pool = await asyncpg.create_pool(url, min_size=_CONNECTIONS, max_size=_CONNECTIONS)
    assert pool is not None
    queuer = PgQueuer(AsyncpgDriver(connection))

    async def store(job: Job) -> None:
        assert job.payload is not None
        await _store(pool, job.payload.decode())

    queuer.entrypoint("store", executor_factory=DatabaseRetryEntrypointExecutor)(store)
    await queuer.qm.run(batch_size=_BATCH, shutdown_on_listener_failure=True)


if __name__ == "__main__":
    uvloop.run(_work(int(sys.argv[1])) if sys.argv[1:] else _work_until_ended())
