"""Facts of a database, read from its catalog and tables, to compare two states of it on one server.

The text of a dump is not compared, because it can contain values that the server generates: PostgreSQL 15.20 stores
`pg_attver` among the options of each column, with another value after every CREATE TABLE.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import psycopg2
from psycopg2 import sql

Facts = dict[tuple[str, str, str], Any]
"""By schema, name and kind of fact ("relation", "column balance", "rows", …)."""

_SESSION = """
    SET search_path = ''; SET statement_timeout = '60s'; SET timezone = 'UTC'; SET datestyle = 'ISO';
    SET intervalstyle = 'postgres'
"""
_OURS = "nspname <> 'information_schema' AND nspname NOT LIKE 'pg\\_%'"


def _privileges(acl: str, kind: str, owner: str) -> str:
    """Return SQL for an ACL in sorted order; an ACL that was never changed gives the default privileges."""
    entries = f"unnest(coalesce({acl}, acldefault('{kind}', {owner})))"
    return f"ARRAY(SELECT CAST(entry AS text) FROM {entries} entry ORDER BY 1)"


# Each query returns schema, name, kind of fact, fact. Column positions do not count dropped columns. Only the column
# options that a user can set are included.
_QUERIES = (
    f"""
    SELECT nspname, '', 'schema', jsonb_build_array(pg_get_userbyid(nspowner),
        {_privileges("nspacl", "n", "nspowner")}, obj_description(oid, 'pg_namespace'))
    FROM pg_namespace WHERE {_OURS}
    """,
    f"""
    SELECT nspname, relname, 'relation', jsonb_build_array(relkind, pg_get_userbyid(relowner), relpersistence,
        (SELECT amname FROM pg_am WHERE pg_am.oid = relam), reltablespace, relreplident, relrowsecurity,
        relforcerowsecurity, ARRAY(SELECT unnest(reloptions) ORDER BY 1),
        {_privileges("relacl", "r", "relowner")}, obj_description(c.oid, 'pg_class'), pg_get_partkeydef(c.oid),
        pg_get_expr(relpartbound, c.oid), CAST(NULLIF(reloftype, 0) AS regtype),
        ARRAY(SELECT CAST(CAST(inhparent AS regclass) AS text) FROM pg_inherits
            WHERE inhrelid = c.oid ORDER BY inhseqno))
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE {_OURS} AND relkind NOT IN ('t', 'I', 'i')
    """,
    f"""
    SELECT nspname, relname, 'column ' || attname, jsonb_build_array(
        row_number() OVER (PARTITION BY attrelid ORDER BY attnum), format_type(atttypid, atttypmod),
        (SELECT collname FROM pg_collation o WHERE o.oid = attcollation), attnotnull, pg_get_expr(adbin, adrelid),
        attidentity, attgenerated, attstorage, attcompression, attstattarget, attislocal, attinhcount,
        ARRAY(SELECT option FROM unnest(attoptions) option WHERE option LIKE 'n\\_distinct%' ORDER BY 1),
        ARRAY(SELECT CAST(entry AS text) FROM unnest(attacl) entry ORDER BY 1), col_description(c.oid, attnum))
    FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE {_OURS} AND attnum > 0 AND NOT attisdropped AND relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
    """,
    f"""
    SELECT nspname, coalesce(relname, typname), 'constraint ' || conname, jsonb_build_array(
        pg_get_constraintdef(k.oid), convalidated, conislocal, coninhcount, connoinherit,
        obj_description(k.oid, 'pg_constraint'))
    FROM pg_constraint k JOIN pg_namespace n ON n.oid = connamespace
    LEFT JOIN pg_class c ON c.oid = conrelid LEFT JOIN pg_type t ON t.oid = contypid WHERE {_OURS}
    """,
    f"""
    SELECT nspname, relname, 'index', jsonb_build_array(pg_get_indexdef(indexrelid), indisprimary, indisvalid,
        indisclustered, indisreplident, reltablespace, obj_description(c.oid, 'pg_class'))
    FROM pg_index i JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = relnamespace WHERE {_OURS}
    """,
    f"""
    SELECT nspname, relname, 'numbers', jsonb_build_array(to_jsonb(s) - 'seqrelid' - 'seqtypid',
        format_type(seqtypid, NULL), deptype, CAST(CAST(refobjid AS regclass) AS text),
        (SELECT attname FROM pg_attribute WHERE attrelid = refobjid AND attnum = refobjsubid))
    FROM pg_sequence s JOIN pg_class c ON c.oid = seqrelid JOIN pg_namespace n ON n.oid = relnamespace
    LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid
        AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
    WHERE {_OURS}
    """,
    f"""
    SELECT nspname, relname, 'rule ' || rulename, jsonb_build_array(pg_get_ruledef(r.oid), ev_enabled,
        obj_description(r.oid, 'pg_rewrite'))
    FROM pg_rewrite r JOIN pg_class c ON c.oid = ev_class JOIN pg_namespace n ON n.oid = relnamespace WHERE {_OURS}
    """,
    f"""
    SELECT nspname, relname, 'trigger ' || tgname, jsonb_build_array(pg_get_triggerdef(t.oid), tgenabled,
        obj_description(t.oid, 'pg_trigger'))
    FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid JOIN pg_namespace n ON n.oid = relnamespace
    WHERE {_OURS} AND NOT tgisinternal
    """,
    "SELECT schemaname, tablename, 'policy ' || policyname, to_jsonb(p) FROM pg_policies p",
    f"""
    SELECT nspname, stxname, 'statistics', jsonb_build_array(pg_get_statisticsobjdef(s.oid), pg_get_userbyid(stxowner))
    FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = stxnamespace WHERE {_OURS}
    """,
    f"""
    SELECT nspname, CAST(CAST(p.oid AS regprocedure) AS text), 'function', jsonb_build_array(
        CASE WHEN prokind <> 'a' THEN pg_get_functiondef(p.oid) END, pg_get_userbyid(proowner),
        {_privileges("proacl", "f", "proowner")}, obj_description(p.oid, 'pg_proc'))
    FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE {_OURS}
    """,
    f"""
    SELECT nspname, typname, 'type', jsonb_build_array(typtype, pg_get_userbyid(typowner), typnotnull, typdefault,
        format_type(NULLIF(typbasetype, 0), typtypmod), obj_description(t.oid, 'pg_type'),
        {_privileges("typacl", "T", "typowner")},
        ARRAY(SELECT CAST(enumlabel AS text) FROM pg_enum WHERE enumtypid = t.oid ORDER BY enumsortorder))
    FROM pg_type t JOIN pg_namespace n ON n.oid = typnamespace WHERE {_OURS} AND typtype IN ('d', 'e', 'r')
    """,
    """
    SELECT '', pubname, 'publication', jsonb_build_array(to_jsonb(p) - 'oid' - 'pubowner', pg_get_userbyid(pubowner),
        ARRAY(SELECT to_jsonb(t) FROM pg_publication_tables t WHERE t.pubname = p.pubname ORDER BY to_jsonb(t)))
    FROM pg_publication p
    """,
    "SELECT '', extname, 'extension', to_jsonb(extversion) FROM pg_extension",
    """
    SELECT coalesce(nspname, ''), pg_get_userbyid(defaclrole), 'default privileges ' || CAST(defaclobjtype AS text),
        to_jsonb(ARRAY(SELECT CAST(entry AS text) FROM unnest(defaclacl) entry ORDER BY 1))
    FROM pg_default_acl LEFT JOIN pg_namespace n ON n.oid = defaclnamespace
    """,
)
_TABLES = f"""
    SELECT nspname, relname, relkind FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
    WHERE {_OURS} AND relkind IN ('r', 'p', 'S') ORDER BY 1, 2
