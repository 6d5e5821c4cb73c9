"""schema.sql: its text, its version, applying it, and the checks that a database fits this program."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from consumers.db.database_url import schema_name_problem
from consumers.db.engine import ENCODING, get_db, quoted, search_path_of, translated_errors
from consumers.db.schema_comparison import other_schema_problem, schemas_with_tables, unquoted
from consumers.errors import OldSchema, StoreUnavailable, first_line
from producers.errors import HistoryError, SettingsError

_OLD_SCHEMA = "TH001"  # SQLSTATE that schema.sql raises
_NO_PRIVILEGE, _NO_SCHEMA = "42501", "3F000"
_ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(4825167903)")  # the lock of schema.sql
_SCHEMA_VERSION = re.compile(r"schema version (\d+)")
_DATABASE = text("""
    SELECT current_database() AS name, current_setting('server_encoding') AS encoding,
        quote_ident(current_database() || '_utf8') AS another,
        to_regclass('event_outcomes') IS NOT NULL AS has_tables,
        obj_description(to_regclass('event_outcomes'), 'pg_class') AS comment
""")
_PLACE = text("""
    SELECT current_schema() AS schema, quote_ident(current_schema()) AS quoted, quote_ident(current_user) AS role,
        quote_ident(current_database()) AS database,
        has_database_privilege(current_database(), 'CREATE') AS may_create_schemas,
        coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_create_tables,
        ARRAY(SELECT quote_ident(nspname) FROM pg_namespace
            WHERE NOT has_schema_privilege(oid, 'USAGE') AND nspname = ANY(ARRAY(
                SELECT CASE name WHEN '$user' THEN CAST(current_user AS text) ELSE name END
                FROM regexp_split_to_table(replace(current_setting('search_path'), '"', ''), ' *, *') AS name)))
            AS unusable_schemas,
        ARRAY(SELECT quote_ident(name)
            FROM regexp_split_to_table(replace(current_setting('search_path'), '"', ''), ' *, *') AS name
            WHERE name <> '$user' AND name NOT IN (SELECT nspname FROM pg_namespace)) AS missing_schemas
""")
_CHECKED = "trading-history: checked"  # key in the info of a pooled connection


def check_database(db: Connection) -> None:
    """Check, once per connection, that this version of the program can store events in this database.

    Raises:
        StoreUnavailable: the encoding is not UTF8, or the tables are missing or older than this program.
    """
    if _CHECKED in db.info:
        return
    found = db.execute(_DATABASE).one()
    if problem := encoding_problem(found):
        raise StoreUnavailable(problem)
    if not found.has_tables:
        elsewhere = other_schema_problem(db, search_path_of(db.engine))
        problem, advice = elsewhere or ("the tables are missing", "run trading-history init-db")
        raise StoreUnavailable(problem, advice=advice)
    if problem := outdated_schema_problem(found.comment):
        raise StoreUnavailable(problem)
    db.info[_CHECKED] = True


def check_database_now() -> None:
    """Check that events can be stored in the database of the settings. Raises StoreUnavailable."""
    with get_db() as db:
        check_database(db)


def check_encoding(db: Connection) -> None:
    """Raise StoreUnavailable if the encoding of the database is not UTF8; the message says what to do."""
    if problem := encoding_problem(db.execute(_DATABASE).one()):
        raise StoreUnavailable(f"{problem}. Nothing was changed.")


def encoding_problem(found: Row[Any]) -> str | None:
    """Return the problem and its solution in one line, or None if the encoding is UTF8.

    `found` has `name`, `encoding` and `another`, the name for a new database.
    """
    if found.encoding == ENCODING:
        return None
    return f"the encoding of database {found.name} is {found.encoding}, not UTF8: {encoding_advice(found.another)}"


def encoding_advice(another: str) -> str:
    """Return the advice to create a database in UTF8 with the name `another`."""
    # Without LC_COLLATE and LC_CTYPE, CREATE DATABASE takes the server's locale, which may not allow UTF8.
    create = f"CREATE DATABASE {another} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'"
    return f"create another database ({create}), name it in DATABASE_URL and run trading-history init-db"


def outdated_schema_problem(comment: str | None) -> str | None:
    """Return the problem in one line if `comment`, that of event_outcomes, has an old schema version; else None."""
    needed, found = _version_in(schema_sql()), _version_in(comment or "")
    if found >= needed:
        return None
    return f"the tables are too old (schema version {found}, needed is {needed}): run trading-history init-db"


def _version_in(words: str) -> int:
    found = _SCHEMA_VERSION.search(words)
    return 1 if found is None else int(found[1])  # version 1 had no number in its comment


@cache
def schema_sql() -> str:
    """Return the text of schema.sql, from the wheel or from the source tree."""
    consumers = Path(__file__).parents[1]
    packaged = consumers / "schema.sql"
    return (packaged if packaged.exists() else consumers.parent / "schema.sql").read_text("utf-8")


def schema_body() -> str:
    """Return schema.sql without its BEGIN and COMMIT, for use inside a larger transaction."""
    return re.sub(r"^(BEGIN|COMMIT);\n", "", schema_sql(), flags=re.M)


def schema_script(search_path: tuple[str, ...]) -> str:
    """Return SQL for psql that does the same as `apply_schema` of an engine with this search_path."""
    if not search_path:
        return schema_sql()
    name = quoted(search_path[0])
    return f"CREATE SCHEMA IF NOT EXISTS {name};\nSET search_path = {name};\n{schema_sql()}"


class _Notices:
    """Collects the server's notices from psycopg2; SQLAlchemy would empty a list."""

    def __init__(self) -> None:
        self.of_roles: list[str] = []

    def append(self, notice: str) -> None:
        # The word before the first colon is in the language of the server.
        if found := re.match(r"[^:]+:\s+roles: (.*)", notice, re.DOTALL):
            self.of_roles.append(found[1].strip())


