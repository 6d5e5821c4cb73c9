"""Parts of the worker processes of the peers: what each job does, and what the benchmark hears of it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable

import asyncpg

from producers.events import PortfolioSnapshotEvent, decode

ENQUEUE = 1000
"""Jobs of one call that enqueues."""
_CONNECTIONS = 10
_MOST_SECONDS = 120.0

_INSERT = """
INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
    total_invested, total_profit_loss, total_value, open_positions, trade_count)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
ON CONFLICT (event_id) DO NOTHING
"""


async def connections() -> asyncpg.Pool:
    """Open the connections of the jobs."""
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=_CONNECTIONS, max_size=_CONNECTIONS)
    assert pool is not None
    return pool


async def store(pool: asyncpg.Pool, text: str) -> None:
    """Validate and insert one event, and commit."""
    event = decode(text, PortfolioSnapshotEvent)
    data = event.data
    await pool.execute(
        _INSERT, event.id, event.source, event.sequence, data.portfolio_id, data.snapshot_date, data.timestamp,
        data.balance, data.total_invested, data.total_profit_loss, data.total_value, data.open_positions,
        data.trade_count,
    )  # fmt: skip


async def timed(work: Callable[[], Awaitable[None]]) -> None:
    """Print `ready`, read a line, do the work, print its seconds, and wait until standard input ends.

    Raises:
        TimeoutError: The work did not end, because a job was lost or failed.
    """
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    await asyncio.wait_for(work(), _MOST_SECONDS)
    print(time.perf_counter() - started, flush=True)
    sys.stdin.read()
