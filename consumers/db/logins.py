"""Login roles of the worker and of the API. They have only the privileges of their groups, which schema.sql makes.

In this database, their search_path is the schema of the tables, whatever the database and the server set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg2 import extensions, sql
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import translated_errors
from consumers.errors import LoginNotMade
from consumers.settings import LoginSettings

WORKER, API = "trading_history_worker", "trading_history_api"
WRITER, READER = "trading_history_writer", "trading_history_reader"

# Roles belong to the whole server: init-db of another database may change the same role at the same time.
_CONCURRENT_CHANGE = ("23505", "42710", "XX000")
_TRIES = 5
_NO_PRIVILEGE = "42501"
_ROLE = text("""
    SELECT current_user AS me, current_schema() AS schema, current_database() AS database,
        EXISTS (SELECT FROM pg_roles WHERE rolname = :login) AS exists,
        coalesce((SELECT pg_has_role(login.oid, grp.oid, 'MEMBER') FROM pg_roles AS login, pg_roles AS grp
            WHERE login.rolname = :login AND grp.rolname = :group), false) AS is_member
""")
# Logins that exist and have another search_path in this database than the current schema. Without any setting, a login
# finds the schema public. The setting of a role in a database comes before that of the role, and that of the database.
_WITHOUT_SCHEMA = text("""
    SELECT CAST(rolname AS text) FROM pg_roles
    WHERE rolname = ANY(:logins) AND 'search_path=' || quote_ident(current_schema()) <> coalesce((
        SELECT setting FROM pg_db_role_setting CROSS JOIN unnest(setconfig) AS setting
        WHERE setting LIKE 'search_path=%' AND setrole IN (0, pg_roles.oid)
            AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
        ORDER BY setrole <> 0 DESC, setdatabase <> 0 DESC LIMIT 1), 'search_path=public')
    ORDER BY rolname
""")


def set_passwords(store: Engine, settings: LoginSettings) -> Iterator[str]:
    """Create the login roles whose passwords are in the settings, or change their passwords; yield each name when done.

    Raises:
        LoginNotMade: this user may not create or change the role, or its group is missing.
        StoreUnavailable: the database cannot be reached.
    """
    wanted = ((WORKER, WRITER, settings.writer_password), (API, READER, settings.reader_password))
    for login, group, password in wanted:
        if password is not None:
            _change(store, login, group, password)
            yield login


def set_search_paths(store: Engine) -> list[str]:
    """Let logins that exist find the tables in the current schema.

    Returns:
        Notes for the user about logins that this user may not change.

    Raises:
        StoreUnavailable: the database cannot be reached.
    """
    with translated_errors(), store.begin() as db:
        found = list(db.execute(_WITHOUT_SCHEMA, {"logins": [WORKER, API]}).scalars())
    notes = []
    for login in found:
        try:
            _change(store, login, WRITER if login == WORKER else READER)
        except LoginNotMade as error:
            notes.append(str(error))
    return notes


def _change(store: Engine, login: str, group: str, password: SecretStr | None = None) -> None:
    """Give a login its search_path; with a password, also create it or change its password."""
    for tries_left in reversed(range(_TRIES)):
        with translated_errors(), store.connect() as db:
            found = db.execute(_ROLE, {"login": login, "group": group}).one()
            for statement, remedy in _statements(_session(db), login, group, password, found):
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


def _statements(
    session: extensions.connection, login: str, group: str, password: SecretStr | None, found: Row[Any]
) -> Iterator[tuple[str, str]]:
    """Yield each statement, and what an administrator runs if this user has no privilege for it."""
    names = {"login": login, "group": group, "me": found.me, "schema": found.schema, "database": found.database}

    def composed(template: str, **more: sql.Composable) -> str:
        identifiers = {name: sql.Identifier(value) for name, value in names.items()}
        return sql.SQL(template).format(**identifiers, **more).as_string(session)

    creating = composed("ALTER ROLE {me} CREATEROLE")
    changing = composed("ALTER ROLE {me} CREATEROLE; GRANT {login} TO {me} WITH ADMIN OPTION")
    if password is not None:
        # The server gets only a verifier, so its log can never contain the password.
        verifier = extensions.encrypt_password(
            password.get_secret_value(), login, scope=session, algorithm="scram-sha-256"
        )
        role = ("ALTER" if found.exists else "CREATE") + " ROLE {login} LOGIN PASSWORD {verifier}"
        yield composed(role, verifier=sql.Literal(verifier)), changing if found.exists else creating
        if not found.is_member:
            yield composed("GRANT {group} TO {login}"), composed("GRANT {group} TO {me} WITH ADMIN OPTION")
    path = composed("ALTER ROLE {login} IN DATABASE {database} SET search_path = {schema}")
    yield path, path
