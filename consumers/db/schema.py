"""schema.sql: its text, its version, applying it, and the checks that a database fits this program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import ENCODING, get_db, translated_errors
from consumers.errors import OldSchema, StoreUnavailable, first_line

_OLD_SCHEMA = "TH001"  # SQLSTATE that schema.sql raises
_SCHEMA_VERSION = re.compile(r"schema version (\d+)")
_DATABASE = text("""
    SELECT current_database() AS name, current_setting('server_encoding') AS encoding,
        quote_ident(current_database() || '_utf8') AS another,
        obj_description(to_regclass('event_outcomes'), 'pg_class') AS comment
""")
_CHECKED = "trading-history: checked"  # key in the info of a pooled connection


def check_database(db: Connection) -> None:
    """Check, once per connection, that this version of the program can store events in this database.

    Raises:
        StoreUnavailable: the encoding is not UTF8, or the tables are older than this program.
    """
    if _CHECKED in db.info:
        return
    found = db.execute(_DATABASE).one()
    if problem := encoding_problem(found) or outdated_schema_problem(found.comment):
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
    return (
        f"the tables are missing or too old (schema version {found}, needed is {needed}): run trading-history init-db"
    )


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


class _Notices:
    """Collects the server's notices from psycopg2; SQLAlchemy would empty a list."""

    def __init__(self) -> None:
        self.of_roles: list[str] = []

    def append(self, notice: str) -> None:
        _, found, note = notice.partition("NOTICE:  roles: ")
        if found:
            self.of_roles.append(note.strip())


@contextmanager
def role_notes(connection: Connection) -> Iterator[list[str]]:
    """Collect the notices of schema.sql about roles that it could not create or grant privileges to.

    The list is complete when the block ends.
    """
    session: Any = connection.connection.driver_connection
    session.notices = notices = _Notices()
    try:
        yield notices.of_roles
    finally:
        session.notices = []


def apply_schema(store: Engine) -> list[str]:
    """Create the tables, indexes and roles that are missing. It may run at any time, also in several processes at once.

    Returns:
        Notes for the user about roles and privileges that could not be created.

    Raises:
        OldSchema: tables of the old shape have our names; nothing was changed.
        StoreUnavailable: the database is away, refuses a statement, or is not encoded in UTF8.
    """
    try:
        with translated_errors(), store.connect() as pooled:
            # The file has its own BEGIN and COMMIT, so that psql can run it too; AUTOCOMMIT does not add others.
            # If a statement fails, the connection stays in an open transaction, so it is invalidated.
            connection = pooled.execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)
            check_encoding(connection)
            try:
                with role_notes(connection) as notes:
                    connection.exec_driver_sql(schema_sql())
                return notes
            except DBAPIError:
                connection.invalidate()
                raise
    except StoreUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, DBAPIError) and getattr(cause.orig, "pgcode", None) == _OLD_SCHEMA:
            hint = getattr(getattr(cause.orig, "diag", None), "message_hint", None)
            raise OldSchema(f"{first_line(cause)}. {hint}") from cause
        raise
