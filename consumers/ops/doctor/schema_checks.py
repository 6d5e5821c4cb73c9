"""The tables: as schema.sql makes them, and open to this role."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from consumers.db.schema import old_tables, schema_sql
from consumers.ops.doctor.checks import Check

TABLES = "tables"
_HISTORY = ("portfolio_history", "signal_archives")
_NEEDED = dict.fromkeys(_HISTORY, ("SELECT", "INSERT")) | {
    "event_outcomes": ("SELECT", "INSERT", "UPDATE", "DELETE"),
}

_TABLE = re.compile(r"^CREATE TABLE IF NOT EXISTS (\w+) \(\n(.*?)^\);", re.MULTILINE | re.DOTALL)
_COLUMN = re.compile(r'^ {4}(?!CONSTRAINT)"?(\w+)"? (\w+(?:\([\d, ]+\))?)([^\n]*)', re.MULTILINE)
_CONSTRAINT = re.compile(r"^ {4}CONSTRAINT (\w+)", re.MULTILINE)
_INDEX = re.compile(r"^CREATE INDEX IF NOT EXISTS (\w+)\s+ON (\w+)", re.MULTILINE)
_FULL_NAMES = {"timestamptz": "timestamp with time zone"}

_COLUMNS = text("""
    SELECT attname AS name, format_type(atttypid, atttypmod) AS type, attnotnull AS not_null
    FROM pg_attribute WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped
""")
_COMMENT = text("SELECT obj_description(to_regclass('event_outcomes'), 'pg_class')")
_CONSTRAINTS = text("SELECT conname FROM pg_constraint WHERE conrelid = to_regclass(:table) AND convalidated")
_INDEXES = text("""
    SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = to_regclass(:table) AND indisvalid
""")
_LACKING = text("""
    SELECT privilege FROM unnest(CAST(:privileges AS text[])) AS privilege
    WHERE NOT has_table_privilege(to_regclass(:table), privilege)
""")
_IS_READER = text("""
    SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'trading_history_reader' AND pg_has_role(oid, 'USAGE'))
""")
_SEQUENCE_USABLE = text("SELECT has_sequence_privilege(pg_get_serial_sequence(:table, 'id'), 'USAGE')")
_LAST_NUMBER = """
    SELECT (SELECT max(id) FROM {table}) AS highest_row,
        (SELECT last_value FROM pg_sequences
            JOIN pg_namespace ON nspname = schemaname
            JOIN pg_class ON relnamespace = pg_namespace.oid AND relname = sequencename
            WHERE pg_class.oid = CAST(pg_get_serial_sequence('{table}', 'id') AS regclass)) AS last_number
