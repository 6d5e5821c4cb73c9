"""Program that offers events at a fixed rate: `python -m tests.benchmarks.quality_producer QUEUE FOLDER …`.

Event n is due `n / rate` seconds after the time in the file `start`, which the program waits for. An event that is
late, because a call blocked or the program was killed and started again, is offered as soon as possible. When a call
has returned, the number of its event is appended to the file `accepted`; a restarted program continues after the last
number there, so it repeats calls that have failed since then. Other calls that raise an exception are not repeated.
When all events are offered, the program keeps running, because its relay may still have work.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from producers.events import PortfolioSnapshot, encode, event_of
from producers.history_producer import HistoryProducer
from tests.benchmarks.backlog import snapshots

Offer = Callable[[int, PortfolioSnapshot], Awaitable[None]]
_CALL_SECONDS = 5.0  # limit of PgQueuer's producer for a connection and for an answer


def accepted_numbers(folder: Path) -> list[int]:
    """Return the number of the event of each call that has returned; a line without its end was not written."""
    file = folder / "accepted"
    text = file.read_text() if file.exists() else ""
    return [int(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


async def _offer_all(offer: Offer, folder: Path, rate: float, count: int, calls: int) -> None:
    done = accepted_numbers(folder)
    file = os.open(folder / "accepted", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while not (folder / "start").exists():
        await asyncio.sleep(0.01)
    started = float((folder / "start").read_text())
    first = done[-1] + 1 if done else 0
    for number, snapshot in enumerate(snapshots(count - first, first), start=first):
        await asyncio.sleep(max(0.0, started + number / rate - time.time()))
        for _ in range(calls):
            try:
                await offer(number, snapshot)
            except Exception as error:  # of any kind: the caller continues with its next event
                print(f"event {number} was not accepted: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            else:
                os.write(file, b"%d\n" % number)


async def _through_outbox(folder: Path, rate: float, count: int, calls: int) -> None:
    with HistoryProducer(outbox=folder / "outbox.db", name="quality") as producer:

        async def offer(number: int, snapshot: PortfolioSnapshot) -> None:
            producer.record(snapshot)

        await _offer_all(offer, folder, rate, count, calls)
        signal.pause()


async def _into_pgqueuer(folder: Path, rate: float, count: int, calls: int) -> None:
    import asyncpg
    from pgqueuer import Queries
    from pgqueuer.db import AsyncpgDriver

    connection: asyncpg.Connection | None = None

    async def offer(number: int, snapshot: PortfolioSnapshot) -> None:
        nonlocal connection
        if connection is None or connection.is_closed():
            connection = await asyncpg.connect(
                os.environ["DATABASE_URL"], timeout=_CALL_SECONDS, command_timeout=_CALL_SECONDS
            )
        event = encode(event_of(snapshot, source="quality/0", sequence=number))
        await Queries(AsyncpgDriver(connection)).enqueue("store", event.encode())

    await _offer_all(offer, folder, rate, count, calls)
    signal.pause()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queue", choices=("outbox", "pgqueuer"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, required=True, help="events per second")
    parser.add_argument("--count", type=int, required=True, help="number of events")
    parser.add_argument("--calls", type=int, default=1, help="calls for each event")
    options = parser.parse_args()
    run = _through_outbox if options.queue == "outbox" else _into_pgqueuer
    asyncio.run(run(options.folder, options.rate, options.count, options.calls))


if __name__ == "__main__":
    main()
