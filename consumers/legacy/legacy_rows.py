"""Read rows of the adopted tables as entries of the old JSON shape, so that they are imported like the old files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, text

from consumers.db.engine import long_read
from consumers.legacy.json_arrays import Entry
from consumers.legacy.old_history import ImportSource, Kind
from producers.errors import HistoryError

_ROWS_AT_ONCE = 500
_MOST_DIGITS = 4000  # Python's int() rejects more than 4300 digits

# Arguments of json_build_object: the old files' keys and the columns. Columns of _SOME_HAVE are added if they exist.
_TABLES: dict[str, tuple[Kind, str]] = {
    "portfolio_history_legacy": (
        "snapshot",
        """'date', snapshot_date, 'timestamp', "timestamp", 'balance', balance, 'total_invested', total_invested,
            'total_profit_loss', total_profit_loss, 'total_value', total_value,
            'open_positions', coalesce(open_positions, 0), 'trade_count', coalesce(trade_count, 0)""",
    ),
    "signal_archives_legacy": (
        "archive",
        "'archived_at', archived_at, 'signals_count', signals_count, 'signals', signals_data",
    ),
}
_SOME_HAVE = ("portfolio_id", "archive_month")

_COLUMNS = text("""
    SELECT CAST(attname AS text) FROM pg_attribute
    WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped
""")
_ELSEWHERE = text("""
    SELECT quote_ident(current_schema()) AS current, ARRAY(
        SELECT DISTINCT CAST(schemaname AS text) FROM pg_tables WHERE tablename = ANY(:tables) ORDER BY 1) AS others
""")


def table_sources(store: Engine) -> list[ImportSource]:
    """Return the adopted tables in the schemas of the search_path, snapshots first.

    Raises:
        HistoryError: no such table was found; the message says where tables of this name are.
        StoreUnavailable: the database cannot be read now. Reading the entries can raise it too.
    """
    with long_read(store) as db:
        there = [name for name in _TABLES if _columns(db, name)]
        if not there:
            raise HistoryError(_nothing_adopted(db))
        sizes = [db.execute(text(f"SELECT count(*) FROM {name}")).scalar_one() for name in there]  # noqa: S608  # names from _TABLES
    return [_source(store, name, size) for name, size in zip(there, sizes, strict=True)]


def _nothing_adopted(db: Connection) -> str:
    current, others = db.execute(_ELSEWHERE, {"tables": list(_TABLES)}).one()
    advice = "run trading-history init-db --adopt-legacy first"
    if others:
        names = ",".join(quote(name, safe="") for name in (current, *others) if name)
        advice = f"there are some in schema {' and '.join(others)}: write schema={names} in DATABASE_URL"
    return f"there are no adopted tables in schema {current}: {advice}"


def _source(store: Engine, table: str, size: int) -> ImportSource:
    read = 0

    def entries() -> Iterator[Entry]:
        nonlocal read
        for entry in read_legacy_rows(store, table):
            read = entry.index + 1
            yield entry

    return ImportSource(table, _TABLES[table][0], entries, size, lambda: read, "rows")


def read_legacy_rows(store: Engine, table: str) -> Iterator[Entry]:
    """Yield the rows in the order of their ids, numbered from 0 without gaps; 500 rows are in memory at a time.

    The numbers are the same on each run as long as no row is deleted. If one is deleted, the numbers of the later rows
    decrease by one; events that are already stored are then still found by their event id.
    """
    with long_read(store) as db:  # sorting many rows takes a long time, and during an outage the import pauses
        statement = text(_select(table, _columns(db, table)))
        rows = db.execution_options(yield_per=_ROWS_AT_ONCE).execute(statement).scalars()
        for index, row in enumerate(rows):
            yield Entry(index, _decoded(row))


def _select(table: str, columns: list[str]) -> str:
    extra = "".join(f", '{name}', {name}" for name in _SOME_HAVE if name in columns)
    # PostgreSQL's JSON has times in ISO 8601 for any DateStyle, and numbers with every digit.
    return f"""
        SELECT CAST(json_build_object({_TABLES[table][1]}{extra}) AS text) FROM {table} ORDER BY id
    """  # noqa: S608  # built from the constants above


def _columns(db: Connection, table: str) -> list[str]:
    return list(db.execute(_COLUMNS, {"table": table}).scalars())


def _decoded(row: str) -> Any:
    try:
        return json.loads(row, parse_float=Decimal, parse_int=_integer)
    except RecursionError:
        return row  # a str is not an object: it is rejected, and the report shows it unchanged


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < _MOST_DIGITS else Decimal(digits)