"""


@dataclass(frozen=True)
class _Shape:
    """Columns as name → (type, whether not null), and the names of constraints and valid indexes."""

    columns: dict[str, tuple[str, bool]]
    constraints: frozenset[str]
    indexes: frozenset[str]


def tables(db: Connection) -> Iterator[Check]:
    """Columns, constraints and indexes by name and type against schema.sql; more than that is welcome."""
    if db.exec_driver_sql("SELECT current_schema()").scalar_one() is None:
        yield Check(
            TABLES, "fail", "this role may use no schema of its search_path", "GRANT USAGE ON SCHEMA public TO the role"
        )
        return
    expected = _expected()
    found = {table: _found(db, table) for table in expected}
    missing = [table for table, shape in found.items() if not shape.columns]
    old = [table for table in _HISTORY if found[table].columns and "event_id" not in found[table].columns]
    if old:
        yield Check(
            TABLES, "fail", f"tables of the old shape: {', '.join(old)}", "trading-history init-db --adopt-legacy"
        )
    elif missing:
        yield Check(TABLES, "fail", f"missing: {', '.join(missing)}", "trading-history init-db")
    elif problem := old_tables(db.execute(_COMMENT).scalar_one()):
        yield Check(TABLES, "fail", problem, "trading-history init-db")
    else:
        yield _compared(expected, found)


def _compared(expected: dict[str, _Shape], found: dict[str, _Shape]) -> Check:
    wrong = [
        f"{table}.{column} is {_described(found[table].columns.get(column))}, not {_described(want)}"
        for table, shape in expected.items()
        for column, want in shape.columns.items()
        if found[table].columns.get(column) != want
    ]
    wrong += [
        f"constraint {name} is missing"
        for table, shape in expected.items()
        for name in sorted(shape.constraints - found[table].constraints)
    ]
    indexes = [name for table, shape in expected.items() for name in sorted(shape.indexes - found[table].indexes)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Check(TABLES, "fail", "; ".join(wrong[:3]) + more, "mend them to what schema.sql says")
    if indexes:
        return Check(
            TABLES,
            "warn",
            f"indexes missing or invalid: {', '.join(indexes)}",
            "DROP INDEX those that are invalid, then trading-history init-db",
        )
    return Check(TABLES, "ok", f"{', '.join(expected)} as in schema.sql")


def privileges(db: Connection) -> Iterator[Check]:
    """What a worker does: the rows' ids come from the sequences by name. The API's role needs only to read."""
    lacking = []
    for table, wanted in _NEEDED.items():
        if not _found(db, table).columns:
            continue
        values: dict[str, Any] = {"table": table, "privileges": list(wanted)}
        missing = db.execute(_LACKING, values).scalars().all()
        if missing:
            lacking.append(f"{', '.join(missing)} ON {table}")
        if table in _HISTORY and db.execute(_SEQUENCE_USABLE, {"table": table}).scalar_one() is False:
            lacking.append(f"USAGE ON SEQUENCE {table}_id_seq")
    role = db.exec_driver_sql("SELECT current_user").scalar_one()
    unread = [one for one in lacking if one.startswith("SELECT")]
    if lacking and not unread and db.execute(_IS_READER).scalar_one():
        yield Check("privileges", "ok", f"{role} may only read: what the API does, not what a worker does")
    elif lacking:
        grants = "; ".join(f"GRANT {one} TO {role}" for one in lacking)
        yield Check("privileges", "fail", f"{role} lacks {'; '.join(lacking)}", grants)
    else:
        yield Check("privileges", "ok", f"{role} may do what a worker does")


def row_numbers(db: Connection) -> Iterator[Check]:
    """A sequence behind its rows, as after a careless restore, refuses every insert."""
    behind = []
    for table in _HISTORY:
        statement = text(_LAST_NUMBER.format(table=table))  # one of two constants
        highest, last = db.execute(statement).one()
        if highest is not None and last is not None and last < highest:
            behind.append((table, highest, last))
    if behind:
        found = "; ".join(f"{table} has row {highest}, its sequence is at {last}" for table, highest, last in behind)
        advice = "; ".join(
            f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), {highest})" for table, highest, _ in behind
        )
        yield Check("row numbers", "fail", found, advice)
    else:
        yield Check("row numbers", "ok", "ahead of the rows")


def _expected() -> dict[str, _Shape]:
    sql = schema_sql()
    indexes: dict[str, set[str]] = {}
    for name, table in _INDEX.findall(sql):
        indexes.setdefault(table, set()).add(name)
    return {
        table: _Shape(
            {
                column: (_FULL_NAMES.get(type_, type_.replace(" ", "")), "NOT NULL" in rest or "IDENTITY" in rest)
                for column, type_, rest in _COLUMN.findall(body)
            },
            frozenset(_CONSTRAINT.findall(body)),
            frozenset(indexes.get(table, ())),
        )
        for table, body in _TABLE.findall(sql)
    }


def _found(db: Connection, table: str) -> _Shape:
    values = {"table": table}
    return _Shape(
        {row.name: (row.type, row.not_null) for row in db.execute(_COLUMNS, values)},
        frozenset(db.execute(_CONSTRAINTS, values).scalars()),
        frozenset(db.execute(_INDEXES, values).scalars()),
    )


def _described(column: tuple[str, bool] | None) -> str:
    if column is None:
        return "missing"
    return f"{column[0]} not null" if column[1] else column[0]
