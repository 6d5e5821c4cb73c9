"""Adopt tables of the old shape: rename them with the suffix `_legacy` and create the new tables under their names.

Everything happens in one transaction: first the renames, then schema.sql. A renamed table keeps its rows, columns,
keys, views, triggers, foreign keys and grants.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import translated_errors
from consumers.db.schema import apply_schema, check_encoding, role_notes, schema_body
from consumers.errors import AdoptionRefused, StoreUnavailable

LEGACY_SUFFIX = "_legacy"
# The import reads these columns, so an old table must have them. Other columns are not read.
_OLD_COLUMNS = {
    "portfolio_history": (
        "id",
        "snapshot_date",
        "timestamp",
        "balance",
        "total_invested",
        "total_profit_loss",
        "total_value",
        "open_positions",
        "trade_count",
    ),
    "signal_archives": ("id", "archived_at", "signals_count", "signals_data"),
}
# Short, because other sessions queue behind a waiting lock. Not below 1 s: only then does an autovacuum yield.
_LOCK_SECONDS = 3
_LOCK_NOT_AVAILABLE, _DEADLOCK = "55P03", "40P01"
_SHOWN_SESSIONS = 3

_OLD_TABLES = text("""
    SELECT c.oid, c.relname AS name, c.relkind AS kind, quote_ident(n.nspname) AS schema,
        pg_get_userbyid(c.relowner) AS owner, current_user AS who, pg_has_role(c.relowner, 'USAGE') AS may_rename,
        has_schema_privilege(n.oid, 'CREATE') AS may_create, pg_get_userbyid(c.relowner) = current_user AS same_owner,
        ARRAY(SELECT CAST(attname AS text) FROM pg_attribute
            WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relname = ANY(:names) AND n.nspname = current_schema()
        AND NOT EXISTS (
            SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = 'event_id' AND NOT attisdropped)
    ORDER BY c.relname
""")

# Types count too: each table has a row type of the same name.
_TAKEN = text("""
    SELECT relname AS name FROM pg_class
    WHERE relname = ANY(:names) AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    UNION SELECT typname FROM pg_type
    WHERE typname = ANY(:names) AND typnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    ORDER BY name
""")

_SAME_NAMES = text("""
    SELECT c.relname AS name, c.relkind AS kind, coalesce(i.indrelid, d.refobjid) AS of_table, t.relname AS table_name,
        pg_describe_object('pg_class'::regclass, c.oid, 0) AS description
    FROM pg_class c
    LEFT JOIN pg_index i ON i.indexrelid = c.oid
    LEFT JOIN pg_depend d ON c.relkind = 'S' AND d.classid = 'pg_class'::regclass AND d.objid = c.oid
        AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
    LEFT JOIN pg_class t ON t.oid = coalesce(i.indrelid, d.refobjid)
    WHERE c.relname = ANY(:names) AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    ORDER BY c.relname
""")

# Objects that depend on a table or on its row type: views, rules, functions, policies, publications, foreign keys of
# other tables, triggers, partitions and child tables.
_DEPENDENTS = text("""
    SELECT DISTINCT CASE WHEN r.ev_class <> :table THEN pg_describe_object('pg_class'::regclass, r.ev_class, 0)
        ELSE pg_describe_object(d.classid, d.objid, 0) END AS description
    FROM pg_depend d
    LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
    LEFT JOIN pg_trigger t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid
    LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
    WHERE (d.refclassid = 'pg_class'::regclass AND d.refobjid = :table
            OR d.refclassid = 'pg_type'::regclass AND d.refobjid = (SELECT reltype FROM pg_class WHERE oid = :table))
        AND (d.classid IN ('pg_rewrite'::regclass, 'pg_proc'::regclass, 'pg_policy'::regclass,
                'pg_publication_rel'::regclass)
            OR k.contype = 'f' AND k.conrelid <> :table
            OR NOT t.tgisinternal
            OR c.relkind IN ('r', 'p', 'f'))
    ORDER BY description
""")

_CASCADES = text("""
    SELECT quote_ident(conname) AS name, CAST(confrelid AS regclass) AS parent FROM pg_constraint
    WHERE conrelid = :table AND contype = 'f' AND confdeltype = 'c' ORDER BY conname
""")

_READERS = text("""
    SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS grantee
    FROM pg_class c, aclexplode(c.relacl) AS a
    WHERE c.oid = :table AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner ORDER BY grantee
""")

# Without the query's text, which can contain values of rows.
_LOCKING_SESSIONS = text("""
    SELECT DISTINCT l.pid, a.application_name, a.state,
        CAST(extract(epoch FROM clock_timestamp() - a.xact_start) AS integer) AS seconds
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND c.relname = ANY(:names) AND l.pid IS DISTINCT FROM pg_backend_pid()
        AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    ORDER BY seconds DESC NULLS LAST
""")


@dataclass(frozen=True)
class Adoption:
    """Plan or result of an adoption.

    `renamed` has (old name, new name) of each table. `statements` is SQL for one transaction: locks, renames,
    schema.sql. `notes` are sentences for the user. `earlier` names the tables that an earlier adoption renamed.
    """

    renamed: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    notes: tuple[str, ...]
    earlier: tuple[str, ...]

    def script(self) -> str:
        """Return the transaction as an SQL script for psql, with the notes as comments."""
        notes = [f"-- {note}" for note in self.notes]
        return "\n".join([*notes, "BEGIN;", *self.statements, "COMMIT;"]) + "\n"


def plan_adoption(store: Engine) -> Adoption:
    """Return what adopt_legacy would do now. Change nothing and lock nothing.

    Raises:
        AdoptionRefused: adopt_legacy would raise it too.
        StoreUnavailable: the database cannot be reached or cannot execute the statements now.
    """
    with translated_errors(store), store.begin() as db:
        db.exec_driver_sql("SET TRANSACTION READ ONLY")
        return _plan(db, _old_tables(db))


def adopt_legacy(store: Engine) -> Adoption:
    """Rename tables of the old shape and create the new ones, all or nothing.

    Without old tables, only create the new ones.

    Raises:
        AdoptionRefused: the old tables are in use, a name is already taken, or a privilege is missing. Nothing was
            changed.
        StoreUnavailable: the database cannot be reached, cannot execute the statements now, or is not encoded in UTF8.
            Nothing was changed.
    """
    try:
        adoption = _adopt(store)
    except StoreUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, DBAPIError) and getattr(cause.orig, "pgcode", None) in (_LOCK_NOT_AVAILABLE, _DEADLOCK):
            raise AdoptionRefused(_in_use(store)) from cause
        raise
    if not adoption.renamed:
        return replace(adoption, notes=(*adoption.notes, *apply_schema(store)))
    return adoption


def _adopt(store: Engine) -> Adoption:
    with translated_errors(store), store.begin() as pooled:
        check_encoding(pooled)
        db = pooled.execution_options(no_parameters=True)
        old = _old_tables(db)
        for statement in _lock(old):
            db.exec_driver_sql(statement)
        # Read the tables again under the lock: another session may have adopted them or created an index meanwhile.
        adoption = _plan(db, _old_tables(db))
        with role_notes(db) as notes:
            for statement in adoption.statements if adoption.renamed else ():
                db.exec_driver_sql(statement)
        return replace(adoption, notes=(*adoption.notes, *notes))


def _old_tables(db: Connection) -> list[Any]:
    """Return the rows of _OLD_TABLES.

    Raises:
        AdoptionRefused: one of the tables cannot be adopted.
    """
    tables = list(db.execute(_OLD_TABLES, {"names": list(_OLD_COLUMNS)}))
    for table in tables:
        if table.kind not in ("r", "p"):
            raise _refused(f"{table.name} is not a table")
        if missing := [column for column in _OLD_COLUMNS[table.name] if column not in table.columns]:
            raise _refused(f"{table.name} does not have the old shape: it has no column {', '.join(missing)}")
        if not table.may_rename:
            raise _refused(f"user {table.who} may not rename {table.name}: only its owner {table.owner} may")
        if not table.may_create:
            raise _refused(f"user {table.who} may not create tables in the schema {table.schema}")
    return tables


def _plan(db: Connection, old: list[Any]) -> Adoption:
    renamed = tuple((table.name, table.name + LEGACY_SUFFIX) for table in old)
    legacy_names = [name + LEGACY_SUFFIX for name in _OLD_COLUMNS]
    earlier = [name for name in _taken(db, legacy_names) if name.removesuffix(LEGACY_SUFFIX) not in dict(renamed)]
    if not old:
        return Adoption(renamed, (schema_body(),), (), tuple(earlier))
    renames = [("TABLE", table.name) for table in old] + _same_names(db, old)
    if taken := _taken(db, [name + LEGACY_SUFFIX for _, name in renames]):
        raise _refused(f"the name {taken[0]} is already in use: rename or drop the object that has it")
    schema = old[0].schema
    statements = [f"ALTER {kind} {schema}.{name} RENAME TO {name}{LEGACY_SUFFIX};" for kind, name in renames]
    notes = [note for table in old for note in _notes(db, table)]
    return Adoption(renamed, (*_lock(old), *statements, schema_body()), tuple(notes), tuple(earlier))


def _lock(old: list[Any]) -> list[str]:
    if not old:
        return []
    names = ", ".join(f"ONLY {table.schema}.{table.name}" for table in old)
    return [
        f"SET LOCAL search_path = {old[0].schema};",
        f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s';",
        f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE;",
    ]


def names_in_schema() -> list[str]:
    """Return the names of the objects that schema.sql creates beside the tables: indexes, keys and sequences."""
    body = schema_body()
    indexes = re.findall(r"^CREATE INDEX IF NOT EXISTS (\w+)", body, re.M)
    keys = re.findall(r"CONSTRAINT (\w+) (?:PRIMARY KEY|UNIQUE)", body)
    return [*indexes, *keys, *(f"{table}_id_seq" for table in (*_OLD_COLUMNS, "withdrawals"))]


def _same_names(db: Connection, old: list[Any]) -> list[tuple[str, str]]:
    """Return kind and name of each index and sequence of the old tables whose name the new tables need.

    The names with the suffix are shorter than 63 bytes, PostgreSQL's limit.

    Raises:
        AdoptionRefused: an object of another table has such a name.
    """
    ours = {"portfolio_history", "signal_archives", "event_outcomes", "withdrawals"} - {table.name for table in old}
    renames = []
    for found in db.execute(_SAME_NAMES, {"names": names_in_schema()}):
        if found.of_table in [table.oid for table in old]:
            renames.append(("SEQUENCE" if found.kind == "S" else "INDEX", found.name))
        elif found.kind != "S" and found.table_name not in ours:  # PostgreSQL chooses another name for a sequence
            where = f" of table {found.table_name}" if found.table_name else ""
            raise _refused(f"{found.description}{where} has a name that the new tables need: rename it")
    return renames


def _taken(db: Connection, names: list[str]) -> list[str]:
    return list(db.execute(_TAKEN, {"names": names}).scalars())


def _notes(db: Connection, table: Any) -> list[str]:
    """Return notes about objects and grants that stay with the old table, which a user may expect on the new one."""
    legacy, parameters = table.name + LEGACY_SUFFIX, {"table": table.oid}
    notes = [
        f"{found.description} belongs to {legacy} now, not to the new {table.name}"
        for found in db.execute(_DEPENDENTS, parameters)
    ]
    notes += [
        f"{found.name} still deletes rows of {legacy} when their row of {found.parent} is deleted (ON DELETE CASCADE);"
        f" to prevent that: ALTER TABLE {legacy} DROP CONSTRAINT {found.name}"
        for found in db.execute(_CASCADES, parameters)
    ]
    if readers := list(db.execute(_READERS, parameters).scalars()):
        notes.append(
            f"grants stay with {legacy}; to let the same roles read the new table:"
            f" GRANT SELECT ON {table.name} TO {', '.join(readers)}"
        )
    if not table.same_owner:
        notes.append(f"the owner of the new {table.name} is {table.who}, the owner of {legacy} is {table.owner}")
    return notes


def _in_use(store: Engine) -> str:
    """Return the message about locked tables. It names the sessions, so that an operator can end them."""
    with translated_errors(store), store.connect() as db:
        sessions = list(db.execute(_LOCKING_SESSIONS, {"names": [*_OLD_COLUMNS, *names_in_schema()]}))
    shown = ", ".join(_described_session(one) for one in sessions[:_SHOWN_SESSIONS])
    more = f" and {len(sessions) - _SHOWN_SESSIONS} more" if len(sessions) > _SHOWN_SESSIONS else ""
    cause = f"locked by {shown}{more}" if sessions else "but no session locks them any more"
    return f"the old tables could not be locked within {_LOCK_SECONDS} s: {cause}. Nothing was changed: try again."


def _described_session(session: Any) -> str:
    if session.pid is None:
        return "a prepared transaction"
    if session.state is None:  # a session of another user: PostgreSQL hides its state
        return f"pid {session.pid}"
    name = session.application_name or "no name"
    return f"pid {session.pid} ({name}, {session.state}, transaction open for {session.seconds} s)"


def _refused(reason: str) -> AdoptionRefused:
    return AdoptionRefused(f"{reason}. Nothing was changed.")
