"""The schema: schema.sql and its version, applying it, and the checks that a database fits this program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import ENCODING, translated_errors
from consumers.errors import OldSchema, StoreUnavailable, first_line

_IN_THE_WAY = "TH001"  # raised by schema.sql
_SCHEMA_VERSION = re.compile(r"schema version (\d+)")
_DATABASE = text("""
    SELECT current_database() AS name, current_setting('server_encoding') AS encoding,
        quote_ident(current_database() || '_utf8') AS another,
        obj_description(to_regclass('event_outcomes'), 'pg_class') AS comment
""")
_CHECKED = "trading-history: checked"  # in the info of a pooled connection


def check_database(db: Connection) -> None:
    """Check once for each connection that events can be stored in this database, by this version of the program.

    Raises:
        StoreUnavailable: the encoding is not UTF8, or the tables are older than this program.
    """
    if _CHECKED in db.info:
        return
    found = db.execute(_DATABASE).one()
    if problem := encoding_problem(found) or outdated_schema_problem(found.comment):
        raise StoreUnavailable(problem)
    db.info[_CHECKED] = True


def check_encoding(db: Connection) -> None:
    """Raises StoreUnavailable when the database's encoding is not UTF8; the message says how to make another."""
    if problem := encoding_problem(db.execute(_DATABASE).one()):
        raise StoreUnavailable(f"{problem}. Nothing was changed.")


def encoding_problem(found: Row[Any]) -> str | None:
    """The problem and its solution as one line; `found` has `name`, `encoding` and `another`, a name to use."""
    if found.encoding == ENCODING:
        return None
    return f"the encoding of database {found.name} is {found.encoding}, not UTF8: {encoding_advice(found.another)}"


def encoding_advice(another: str) -> str:
    # Without the locale the server's own is taken, which may not go together with UTF8.
    create = f"CREATE DATABASE {another} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'"
    return f"create another database ({create}), name it in DATABASE_URL and run trading-history init-db"


def outdated_schema_problem(comment: str | None) -> str | None:
    """The problem as one line if this comment on event_outcomes names an older schema version; else None."""
    needed, found = _version_in(schema_sql()), _version_in(comment or "")
    if found >= needed:
        return None
    return f"the tables are missing or older (schema version {found}, needed is {needed}): run trading-history init-db"


def _version_in(words: str) -> int:
    found = _SCHEMA_VERSION.search(words)
    return 1 if found is None else int(found[1])  # the first did not say


@cache
def schema_sql() -> str:
    """The text of schema.sql, from the wheel or from the source tree."""
    consumers = Path(__file__).parents[1]
    packaged = consumers / "schema.sql"
    return (packaged if packaged.exists() else consumers.parent / "schema.sql").read_text("utf-8")


def schema_body() -> str:
    """schema.sql without its BEGIN and COMMIT, for a transaction that does more."""
    return re.sub(r"^(BEGIN|COMMIT);\n", "", schema_sql(), flags=re.M)


class _Notices:
    """Receives the notices of the server from psycopg2; SQLAlchemy would empty a list."""

    def __init__(self) -> None:
        self.of_roles: list[str] = []

    def append(self, notice: str) -> None:
        _, found, note = notice.partition("NOTICE:  roles: ")
        if found:
            self.of_roles.append(note.strip())


@contextmanager
def role_notes(connection: Connection) -> Iterator[list[str]]:
    """Notices of schema.sql inside the block about roles that it could not create or grant access to."""
    session: Any = connection.connection.driver_connection
    session.notices = notices = _Notices()
    try:
        yield notices.of_roles
    finally:
        session.notices = []


def apply_schema(store: Engine) -> list[str]:
    """Make the tables that are missing; safe to run at any time and by several at once. Notes for the user.

    Raises:
        OldSchema: tables of another shape have our names; nothing was changed.
        StoreUnavailable: the database cannot be reached, refuses, or is not encoded in UTF8.
    """
    try:
        with translated_errors(), store.connect() as pooled:
            # The file has its own BEGIN and COMMIT, so that psql runs it in the same way; autocommit leaves them alone.
            # If a statement fails, the connection stays in an open transaction, and is therefore invalidated.
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
        if isinstance(cause, DBAPIError) and getattr(cause.orig, "pgcode", None) == _IN_THE_WAY:
            hint = getattr(getattr(cause.orig, "diag", None), "message_hint", None)
            raise OldSchema(f"{first_line(cause)}. {hint}") from cause
        raise
