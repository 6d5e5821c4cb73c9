"""Worker process of PgQueuer: `python -m tests.benchmarks.pgqueuer_job [COUNT]`.

With COUNT it enqueues COUNT snapshots and prints `ready`. After reading a line it works until the last job is committed
and finished, and prints the seconds that this took. It exits when its standard input ends.

Without COUNT it works until it is ended, and tries a job that has failed again, as PgQueuer's own executor does that.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import asyncpg
import uvloop
from pgqueuer import PgQueuer, Queries
from pgqueuer.db import AsyncpgDriver
from pgqueuer.executors import DatabaseRetryEntrypointExecutor
from pgqueuer.models import Job

from tests.benchmarks.backlog import texts
from tests.benchmarks.peer_job import ENQUEUE, connections, store, timed

# Its performance guide recommends larger batches for short jobs, and one connection for the queue manager beside a pool
# for the jobs; its own benchmark runs on uvloop. This number was the fastest of those tried here.
_BATCH = 50


async def _enqueue(queries: Queries, count: int) -> None:
    payloads = [text.encode() for text in texts(count)]
    for first in range(0, count, ENQUEUE):
        some: list[bytes | None] = list(payloads[first : first + ENQUEUE])
        await queries.enqueue(["store"] * len(some), some, [0] * len(some))


async def _queuer() -> PgQueuer:
    return PgQueuer(AsyncpgDriver(await asyncpg.connect(os.environ["DATABASE_URL"])))


async def _work(count: int) -> None:
    queuer, pool = await _queuer(), await connections()
    left = count

    async def store_job(job: Job) -> None:
        nonlocal left
        assert job.payload is not None
        await store(pool, job.payload.decode())
        left -= 1
        if not left:
            queuer.shutdown.set()

    queuer.entrypoint("store")(store_job)
    await _enqueue(Queries(queuer.connection), count)
    await timed(partial(queuer.qm.run, batch_size=_BATCH))
    await pool.close()


async def _work_until_ended() -> None:
    queuer, pool = await _queuer(), await connections()

    async def store_job(job: Job) -> None:
        assert job.payload is not None
        await store(pool, job.payload.decode())

    queuer.entrypoint("store", executor_factory=DatabaseRetryEntrypointExecutor)(store_job)
    await queuer.qm.run(batch_size=_BATCH, shutdown_on_listener_failure=True)


if __name__ == "__main__":
    uvloop.run(_work(int(sys.argv[1])) if sys.argv[1:] else _work_until_ended())
