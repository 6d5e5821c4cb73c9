"""Worker process of awa-pg: `python -m tests.benchmarks.awa_job COUNT`.

It enqueues COUNT snapshots and prints `ready`. After reading a line it works until the last job is committed and
finished, and prints the seconds that this took. It exits when its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

import awa
import uvloop

from tests.benchmarks.backlog import texts
from tests.benchmarks.peer import awa_url
from tests.benchmarks.peer_job import ENQUEUE, connections, store, timed

# Its guide recommends COPY to enqueue, and more workers than the handlers need, because each waits until its job is
# completed; its own benchmark updates the planner's statistics first. No job here needs a deadline. This number was the
# fastest of those tried here; several physical queues, which its guide recommends for some loads, were slower.
_WORKERS = 256
_QUEUE = "store"


@dataclass
class StoreEvent:
    """Arguments of a job: the text of one event."""

    text: str


async def _enqueue(client: awa.AsyncClient, count: int) -> None:
    jobs = [StoreEvent(text) for text in texts(count)]
    for first in range(0, count, ENQUEUE):
        await client.enqueue_many_copy(jobs[first : first + ENQUEUE], queue=_QUEUE)


async def _work(count: int) -> None:
    client, pool = awa.AsyncClient(awa_url()), await connections()
    left = count
    stored = asyncio.Event()

    async def store_job(job: awa.Job[StoreEvent]) -> None:
        nonlocal left
        await store(pool, job.args.text)
        left -= 1
        if not left:
            stored.set()

    async def work() -> None:
        await client.start([{"name": _QUEUE, "max_workers": _WORKERS, "deadline_duration_ms": 0}])
        await stored.wait()
        await client.shutdown()  # which waits until the last jobs are completed

    client.task(StoreEvent, queue=_QUEUE)(store_job)
    await _enqueue(client, count)
    await pool.execute("ANALYZE")
    await timed(work)
    await client.close()
    await pool.close()


if __name__ == "__main__":
    uvloop.run(_work(int(sys.argv[1])))
