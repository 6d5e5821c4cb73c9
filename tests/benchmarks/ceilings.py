"""Upper bounds of this machine: the same validation and the same table, without a job queue."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC
from itertools import islice
from pathlib import Path
from typing import Any

from redis import Redis
from sqlalchemy import Connection, text

from consumers.db.engine import engine
from producers.events import PortfolioSnapshotEvent, decode
from tests.benchmarks.backlog import texts
from tests.benchmarks.checks import require, require_rows
from tests.benchmarks.drains import Drain
from tests.benchmarks.environment import redis, reset
from tests.benchmarks.usage import Meter, syncs

BATCH = 500
_LIST = "benchmark:events"
_TYPES = {
    "event_id": "uuid",
    "source": "text",
    "sequence": "bigint",
    "portfolio_id": "bigint",
    "snapshot_date": "date",
    "timestamp": "timestamptz",
    "balance": "numeric",
    "total_invested": "numeric",
    "total_profit_loss": "numeric",
    "total_value": "numeric",
    "open_positions": "integer",
    "trade_count": "integer",
}
_COLUMNS = ", ".join(f'"{name}"' for name in _TYPES)
_VALUES = ", ".join(f"CAST(:{name} AS {kind})" for name, kind in _TYPES.items())
_ARRAYS = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in _TYPES.items())
_ONCE = "ON CONFLICT (event_id) DO NOTHING"
_INSERT_ONE = text(f"INSERT INTO portfolio_history ({_COLUMNS}) VALUES ({_VALUES}) {_ONCE}")
_INSERT_MANY = text(f"INSERT INTO portfolio_history ({_COLUMNS}) SELECT * FROM unnest({_ARRAYS}) {_ONCE}")
_STAGE = "CREATE TEMPORARY TABLE staged (" + ", ".join(f'"{name}" {kind}' for name, kind in _TYPES.items()) + ")"
_INSERT_STAGED = text(f"INSERT INTO portfolio_history ({_COLUMNS}) SELECT {_COLUMNS} FROM staged {_ONCE}")


def one_by_one(events: Sequence[str], client: Redis) -> None:
    """Validate, insert and commit each event separately, with SQLAlchemy."""
    with engine().connect() as db:
        for event in events:
            db.execute(_INSERT_ONE, _row(event))
            db.commit()


def many_rows(events: Sequence[str], client: Redis) -> None:
    """Validate and insert BATCH events per statement and commit."""
    with engine().connect() as db:
        for batch in _batches(events):
            _insert(db, batch)


def redis_list(events: Sequence[str], client: Redis) -> None:
    """Do the same with events from a plain Redis list, which are removed after the commit."""
    with engine().connect() as db:
        while batch := client.lrange(_LIST, 0, BATCH - 1):
            _insert(db, [event.decode() for event in batch if isinstance(event, bytes)])
            client.ltrim(_LIST, BATCH, -1)


def copy_staged(events: Sequence[str], client: Redis) -> None:
    """Validate, COPY into a temporary table and insert from there, BATCH events per commit."""
    with engine().connect() as db:
        db.execute(text(_STAGE))
        for batch in _batches(events):
            lines = "".join("\t".join(map(_copied, _row(event).values())) + "\n" for event in batch)
            cursor: Any = db.connection.cursor()  # of psycopg2: SQLAlchemy has no COPY
            cursor.copy_expert("COPY staged FROM STDIN", io.StringIO(lines))
            db.execute(_INSERT_STAGED)
            db.execute(text("TRUNCATE staged"))
            db.commit()


def measured(work: Callable[[Sequence[str], Redis], None], folder: Path, count: int) -> Drain:
    """Time one of the functions above over `count` events, on an engine that is already connected."""
    reset()
    events = texts(count)
    with redis() as client:
        for batch in _batches(events):
            client.rpush(_LIST, *batch)
        synced = syncs()
        meter = Meter(client)
        before, started = meter.read(), time.perf_counter()
        work(events, client)
        seconds = time.perf_counter() - started
        usage = meter.read().since(before)
        require(work is not redis_list or not client.exists(_LIST), "events were left in the list")
    require_rows(count)
    engine().dispose()  # a backend reports its last syncs when its connection ends
    return Drain(count, seconds, usage, syncs() - synced)


def _insert(db: Connection, batch: Sequence[str]) -> None:
    rows = [_row(event) for event in batch]
    db.execute(_INSERT_MANY, {name: [row[name] for row in rows] for name in _TYPES})
    db.commit()


def _row(event: str) -> dict[str, Any]:
    """Return the validated columns of an event, in the order of _TYPES."""
    snapshot = decode(event, PortfolioSnapshotEvent)
    values = dict(snapshot.data) | {
        "event_id": str(snapshot.id),
        "source": snapshot.source,
        "sequence": snapshot.sequence,
        "timestamp": snapshot.data.timestamp.astimezone(UTC),
    }
    return {name: values[name] for name in _TYPES}


def _copied(value: object) -> str:
    return r"\N" if value is None else str(value)


def _batches(events: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(events)
    while batch := list(islice(rest, BATCH)):
        yield batch
