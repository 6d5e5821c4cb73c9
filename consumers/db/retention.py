"""Old months out of the hot tables, and back: in short transactions, beside live inserts and readers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date
from functools import partial
from typing import Any, NamedTuple, TypeVar

import psycopg2
from sqlalchemy import Connection, Row, TextClause, text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import engine, translated_errors
from consumers.db.retired_tables import HISTORY_TABLES, MOVE_LOCK, RUN_LOCK, HistoryTable, prepare, schema_of, until
from consumers.errors import RetirementRefused

T = TypeVar("T")
Progress = Callable[[int, int], None]

# Live inserts wait behind us while we wait for the trigger's lock; but an autovacuum gives way only after a second.
_LOCK_MILLISECONDS = 1500
_RUN_LOCK_MILLISECONDS = 3000  # the session of a run that was killed ends its statement first
_PAUSE_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
_LOCK_NOT_AVAILABLE, _DEADLOCK = "55P03", "40P01"
_MOVE_SECONDS = 0.5  # what one transaction should take: so long an insert of an old fact may wait
_FIRST_ROWS, _MOST_ROWS = 500, 20_000
_LEAST = {"date": "-infinity", "timestamptz": "-infinity", "bigint": -(2**63)}

_HOLDERS = text("""
    SELECT string_agg(DISTINCT CAST(pid AS text), ', ') FROM pg_locks
    WHERE granted AND pid <> pg_backend_pid()
        AND (relation = CAST(:table AS regclass) AND mode NOT IN ('AccessShareLock', 'RowShareLock')
            OR locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND (CAST(classid AS bigint) << 32) + CAST(objid AS bigint) = :move_lock)
""")


class MovedRows(NamedTuple):
    """How many rows of one month of one of the two tables."""

    table: str
    month: str
    rows: int


class _Way(NamedTuple):
    """From where to where rows of a table move (None: all of them, else those before the month that begins then)."""

    table: HistoryTable
    source: str
    target: str
    before: date | None

    @property
    def which(self) -> str:
        return "true" if self.before is None else self.table.old

    @property
    def values(self) -> dict[str, Any]:
        return {} if self.before is None else {"before": self.before, "until": until(self.before)}


def count_movable(before: date | None) -> list[MovedRows]:
    """What `retire` would move now (`bring_back` with None), by month.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with translated_errors(), engine().begin() as db:
        db.exec_driver_sql("SET LOCAL statement_timeout = 0")
        return _count(db, _ways(db, before))


def retire(before: date, on_progress: Progress = lambda _moved, _total: None) -> list[MovedRows]:
    """Move the rows of all months before the one that begins with `before`; needs the role that owns the tables.

    Each transaction is complete in itself: after an end at any point the next run goes on. `on_progress` gets the rows
    moved so far and the number of all. In the end both tables are vacuumed and analyzed.

    Raises:
        RetirementRefused: another run is under way, a name is taken, or somebody holds a table.
        StoreUnavailable: the database cannot be reached, or refuses.
    """
    with _alone() as db:
        for table in HISTORY_TABLES:
            _patiently(db, table, partial(prepare, db, table, before))
        return _move_all(db, before, on_progress)


def bring_back(on_progress: Progress = lambda _moved, _total: None) -> list[MovedRows]:
    """Move all retired rows back, otherwise as `retire`. The empty tables stay, and may be dropped.

    Raises:
        RetirementRefused: another run is under way, or somebody holds a table.
        StoreUnavailable: the database cannot be reached, or refuses.
    """
    with _alone() as db:
        return _move_all(db, None, on_progress)


@contextmanager
def _alone() -> Iterator[Connection]:
    """A connection that holds the lock of a run for as long as it lives."""
    with translated_errors(), engine().connect() as db:
        with db.begin():
            # Counting and VACUUM take minutes, whatever the database or the role allows its sessions.
            db.exec_driver_sql("SET statement_timeout = 0")
            db.exec_driver_sql(f"SET LOCAL lock_timeout = {_RUN_LOCK_MILLISECONDS}")
            try:
                db.execute(text("SELECT pg_advisory_lock(:key)"), {"key": RUN_LOCK})
            except DBAPIError as error:
                if getattr(error.orig, "pgcode", None) != _LOCK_NOT_AVAILABLE:
                    raise
                raise RetirementRefused("another run is moving rows of this database") from error
        try:
            yield db
        finally:
            db.invalidate()  # back in the pool it would keep the lock


def _ways(db: Connection, before: date | None) -> list[_Way]:
    """One a table; back only from tables that there are."""
    ways = []
    for table in HISTORY_TABLES:
        schema = schema_of(db, table)
        hot, retired = f"{schema}.{table.name}", f"{schema}.{table.retired}"
        if before is not None:
            ways.append(_Way(table, hot, retired, before))
        elif db.execute(text("SELECT to_regclass(:name)"), {"name": retired}).scalar_one():
            ways.append(_Way(table, retired, hot, None))
    return ways


def _count(db: Connection, ways: list[_Way]) -> list[MovedRows]:
    counted = []
    for way in ways:
        months = text(f"""
            SELECT {way.table.month}, count(*) FROM ONLY {way.source} WHERE {way.which} GROUP BY 1 ORDER BY 1
        """)  # noqa: S608  # from constants; values are parameters
        counted += [MovedRows(way.table.name, *row) for row in db.execute(months, way.values)]
    return counted


