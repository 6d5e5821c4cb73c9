"""Login roles of the worker and of the API. They have only the privileges of their roles, which schema.sql makes.

In this database, their search_path is the schema of the tables, whatever the database and the server set. A login that
finds the tables in one schema is not moved to another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from psycopg2 import extensions, sql
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import translated_errors
from consumers.db.schema_comparison import schemas_with_tables
from consumers.errors import LoginNotMade
from consumers.settings import LoginSettings

WORKER, API = "trading_history_worker", "trading_history_api"
WRITER, READER = "trading_history_writer", "trading_history_reader"

# Roles belong to the whole server: init-db of another database may change the same role at the same time.
_CONCURRENT_CHANGE = ("23505", "42710", "XX000")
_TRIES = 5
_NO_PRIVILEGE = "42501"
# Until PostgreSQL 15, CREATEROLE was enough to change a role and to grant it.
_ROLE = text("""
    SELECT current_user AS me, login.oid IS NOT NULL AS exists,
        coalesce(pg_has_role(login.oid, grp.oid, 'MEMBER'), false) AS is_member,
        me.rolsuper OR me.rolcreaterole AS may_create,
        me.rolsuper OR CASE WHEN CAST(current_setting('server_version_num') AS integer) < 160000 THEN me.rolcreaterole
            ELSE coalesce(pg_has_role(grp.oid, 'MEMBER WITH ADMIN OPTION'), me.rolcreaterole) END AS may_grant
    FROM pg_roles AS me LEFT JOIN pg_roles AS login ON login.rolname = :login
    LEFT JOIN pg_roles AS grp ON grp.rolname = :group
    WHERE me.rolname = current_user
""")
# Logins that exist, and their search_path in this database. Without any setting, a login finds the schema public. The
# setting of a role in a database comes before that of the role, and that of the database.
_SEARCH_PATHS = text("""
    SELECT CAST(rolname AS text) AS login, quote_ident(current_schema()) AS home, coalesce((
        SELECT substr(setting, 13) FROM pg_db_role_setting CROSS JOIN unnest(setconfig) AS setting
        WHERE setting LIKE 'search_path=%' AND setrole IN (0, pg_roles.oid)
            AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
        ORDER BY setrole <> 0 DESC, setdatabase <> 0 DESC LIMIT 1), 'public') AS search_path
    FROM pg_roles WHERE rolname = ANY(:logins) ORDER BY rolname
