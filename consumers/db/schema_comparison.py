"""Comparison of a database with schema.sql by names, and of a role's privileges with those that a worker needs."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from sqlalchemy import Connection, text

# Names in schema.sql; a test compares them.
COLUMNS = {
    "portfolio_history": "id event_id source sequence portfolio_id snapshot_date timestamp balance total_invested"
    " total_profit_loss total_value open_positions trade_count created_at",
    "signal_archives": "id event_id source sequence portfolio_id archived_at archive_month signals_count signals_data"
    " created_at",
    "event_outcomes": "job_id source sequence event_id outcome reason actor event created_at",
    "withdrawals": "id event_id source sequence job_id row_id content reason actor created_at withdrawn_at",
}
INDEXES = {
    "portfolio_history": "pk event_once newest newest_of_portfolio dated_otherwise of_source",
    "signal_archives": "pk event_once newest newest_of_portfolio of_month of_market of_source",
    "event_outcomes": "pk of_source rejected",
    "withdrawals": "pk of_event of_source",
}
_HISTORY = ("portfolio_history", "signal_archives")
_NEEDED = [
    *((table, privilege) for table in _HISTORY for privilege in ("SELECT", "INSERT")),
    *(("event_outcomes", privilege) for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE")),
    ("withdrawals", "SELECT"),
]

_FOUND = text("""
    SELECT name, (SELECT CAST(CAST(relnamespace AS regnamespace) AS text) FROM pg_class
            WHERE oid = to_regclass(name)) AS schema,
        obj_description(to_regclass(name), 'pg_class') AS comment,
        ARRAY(SELECT CAST(attname AS text) FROM pg_attribute
            WHERE attrelid = to_regclass(name) AND attnum > 0 AND NOT attisdropped) AS columns,
        ARRAY(SELECT CAST(relname AS text) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
            WHERE indrelid = to_regclass(name) AND indisvalid) AS indexes
    FROM unnest(CAST(:tables AS text[])) AS name
""")
_SCHEMAS = text("""
    SELECT quote_ident(nspname) AS name, has_schema_privilege(pg_namespace.oid, 'USAGE') AS may_use
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relname = ANY(:tables) AND relkind IN ('r', 'p')
    GROUP BY pg_namespace.oid, nspname HAVING count(*) = cardinality(CAST(:tables AS text[])) ORDER BY nspname
""")
_LACKING = text("""
    SELECT needed.name, string_agg(privilege, ', ' ORDER BY place) || ' ON ' || needed.name AS lacking
    FROM unnest(CAST(:tables AS text[]), CAST(:privileges AS text[])) WITH ORDINALITY AS needed (name, privilege, place)
    WHERE NOT has_table_privilege(to_regclass(needed.name), privilege)
    GROUP BY needed.name ORDER BY min(place)
""")
_SEQUENCES = text("""
    SELECT CAST(CAST(sequence AS regclass) AS text) FROM (
        SELECT pg_get_serial_sequence(name, 'id') AS sequence FROM unnest(CAST(:tables AS text[])) AS name) AS owned
    WHERE NOT has_sequence_privilege(sequence, 'USAGE')
""")
_IS_READER = text("""
    SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'trading_history_reader' AND pg_has_role(oid, 'USAGE'))
""")


@dataclass(frozen=True)
class SchemaDifferences:
    """Names in schema.sql that the database lacks; additional names in the database are ignored."""

    tables: list[str]
    columns: list[str]  # as table.column
    indexes: list[str]  # missing or invalid
    old_tables: list[str]  # of the old shape, without event ids
    comment: str | None  # on event_outcomes, with the version of the schema
    schemas: list[str]  # in which the tables are that were found


def schema_differences(db: Connection) -> SchemaDifferences:
    """Return the differences. It reads the catalog only, so a locked table does not delay it."""
    found = {row.name: row for row in db.execute(_FOUND, {"tables": list(COLUMNS)})}
    there = {table: row for table, row in found.items() if row.columns}
    columns = [(table, name) for table in there for name in COLUMNS[table].split()]
    indexes = [(table, f"{table}_{name}") for table in there for name in INDEXES[table].split()]
    return SchemaDifferences(
        [table for table in COLUMNS if table not in there],
        [f"{table}.{name}" for table, name in columns if name not in there[table].columns],
        [name for table, name in indexes if name not in there[table].indexes],
        [table for table in _HISTORY if table in there and "event_id" not in there[table].columns],
        found["event_outcomes"].comment,
        sorted({row.schema for row in there.values()}),
    )


def schemas_with_tables(db: Connection) -> dict[str, bool]:
    """Return the schemas of this database that have all tables, and whether this role may use them.

    Names are quoted as SQL needs it.
    """
    return {row.name: row.may_use for row in db.execute(_SCHEMAS, {"tables": list(COLUMNS)})}


def unquoted(name: str) -> str:
    """Return the name of an object that is quoted if SQL needs it, without quotation marks."""
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def url_value(name: str) -> str:
    """Return the name of a schema as DATABASE_URL needs it."""
    return quote(unquoted(name), safe="")


def other_schema_problem(db: Connection, search_path: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the problem and its solution if the tables are in other schemas than the given search_path; else None."""
    found = schemas_with_tables(db)
    usable = [name for name, may_use in found.items() if may_use]
    if not usable:
        advice = "run trading-history doctor, which names the missing privilege"
        return (
            (f"this role may not use schema {' and '.join(found)}, in which the tables are", advice) if found else None
        )
    there = f"they are in schema {' and '.join(usable)}"
    if not search_path:
        return f"no schema of the search_path has tables of trading-history; {there}", (
            f"add schema={url_value(usable[0])} to DATABASE_URL"
        )
    return f"schema {search_path[0]} has no tables of trading-history; {there}", (
        f"correct schema= in DATABASE_URL, or run trading-history init-db for new tables in schema {search_path[0]}"
    )


def lacking_privileges(db: Connection) -> list[str]:
    """Return the privileges that a worker needs and this role lacks, in the words of a GRANT; the tables must exist."""
    values = {"tables": [table for table, _ in _NEEDED], "privileges": [privilege for _, privilege in _NEEDED]}
    tables = [row.lacking for row in db.execute(_LACKING, values)]
    sequences = db.execute(_SEQUENCES, {"tables": list(_HISTORY)}).scalars()
    return [*tables, *(f"USAGE ON SEQUENCE {sequence}" for sequence in sequences)]


def is_reader(db: Connection) -> bool:
    """Return whether this role is a member of trading_history_reader."""
    return bool(db.execute(_IS_READER).scalar_one())
