"""Fast insertion of millions of rows: drop indexes and keys, insert the rows, create the same indexes and keys."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from sqlalchemy import Connection, text

from consumers.db.engine import engine
from tests.benchmarks.checks import require
from tests.benchmarks.environment import checkpoint, vacuum

_WORTH_DROPPING = 100_000  # rows; with fewer rows it is faster to keep the indexes
_SESSIONS = 2

_SNAPSHOTS = text("""
    INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
        total_invested, total_profit_loss, total_value, open_positions, trade_count)
    SELECT gen_random_uuid(), 'bot-' || number % 4 || '/0123456789abcdef0123456789abcdef', number / 4 + 1, number % 4,
        date '2020-01-01' + CAST(number / 10000 AS integer),
        timestamptz '2020-01-01' + number * interval '8 seconds', number, 1, 2, 3, 4, 5
    FROM generate_series(CAST(:first AS bigint), :last) AS number
    WHERE number IS DISTINCT FROM :lost
""")

_ARCHIVES = text("""
    INSERT INTO signal_archives (event_id, source, sequence, portfolio_id, archived_at, archive_month, signals_count,
        signals_data)
    SELECT gen_random_uuid(), 'archiver/0123456789abcdef0123456789abcdef', number + 1, number % 4, at,
        to_char(at, 'YYYY-MM'), 1,
        jsonb_build_array(jsonb_build_object('market_id', number, 'action', 'buy_yes', 'yes_price', 0.9995))
    FROM generate_series(CAST(:first AS bigint), :last) AS number,
        LATERAL (SELECT timestamptz '2020-01-01' + number * interval '80 seconds' AS at) AS moment
""")

_CONSTRAINTS = text("""
    SELECT conname AS name, pg_get_constraintdef(oid) AS definition
    FROM pg_constraint WHERE conrelid = CAST(:table AS regclass) AND contype IN ('p', 'u') ORDER BY conname
""")
_INDEXES = text("""
    SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition
    FROM pg_index WHERE indrelid = CAST(:table AS regclass)
        AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid) ORDER BY 1
""")


def fill_snapshots(first: int, last: int, lost: int | None = None) -> None:
    """Insert the snapshots numbered `first` to `last`, except `lost`, in four sources; then vacuum and analyze."""
    with _without_indexes("portfolio_history", last - first):
        bounds = [first + (last + 1 - first) * part // _SESSIONS for part in range(_SESSIONS + 1)]
        with ThreadPoolExecutor(_SESSIONS) as pool:
            list(pool.map(lambda at, end: _insert(at, end - 1, lost), bounds[:-1], bounds[1:]))
    vacuum()
    checkpoint()


def fill_archives(first: int, last: int) -> None:
    """Insert the archives numbered `first` to `last`, with one signal each; then vacuum and analyze."""
    with _without_indexes("signal_archives", last - first), engine().begin() as db:
        db.execute(_ARCHIVES, {"first": first, "last": last})
    vacuum()
    checkpoint()


def _insert(first: int, last: int, lost: int | None) -> None:
    with engine().begin() as db:
        db.execute(text("SET LOCAL synchronous_commit = off"))
        db.execute(_SNAPSHOTS, {"first": first, "last": last, "lost": lost})


@contextmanager
def _without_indexes(table: str, rows: int) -> Iterator[None]:
    """Drop the indexes and unique keys of `table` during the block, and check that the same ones exist afterwards."""
    if rows < _WORTH_DROPPING:
        yield
        return
    with engine().begin() as db:
        before = keys, indexes = _definitions(db, table)
        for name in indexes:
            db.execute(text(f"DROP INDEX {name}"))
        for name in keys:
            db.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))
    yield
    with engine().begin() as db:
        db.execute(text("SET LOCAL maintenance_work_mem = '1GB'"))
        for name, definition in keys.items():
            db.execute(text(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}"))
        for definition in indexes.values():
            db.execute(text(definition))
        require(_definitions(db, table) == before, f"the indexes of {table} have changed")


def _definitions(db: Connection, table: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the definitions of the keys and of the other indexes, by name."""
    keys = {row.name: row.definition for row in db.execute(_CONSTRAINTS, {"table": table})}
    return keys, {row.name: row.definition for row in db.execute(_INDEXES, {"table": table})}