"""
# ONLY: tables that inherit from this one are read separately.
_ROWS = sql.SQL("SELECT CAST(t AS text) FROM ONLY {} t ORDER BY 1")
_NUMBER = sql.SQL("SELECT last_value, is_called FROM {}")


def database_facts(url: str, schema: str | None = None) -> Facts:
    """Return definitions, owners, privileges, comments, sequence values and rows, of one schema or of all.

    If a session has a lock on a table, wait up to 60 s. The order of columns matters, the order of rows does not.
    Settings, roles, event triggers, operators, casts and the rows of materialized views are not covered.
    """
    with closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as db:
        db.execute(_SESSION)
        db.execute(_TABLES)
        tables = [(sql.Identifier(*found[:2]), *found) for found in db.fetchall()]
        for table, *_, kind in tables:
            if kind != "S":
                db.execute(sql.SQL("LOCK TABLE ONLY {} IN ACCESS SHARE MODE").format(table))
        facts: Facts = {}
        for query in _QUERIES:
            db.execute(query)
            found = {(where, name, kind): fact for where, name, kind, fact in db.fetchall()}
            assert not facts.keys() & found.keys()
            assert len(found) == db.rowcount  # no fact hides another
            facts |= found
        for table, where, name, kind in tables:
            db.execute((_NUMBER if kind == "S" else _ROWS).format(table))
            facts[where, name, "number" if kind == "S" else "rows"] = db.fetchall()
    return facts if schema is None else {key: fact for key, fact in facts.items() if key[0] == schema}
