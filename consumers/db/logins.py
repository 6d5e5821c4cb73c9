"""Login roles of the worker and of the API. They have only the privileges of their groups, which schema.sql makes."""

from __future__ import annotations

from collections.abc import Iterator

from psycopg2 import extensions, sql
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import translated_errors
from consumers.errors import LoginNotMade
from consumers.settings import LoginSettings

WORKER, API = "trading_history_worker", "trading_history_api"
WRITER, READER = "trading_history_writer", "trading_history_reader"

# Roles belong to the whole server: init-db of another database may change the same role at the same time.
_CONCURRENT_CHANGE = ("23505", "42710", "XX000")
_TRIES = 5
_EXISTS = text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :name)")


def set_passwords(store: Engine, settings: LoginSettings) -> Iterator[str]:
    """Create the login roles whose passwords are in the settings, or change their passwords; yield each name when done.

    Raises:
        LoginNotMade: this user may not create or change the role, or its group is missing.
        StoreUnavailable: the database cannot be reached.
    """
    wanted = ((WORKER, WRITER, settings.writer_password), (API, READER, settings.reader_password))
    for login, group, password in wanted:
        if password is not None:
            with translated_errors():
                _set_password(store, login, group, password)
            yield login


def _set_password(store: Engine, login: str, group: str, password: SecretStr) -> None:
    for tries_left in reversed(range(_TRIES)):
        try:
            with store.begin() as db:
                _make_or_change(db, login, group, password)
                return
        except DBAPIError as error:
            sqlstate = getattr(error.orig, "pgcode", None)
            if sqlstate is None:
                raise
            if sqlstate in _CONCURRENT_CHANGE and tries_left:
                continue
            reason = getattr(getattr(error.orig, "diag", None), "message_primary", None) or sqlstate
            # Not chained: the driver's error may contain the statement.
            raise LoginNotMade(login, reason) from None


def _make_or_change(db: Connection, login: str, group: str, password: SecretStr) -> None:
    session = db.connection.driver_connection
    assert isinstance(session, extensions.connection)
    # The server gets only a verifier, so its log can never contain the password.
    verifier = extensions.encrypt_password(password.get_secret_value(), login, scope=session, algorithm="scram-sha-256")
    verb = "ALTER" if db.execute(_EXISTS, {"name": login}).scalar_one() else "CREATE"
    role = sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(sql.SQL(verb), sql.Identifier(login), sql.Literal(verifier))
    membership = sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(login))
    for statement in (role, membership):
        db.execution_options(no_parameters=True).exec_driver_sql(statement.as_string(session))
