"""A worker process of PgQueuer: `python -m tests.benchmarks.pgqueuer_job COUNT`.

It puts COUNT snapshots into its queue and says `ready`; when it reads a line it works until the last job is
committed and finished, and says how many seconds that took; it ends when its input does.
"""

from __future__ import annotations

import os
import sys
import time

import asyncpg
import uvloop
from pgqueuer import PgQueuer, Queries
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job

from producers.events import PortfolioSnapshotEvent, decode
from tests.benchmarks.backlog import texts

# What its performance guide asks for: larger batches for short jobs, one connection for the queue manager and a
# pool for the rest; its benchmark runs on uvloop. Of the numbers tried here, these were the fastest.
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
    """Validate one event, insert it once, commit."""
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


if __name__ == "__main__":
    uvloop.run(_work(int(sys.argv[1])))
