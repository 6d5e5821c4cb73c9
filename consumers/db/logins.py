"""Login roles of the worker and of the API. They have only the privileges of the roles that they are
members of, which schema.sql makes.

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
# Until PostgreSQL 15, CREATEROLE was enough to change a role and to grant it.
_ROLE = text("""
    SELECT current_user AS me, current_schema() AS schema, current_database() AS database,
        login.oid IS NOT NULL AS exists, coalesce(pg_has_role(login.oid, grp.oid, 'MEMBER'), false) AS is_member,
        me.rolsuper OR me.rolcreaterole AS may_create,
        me.rolsuper OR CASE WHEN CAST(current_setting('server_version_num') AS integer) < 160000 THEN me.rolcreaterole
            ELSE coalesce(pg_has_role(grp.oid, 'MEMBER WITH ADMIN OPTION'), me.rolcreaterole) END AS may_grant
    FROM pg_roles AS me LEFT JOIN pg_roles AS login ON login.rolname = :login
    LEFT JOIN pg_roles AS grp ON grp.rolname = :group
    WHERE me.rolname = current_user
""")
# Logins that exist and have another search_path in this database than the current schema. Without any setting, a login
# finds the schema public. The setting of a role in a database comes before that of the role, and that of the database.
_WITH_OTHER_SEARCH_PATH = text("""
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
    """Let logins that exist find the tables in the current schema.

    Returns:
        Notes for the user about logins that this user may not change.

    Raises:
        StoreUnavailable: the database cannot be reached.
    """
    with translated_errors(), store.begin() as db:
        found = list(db.execute(_WITH_OTHER_SEARCH_PATH, {"logins": [WORKER, API]}).scalars())
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
    path = "ALTER ROLE {login} IN DATABASE {database} SET search_path = {schema}"
    path = _composed(session, path, login=login, database=found.database, schema=found.schema)
    yield path, path