""")
_NAME = re.compile(r'"(?:[^"]|"")+"|[^", ]+')


def set_passwords(store: Engine, settings: LoginSettings) -> Iterator[str]:
    """Create the login roles whose passwords are in the settings, or change their passwords; yield each name when done.

    Raises:
        LoginNotMade: this user may not create or change the role, or its group is missing.
        StoreUnavailable: the database cannot be reached.
    """
    for login, group, password in _wanted(settings):
        _change(store, login, group, password)
        yield login


def missing_logins(db: Connection, settings: LoginSettings) -> list[tuple[str, str]]:
    """Return a sentence for each login whose password is set and which does not exist or is not a member of its role.

    The second value has the statements after which this user may create it; it is empty if no privilege is missing.
    """
    missing = []
    for login, group, _ in _wanted(settings):
        found = db.execute(_ROLE, {"login": login, "group": group}).one()
        if found.is_member:
            continue
        problem = f"{login} is not a member of {group}" if found.exists else f"{login} does not exist"
        remedies = _Remedies(_session(db), found.me, login, group)
        needed = [] if found.exists or found.may_create else [remedies.creating]
        needed += [] if found.may_grant else [remedies.granting]
        missing.append((problem, "; ".join(needed)))
    return missing


def _wanted(settings: LoginSettings) -> Iterator[tuple[str, str, SecretStr]]:
    """Yield each login whose password is set, its group, and the password."""
    for login, group, password in (
        (WORKER, WRITER, settings.writer_password),
        (API, READER, settings.reader_password),
    ):
        if password is not None:
            yield login, group, password


def set_search_paths(store: Engine) -> list[str]:
    """Let logins that exist find the tables in the current schema, unless they find tables in another one.

    Returns:
        Notes for the user about logins that were not changed, with the statements that change them.

    Raises:
        StoreUnavailable: the database cannot be reached.
    """
    with translated_errors(store), store.begin() as db:
        found = db.execute(_SEARCH_PATHS, {"logins": [WORKER, API]}).all()
        others = {row.login: _other_schema(db, row.login) for row in found}
        moves = {row.login: _move(_session(db), row.login, db) for row in found}
    notes = []
    for row in found:
        if others[row.login] is not None:
            notes.append(
                f"login {row.login} still uses the tables in schema {others[row.login]}; to move it to schema"
                f" {row.home}, run {moves[row.login]}"
            )
        elif row.search_path != row.home:
            try:
                _change(store, row.login, WRITER if row.login == WORKER else READER)
            except LoginNotMade as error:
                notes.append(str(error))
    return notes


def _other_schema(db: Connection, login: str) -> str | None:
    """Return the schema in which an existing login finds tables, or None if that is the current one or has none."""
    row = db.execute(_SEARCH_PATHS, {"logins": [login]}).one_or_none()
    if row is None:
        return None
    there = schemas_with_tables(db)
    schema = next((name for name in _NAME.findall(row.search_path) if name in there), row.home)
    return None if schema == row.home else str(schema)


def _change(store: Engine, login: str, group: str, password: SecretStr | None = None) -> None:
    """Give a login its search_path, see `set_search_paths`; with a password, also create it or change its password."""
    for tries_left in reversed(range(_TRIES)):  # pragma: no branch - the last try returns or raises
        with translated_errors(store), store.connect() as db:
            found = db.execute(_ROLE, {"login": login, "group": group}).one()
            statements = [*_statements(_session(db), login, group, password, found)]
            if _other_schema(db, login) is None:
                move = _move(_session(db), login, db)
                statements.append((move, move))
            for statement, remedy in statements:
                try:
                    db.execution_options(no_parameters=True).exec_driver_sql(statement)
                except DBAPIError as error:
                    sqlstate = getattr(error.orig, "pgcode", None)
                    if sqlstate is None:
                        raise
                    if sqlstate in _CONCURRENT_CHANGE and tries_left:
                        break
                    reason = getattr(getattr(error.orig, "diag", None), "message_primary", None) or sqlstate
                    # Not chained: the driver's error may contain the statement.
                    raise LoginNotMade(login, reason, remedy if sqlstate == _NO_PRIVILEGE else "") from None
            else:
                db.commit()
                return


def _session(db: Connection) -> extensions.connection:
    session = db.connection.driver_connection
    assert isinstance(session, extensions.connection)
    return session


class _Remedies:
    """Statements with which an administrator gives a user the privilege for one statement of `_statements`."""

    def __init__(self, session: extensions.connection, me: str, login: str, group: str) -> None:
        self.creating = _composed(session, "ALTER ROLE {me} CREATEROLE", me=me)
        self.changing = f"{self.creating}; {_composed(session, _ADMIN, role=login, me=me)}"
        self.granting = _composed(session, _ADMIN, role=group, me=me)


_ADMIN = "GRANT {role} TO {me} WITH ADMIN OPTION"


def _composed(session: extensions.connection, template: str, **names: str) -> str:
    """Return the statement with these names of roles and other objects, quoted."""
    identifiers = {key: sql.Identifier(name) for key, name in names.items()}
    return sql.SQL(template).format(**identifiers).as_string(session)


def _move(session: extensions.connection, login: str, db: Connection) -> str:
    """Return the statement that gives a login the current schema in this database."""
    place = db.exec_driver_sql("SELECT current_database() AS database, current_schema() AS schema").one()
    move = "ALTER ROLE {login} IN DATABASE {database} SET search_path = {schema}"
    return _composed(session, move, login=login, database=place.database, schema=place.schema)


def _statements(
    session: extensions.connection, login: str, group: str, password: SecretStr | None, found: Row[Any]
) -> Iterator[tuple[str, str]]:
    """Yield each statement, and what an administrator runs if this user has no privilege for it."""
    remedies = _Remedies(session, found.me, login, group)
    if password is not None:
        # The server gets only a verifier, so its log can never contain the password.
        verifier = extensions.encrypt_password(
            password.get_secret_value(), login, scope=session, algorithm="scram-sha-256"
        )
        verb = "ALTER" if found.exists else "CREATE"
        role = _composed(session, verb + " ROLE {login} LOGIN PASSWORD ", login=login)
        yield role + sql.Literal(verifier).as_string(session), remedies.changing if found.exists else remedies.creating
        if not found.is_member:
            yield _composed(session, "GRANT {group} TO {login}", group=group, login=login), remedies.granting