def _move_all(db: Connection, before: date | None, on_progress: Progress) -> list[MovedRows]:
    with db.begin():
        ways = _ways(db, before)
        total = sum(one.rows for one in _count(db, ways))
    moved = Counter[tuple[str, str]]()
    on_progress(0, total)
    for way in ways:
        for month, rows in _moves(db, way):
            moved[way.table.name, month] += rows
            on_progress(moved.total(), total)
    _tidy(db, ways)
    return [MovedRows(*key, rows) for key, rows in sorted(moved.items())]


def _moves(db: Connection, way: _Way) -> Iterator[tuple[str, int]]:
    """Month and number of the rows that each transaction has moved, oldest first."""
    statement = _move(way)
    # On from where the last one ended: at the beginning of the index stand the entries of what went before.
    after: dict[str, Any] = {f"after_{key}": _LEAST[type_] for key, type_ in way.table.keys}
    rows = _FIRST_ROWS
    while True:
        values = way.values | after | {"rows": rows}
        months, seconds = _patiently(db, way.table, partial(_move_some, db, statement, values))
        if not months:
            return
        yield from ((one.month, one.rows) for one in months if one.rows)
        after = {f"after_{key}": months[0]._mapping[f"last_{key}"] for key, _ in way.table.keys}
        rows = max(1, min(_MOST_ROWS, int(rows * min(_MOVE_SECONDS / seconds, 2.0))))


def _move(way: _Way) -> TextClause:
    """Moves the next :rows rows; gives the months that they are of, and the keys of the last."""
    keys, order = way.table.keys, way.table.order
    behind = ", ".join(f"CAST(:after_{key} AS {type_})" for key, type_ in keys)
    last = ", ".join(f'"{key}" AS "last_{key}"' for key, _ in keys)
    lasts = ", ".join(f'"last_{key}"' for key, _ in keys)
    return text(f"""
        WITH chosen AS MATERIALIZED (
            SELECT {order}, {way.table.month} AS month FROM ONLY {way.source}
            WHERE {way.which} AND ({order}) > ({behind}) ORDER BY {order} LIMIT :rows
        ), gone AS (
            DELETE FROM ONLY {way.source} AS one USING chosen WHERE one.id = chosen.id RETURNING one.*
        ), moved AS (
            INSERT INTO {way.target} SELECT * FROM gone RETURNING id
        ), last AS (
            SELECT {last} FROM chosen ORDER BY {", ".join(f'"{key}" DESC' for key, _ in keys)} LIMIT 1
        )
        SELECT month, count(moved.id) AS rows, {lasts}
        FROM chosen CROSS JOIN last LEFT JOIN moved ON moved.id = chosen.id GROUP BY month, {lasts}
    """)  # noqa: S608  # from constants; values are parameters


def _move_some(db: Connection, statement: TextClause, values: dict[str, Any]) -> tuple[list[Row[Any]], float]:
    """What the statement gives, and the seconds that inserts of old facts were kept waiting."""
    db.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MOVE_LOCK})
    started = time.monotonic()
    return list(db.execute(statement, values)), time.monotonic() - started


def _patiently(db: Connection, table: HistoryTable, step: Callable[[], T]) -> T:
    """`step` in a transaction, again while others hold what it needs."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with db.begin():
                db.exec_driver_sql(f"SET LOCAL lock_timeout = {_LOCK_MILLISECONDS}")
                return step()
        except DBAPIError as error:
            if getattr(error.orig, "pgcode", None) not in (_LOCK_NOT_AVAILABLE, _DEADLOCK):
                raise
            if time.monotonic() > deadline:
                raise RetirementRefused(_in_use(db, table)) from error
        time.sleep(_PAUSE_SECONDS)


def _in_use(db: Connection, table: HistoryTable) -> str:
    with db.begin():
        pids = db.execute(_HOLDERS, {"table": table.name, "move_lock": MOVE_LOCK}).scalar_one()
    who = f"held by pid {pids}" if pids else "by nobody any more"
    return f"{table.name} was in use for {_PATIENCE_SECONDS:.0f} s, {who}. Run it again: it goes on where it is"


def _tidy(db: Connection, ways: list[_Way]) -> None:
    """Free the place of what is gone, know what is where, and never look at retired rows for their age again."""
    db.execution_options(isolation_level="AUTOCOMMIT")
    for way in ways:
        freezing = "FREEZE, " if way.before is not None else ""
        _interruptibly(db, f"VACUUM (ANALYZE) {way.source}")
        _interruptibly(db, f"VACUUM ({freezing}ANALYZE) {way.target}")


def _interruptibly(db: Connection, statement: str) -> None:
    """For a statement of minutes: Ctrl-C and SIGTERM reach this thread, and cancel it."""
    driver: Any = db.connection.driver_connection
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(db.exec_driver_sql, statement)
        try:
            running.result()
        finally:
            if not running.done():
                with suppress(psycopg2.Error):  # the server is gone: then the statement ends by that
                    driver.cancel()