@contextmanager
def role_notes(connection: Connection) -> Iterator[list[str]]:
    """Collect the notices of schema.sql about roles that it could not create or grant privileges to.

    The list is complete when the block ends.
    """
    session: Any = connection.connection.driver_connection
    session.notices = notices = _Notices()
    connection.exec_driver_sql("SET LOCAL client_min_messages = notice")
    try:
        yield notices.of_roles
    finally:
        session.notices = []


def apply_schema(store: Engine) -> list[str]:
    """Create the tables, indexes and roles that are missing. It may run at any time, also in several processes at once.

    The tables are in the current schema. A schema that was given to `store` is created if it does not exist.

    Returns:
        Notes for the user about roles and privileges that could not be created.

    Raises:
        OldSchema: tables of the old shape have our names; nothing was changed.
        StoreUnavailable: the database is away, refuses a statement, or is not encoded in UTF8.
    """
    try:
        with translated_errors(store), store.begin() as pooled:
            check_encoding(pooled)
            create_schema(pooled, search_path_of(store))
            connection = pooled.execution_options(no_parameters=True)
            with role_notes(connection) as notes:
                connection.exec_driver_sql(schema_body())
            return notes
    except StoreUnavailable as error:
        cause = error.__cause__
        if not isinstance(cause, DBAPIError):
            raise
        sqlstate = getattr(cause.orig, "pgcode", None)
        if sqlstate == _OLD_SCHEMA:
            hint = getattr(getattr(cause.orig, "diag", None), "message_hint", None)
            raise OldSchema(f"{first_line(cause)}. {hint}") from cause
        if sqlstate in (_NO_PRIVILEGE, _NO_SCHEMA):
            with translated_errors(store), store.begin() as db:
                advice = creation_advice(place_of_tables(db))
            if advice is not None:
                raise StoreUnavailable(f"{error}: {advice}") from cause
        raise


def other_tables(store: Engine) -> list[str]:
    """Return notes about tables in other schemas, if the current schema has none. Call it before creating them there.

    Raises:
        HistoryError: no schema was given to `store`, so other tables would be made by mistake; nothing was changed.
        StoreUnavailable: the database cannot be reached.
    """
    with translated_errors(store), store.begin() as db:
        place, there = place_of_tables(db), schemas_with_tables(db)
    if not there or place.quoted in there:
        return []
    names = " and ".join(there)
    if search_path_of(store):
        return [f"schema {names} has tables of trading-history too; these are separate histories"]
    command = "run trading-history init-db --schema"
    another = "NAME" if place.schema is None else shlex.quote(place.schema)
    raise HistoryError(
        f"the tables are in schema {names}, not in the current schema{f' {place.quoted}' if place.quoted else ''}."
        f" Nothing was changed: to upgrade them, {command} {shlex.quote(unquoted(next(iter(there))))};"
        f" for a second, empty history, {command} {another}"
    )


def create_schema(db: Connection, search_path: tuple[str, ...]) -> None:
    """Create the first schema of `search_path` if none of them exists; do nothing if it is empty."""
    if not search_path:
        return
    exists = place_of_tables(db).schema is not None
    if not (exists and search_path[0] == "$user") and (problem := schema_name_problem(search_path[0])):
        raise SettingsError(f"DATABASE_URL: schema {problem}")
    if not exists:
        db.execute(_ONE_AT_A_TIME)
        create = f"CREATE SCHEMA IF NOT EXISTS {quoted(search_path[0])}"
        db.execution_options(no_parameters=True).exec_driver_sql(create)


def place_of_tables(db: Connection) -> Row[Any]:
    """Return the schema in which tables are created, the role, and the role's privileges there.

    `unusable_schemas` has the schemas of the search_path that the role may not use, and `missing_schemas` those that do
    not exist.
    """
    return db.execute(_PLACE).one()


def creation_advice(place: Row[Any]) -> str | None:
    """Return advice, with the GRANTs after which this role can create the tables; None if no privilege is missing."""
    if place.may_create_tables:
        return None
    if place.unusable_schemas:
        return (
            f"as the owner of the schema, run GRANT USAGE, CREATE ON SCHEMA {place.unusable_schemas[0]} TO {place.role}"
        )
    grant = f"as the owner of the database, run GRANT CREATE ON DATABASE {place.database} TO {place.role}; then "
    other_schema_advice = ("" if place.may_create_schemas else grant) + "run trading-history init-db --schema NAME"
    if place.schema is None:
        return other_schema_advice
    here = f"as the owner of the schema, run GRANT CREATE ON SCHEMA {place.quoted} TO {place.role}"
    return f"{here}; or for another schema, {other_schema_advice}"
