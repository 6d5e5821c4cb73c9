"""Tables in another schema, roles that lack a privilege, and poolers: the tables are found, or doctor says how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import SecretStr
from redis import Redis
from sqlalchemy import make_url, text
from typer.testing import CliRunner

from consumers.cli import app
from consumers.db import engine as db_engine
from consumers.db.engine import create_store_engine
from consumers.db.logins import API, READER, WORKER, WRITER
from consumers.db.schema import check_database_now
from consumers.embedded import Addresses
from consumers.errors import StoreUnavailable
from consumers.operations import get_portfolio_history
from consumers.ops import doctor
from consumers.ops.checks import HealthCheck
from tests.deliveries import burst, enqueue_snapshots
from tests.pgbouncer import pooler

_GROUPS = {WORKER: WRITER, API: READER}
_TABLES = ["event_outcomes", "portfolio_history", "signal_archives", "withdrawals"]


def _execute(url: str, *statements: str) -> list[Any]:
    """Run the statements in one transaction, and return the rows of the last."""
    store = create_store_engine(SecretStr(url))
    with store.begin() as db:
        *_, last = [db.execute(text(statement)) for statement in statements]
        rows = [tuple(row) for row in last] if last.returns_rows else []
    store.dispose()
    return rows


def _as(url: str, role: str) -> str:
    return make_url(url).set(username=role).render_as_string(hide_password=False)


def _with(url: str, **query: str) -> str:
    return make_url(url).update_query_dict(query).render_as_string(hide_password=False)


def _use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let this process use that URL from now on."""
    if db_engine.engine.cache_info().currsize:
        db_engine.reader().dispose()
        db_engine.engine().dispose()
        db_engine.engine.cache_clear()
    monkeypatch.setenv("DATABASE_URL", url)


def _run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, arguments)
    output: str = done.output
    assert done.exit_code == status, (arguments, output, done.exception)
    return output


def _error(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    return str(done.exception)


def _advice(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, StoreUnavailable), done.output
    return done.exception.with_advice()


def _checks() -> dict[str, HealthCheck]:
    return {one.name: one for one in doctor.diagnose(list)}


def _schemas_of_tables(url: str) -> dict[str, list[str]]:
    rows = _execute(url, "SELECT schemaname, tablename FROM pg_tables ORDER BY tablename")
    found: dict[str, list[str]] = {}
    for schema, table in rows:
        if table in _TABLES:
            found.setdefault(schema, []).append(table)
    return found


@contextmanager
def _owner(url: str, name: str, *, attributes: str = "") -> Iterator[str]:
    """Create a role that owns the database during the block; yield the URL with it."""
    database = make_url(url).database
    _execute(url, f"CREATE ROLE {name} LOGIN {attributes}", f"ALTER DATABASE {database} OWNER TO {name}")
    try:
        yield _as(url, name)
    finally:
        _execute(url, f"REASSIGN OWNED BY {name} TO CURRENT_USER", f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@contextmanager
def _role(url: str, name: str) -> Iterator[None]:
    _execute(url, f"CREATE ROLE {name} LOGIN")
    try:
        yield
    finally:
        _execute(url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@pytest.fixture
def passwords(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both login roles are wanted; they are dropped afterwards."""
    for name in ("HISTORY_WRITER_PASSWORD", "HISTORY_READER_PASSWORD"):
        monkeypatch.setenv(name, "wanted")
    yield
    for login in (WORKER, API):
        if _execute(empty_database_url, f"SELECT FROM pg_roles WHERE rolname = '{login}'"):
            _execute(empty_database_url, f"DROP OWNED BY {login}", f"DROP ROLE {login}")


@pytest.mark.usefixtures("passwords")
@pytest.mark.parametrize("schema", ["trading", "Dash-ed %schema"])
def test_init_db_makes_a_schema_in_which_its_logins_find_the_tables(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch, schema: str
) -> None:
    """The owner and other logins name it in the URL. A second run changes nothing."""
    lines = _run("init-db", "--schema", schema).splitlines()
    assert lines[0] == f"The tables are ready in schema {schema}."
    assert lines[-1] == f"Add ?schema={quote(schema, safe='')} to the DATABASE_URL of other logins."
    assert _schemas_of_tables(empty_database_url) == {schema: _TABLES}
    assert _run("init-db", "--schema", schema).splitlines() == lines

    _use(monkeypatch, _as(empty_database_url, WORKER))
    enqueue_snapshots(redis, 2)
    burst(redis)
    _use(monkeypatch, _as(empty_database_url, API))
    assert len(get_portfolio_history()) == 2
    _use(monkeypatch, _with(empty_database_url, schema=schema))
    assert len(get_portfolio_history()) == 2
    tables = _checks()["tables"]
    assert tables.state == "ok"
    assert tables.found.endswith(f"of schema.sql, in schema {schema}" if schema == "trading" else f'"{schema}"')


def test_a_schema_in_the_url_is_created_too(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`schema=` of the URL and --schema mean the same; --schema takes precedence."""
    _use(monkeypatch, _with(empty_database_url, schema="first"))
    _run("init-db")
    _run("init-db", "--schema", "second")
    assert _schemas_of_tables(empty_database_url) == {"first": _TABLES, "second": _TABLES}


def test_a_wrong_schema_in_the_url_is_named_with_the_schema_of_the_tables(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to a worker. init-db names the schema in which it makes others."""
    assert _run("init-db") == "The tables are ready in schema public.\n"
    _use(monkeypatch, _with(empty_database_url, schema="x"))
    expected = (
        "schema x has no tables of trading-history; they are in schema public: correct schema= in DATABASE_URL,"
        " or run trading-history init-db for new tables in schema x"
    )
    for command in (("history",), ("history", "--csv"), ("failed", "list")):
        assert _advice(*command) == f"PostgreSQL: {expected}"
    with pytest.raises(StoreUnavailable) as raised:
        check_database_now()
    assert raised.value.with_advice() == expected
    assert _checks()["tables"].found == "schema x does not exist; tables of these names are in schema public"
    assert _run("init-db").startswith("The tables are ready in schema x.\n")


def test_tables_outside_of_the_search_path_are_found(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role that may not use their schema is sent to doctor, which has the GRANT."""
    _run("init-db", "--schema", "trading")
    assert _advice("history") == (
        "PostgreSQL: no schema of the search_path has tables of trading-history; they are in schema trading:"
        " add schema=trading to DATABASE_URL"
    )
    with _role(empty_database_url, "guest"):
        _use(monkeypatch, _as(empty_database_url, "guest"))
        assert _advice("history") == (
            "PostgreSQL: this role may not use schema trading, in which the tables are:"
            " run trading-history doctor, which names the missing privilege"
        )


def test_a_schema_that_does_not_exist_is_reported_to_a_superuser(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, _with(empty_database_url, schema="tradnig"))
    assert _checks()["tables"].found == "schema tradnig does not exist"


def test_the_script_of_a_dry_run_makes_the_same_schema(empty_database_url: str) -> None:
    script = _run("init-db", "--dry-run", "--schema", "Trading")
    store = create_store_engine(SecretStr(empty_database_url))
    with store.connect() as pooled:
        db = pooled.execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)
        db.exec_driver_sql(script)
    store.dispose()
    assert _schemas_of_tables(empty_database_url) == {"Trading": _TABLES}


def test_init_db_adopts_old_tables_in_that_schema(empty_database_url: str) -> None:
    """A schema without old tables gets new ones."""
    old = "id serial PRIMARY KEY, archived_at timestamptz, signals_count integer, signals_data jsonb"
    _execute(empty_database_url, "CREATE SCHEMA old", f"CREATE TABLE old.signal_archives ({old})")
    _run("init-db", "--adopt-legacy", "--schema", "new")
    output = _run("init-db", "--adopt-legacy", "--schema", "old")
    assert "Table signal_archives was renamed to signal_archives_legacy." in output
    assert _schemas_of_tables(empty_database_url) == {"new": _TABLES, "old": _TABLES}


def test_adopted_tables_of_another_schema_are_named_and_can_be_imported(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the schema and says what to write; then the rows are imported into the first schema."""
    old = "id serial PRIMARY KEY, archived_at timestamptz, signals_count integer, signals_data jsonb"
    values = "VALUES ('2026-05-01T10:00Z', 1, '[{\"a\": 1}]')"
    _execute(empty_database_url, "CREATE SCHEMA old", f"CREATE TABLE old.signal_archives ({old})",
             f"INSERT INTO old.signal_archives (archived_at, signals_count, signals_data) {values}")  # fmt: skip
    _run("init-db", "--adopt-legacy", "--schema", "old")
    _run("init-db", "--schema", "new")
    _use(monkeypatch, _with(empty_database_url, schema="new"))
    assert _error("import", "--from-tables") == (
        "there are no adopted tables in schema new: there are some in schema old: write schema=new,old in DATABASE_URL"
    )
    _use(monkeypatch, _with(empty_database_url, schema="new,old"))
    assert "signal_archives_legacy" in _run("import", "--from-tables")
    assert _execute(empty_database_url, "SELECT count(*) FROM new.signal_archives") == [(1,)]


@pytest.mark.usefixtures("passwords")
def test_owner_with_a_schema_named_like_the_owner(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search_path begins with "$user", so the tables are there: the logins of init-db find them nevertheless."""
    with _owner(empty_database_url, "ana", attributes="SUPERUSER") as owner:
        _execute(empty_database_url, "CREATE SCHEMA ana AUTHORIZATION ana")
        _use(monkeypatch, owner)
        _run("init-db")
        assert _schemas_of_tables(empty_database_url) == {"ana": _TABLES}
        _use(monkeypatch, _as(empty_database_url, WORKER))
        enqueue_snapshots(redis, 1)
        burst(redis)
        assert len(get_portfolio_history()) == 1
        assert _checks()["tables"].found.endswith("of schema.sql, in schema ana")


@pytest.mark.usefixtures("passwords")
def test_init_db_gives_logins_of_an_earlier_release_the_schema(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without their passwords too. A user who may not change them gets the statement for an administrator."""
    _execute(empty_database_url, *(f"CREATE ROLE {login} LOGIN IN ROLE {group}" for login, group in _GROUPS.items()))
    database = make_url(empty_database_url).database
    for name in ("HISTORY_WRITER_PASSWORD", "HISTORY_READER_PASSWORD"):
        monkeypatch.delenv(name)
    with _owner(empty_database_url, "plain_owner") as owner:
        _use(monkeypatch, owner)
        output = _run("init-db", "--schema", "later")
    statements = [f'ALTER ROLE "{login}" IN DATABASE "{database}" SET search_path = "later"' for login in (API, WORKER)]
    for line, login, statement in zip(output.splitlines()[1:], (API, WORKER), statements, strict=False):
        assert line.startswith(f"Note: the tables exist, but login role {login} was not created or changed: ")
        assert line.endswith(f". As an administrator of the server, run {statement}")
    _use(monkeypatch, empty_database_url)
    assert "Note" not in _run("init-db", "--schema", "later")
    assert _execute(_as(empty_database_url, WORKER), "SELECT current_schema()") == [("later",)]


def test_user_who_may_not_create_in_public_gets_the_grant(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the default privileges of PostgreSQL 15. Another schema needs a privilege on the database."""
    database = make_url(empty_database_url).database
    _execute(empty_database_url, "REVOKE CREATE ON SCHEMA public FROM PUBLIC", "CREATE ROLE guest LOGIN")
    try:
        _use(monkeypatch, _as(empty_database_url, "guest"))
        expected = (
            "as the owner of the schema, run GRANT CREATE ON SCHEMA public TO guest; or for another schema, as the"
            f" owner of the database, run GRANT CREATE ON DATABASE {database} TO guest;"
            " then run trading-history init-db --schema NAME"
        )
        assert _error("init-db") == f"PostgreSQL: permission denied for schema public: {expected}"
        tables = _checks()["tables"]
        assert (tables.found, tables.advice) == (f"missing in schema public: {', '.join(_ORDER)}", expected)
        assert f"run GRANT CREATE ON DATABASE {database} TO guest" in _error("init-db", "--schema", "own")
        _execute(empty_database_url, f"GRANT CREATE ON DATABASE {database} TO guest")
        _run("init-db", "--schema", "own")
        assert _schemas_of_tables(empty_database_url) == {"own": _TABLES}
        elsewhere = _checks()["tables"]
        assert elsewhere.found == (
            f"missing in schema public: {', '.join(_ORDER)}; tables of these names are in schema own"
        )
        assert elsewhere.advice == (
            f"write schema=own in DATABASE_URL, or run ALTER ROLE guest IN DATABASE {database} SET search_path = own"
        )
        _execute(empty_database_url, elsewhere.advice.partition("or run ")[2])
        _use(monkeypatch, _as(empty_database_url, "guest"))
        assert _checks()["tables"].state == "ok"
    finally:
        _execute(empty_database_url, "DROP OWNED BY guest", "DROP ROLE guest")


_ORDER = ["portfolio_history", "signal_archives", "event_outcomes", "withdrawals"]


def test_role_without_usage_of_the_schema_gets_the_grant(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """doctor looks for the tables in every schema, and the statements of its advice are enough."""
    _run("init-db", "--schema", "trading")
    _execute(empty_database_url, "CREATE ROLE guest LOGIN")
    try:
        _use(monkeypatch, _with(_as(empty_database_url, "guest"), schema="trading"))
        closed = _checks()["tables"]
        assert closed.found == (
            "this role may use no schema of its search_path; tables of these names are in schema trading"
        )
        assert closed.advice == "as the owner of the schema, run GRANT USAGE ON SCHEMA trading TO guest"
        _use(monkeypatch, _as(empty_database_url, "guest"))
        assert _checks()["tables"].advice.startswith(f"{closed.advice}; then write schema=trading in DATABASE_URL")
        _execute(empty_database_url, closed.advice.partition("run ")[2])
        _use(monkeypatch, _with(_as(empty_database_url, "guest"), schema="trading"))
        opened = _checks()
        assert opened["tables"].state == "ok"
        _execute(_with(empty_database_url, schema="trading"), *opened["privileges"].advice.split("; "))
        assert _checks()["privileges"].state == "ok"
    finally:
        _execute(empty_database_url, "DROP OWNED BY guest", "DROP ROLE guest")


def test_init_db_in_a_schema_that_the_role_may_not_use_names_the_grant(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After that statement, init-db succeeds."""
    _execute(empty_database_url, "CREATE SCHEMA closed")
    with _role(empty_database_url, "guest"):
        _use(monkeypatch, _as(empty_database_url, "guest"))
        advice = _error("init-db", "--schema", "closed").partition(": as the owner of the schema, run ")[2]
        assert advice == "GRANT USAGE, CREATE ON SCHEMA closed TO guest"
        _execute(empty_database_url, advice)
        _run("init-db", "--schema", "closed")
        assert _schemas_of_tables(empty_database_url) == {"closed": _TABLES}


@pytest.mark.usefixtures("passwords")
def test_roles_of_another_owner_need_the_admin_option(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of init-db names the GRANT. After the statements of each error, init-db succeeds.

    Until PostgreSQL 15, CREATEROLE was enough to grant any role.
    """
    ((version,),) = _execute(empty_database_url, "SELECT CAST(current_setting('server_version_num') AS integer)")
    with _owner(empty_database_url, "other_owner") as owner:
        _use(monkeypatch, owner)
        statements = []
        for _ in range(6):
            done = CliRunner().invoke(app, ["init-db"])
            if done.exit_code == 0:
                break
            message = str(done.exception)
            assert "was not created or changed: " in message
            statements.append(message.partition("As an administrator of the server, run ")[2])
            _execute(empty_database_url, *statements[-1].split("; "))
        assert done.exit_code == 0, done.exception
    grants = [f'GRANT "{group}" TO "other_owner" WITH ADMIN OPTION' for group in (WRITER, READER)]
    assert statements == ['ALTER ROLE "other_owner" CREATEROLE', *(grants if version >= 160000 else [])]


@pytest.mark.usefixtures("passwords")
def test_doctor_names_all_privileges_that_the_logins_need(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the statements of its advice, init-db succeeds. Without the passwords, no login is wanted."""
    with _owner(empty_database_url, "other_owner") as owner:
        _use(monkeypatch, owner)
        _error("init-db")
        check = _checks()["logins"]
        statements, _, last = check.advice.rpartition("; then ")
        assert (check.found, last) == (
            f"{WORKER} does not exist; {API} does not exist", "run trading-history init-db"
        )  # fmt: skip
        _execute(empty_database_url, *statements.partition(", run ")[2].split("; "))
        assert _checks()["logins"].advice == "run trading-history init-db"
        _run("init-db")
        assert _checks()["logins"].state == "ok"
        for name in ("HISTORY_WRITER_PASSWORD", "HISTORY_READER_PASSWORD"):
            monkeypatch.delenv(name)
        assert "logins" not in _checks()


@pytest.fixture
def stock_pooler(pair: Addresses, database_url: str) -> Iterator[str]:
    """URL of the database through pgbouncer with its default settings."""
    with TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)  # pgbouncer runs as another account
        with pooler(Addresses(database_url, pair.redis_url), Path(folder)) as addresses:
            yield addresses.database_url


def test_a_pooler_that_refuses_startup_options_is_not_reported_as_a_wrong_password(
    stock_pooler: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, _with(stock_pooler, options="-csearch_path=public"))
    refused = _checks()["PostgreSQL"]
    _use(monkeypatch, _with(stock_pooler, schema="public", pgbouncer="true"))
    accepted = _checks()
    assert (refused.state, "unsupported startup parameter: options" in refused.found) == ("fail", True)
    assert "pooler" in refused.advice
    assert "remove options= from DATABASE_URL" in refused.advice
    assert "password" not in refused.advice
    assert accepted["PostgreSQL"].state == accepted["tables"].state == "ok"


def test_a_user_that_a_pooler_does_not_know_is_not_reported_as_a_wrong_password(
    stock_pooler: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pooler's own list may lack a user that PostgreSQL has."""
    _use(monkeypatch, _as(stock_pooler, "nobody_at_all"))
    check = _checks()["PostgreSQL"]
    assert check.state == "fail"
    assert "password" not in check.advice, check


def test_a_missing_database_behind_a_pooler_is_named(
    stock_pooler: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pooler passes the server's error on to one client. Others then wait for it and learn no reason."""
    _use(monkeypatch, make_url(stock_pooler).set(database="no_such_database").render_as_string(hide_password=False))
    first, second = _checks()["PostgreSQL"], _checks()["PostgreSQL"]
    assert 'database "no_such_database" does not exist' in first.found
    assert first.advice.startswith("correct the name of the database in DATABASE_URL or the POSTGRES_ variables")
    assert "password" not in second.advice
    assert "the log of the pooler has the reason" in second.advice or second.advice == first.advice


@pytest.mark.usefixtures("passwords")
def test_init_db_without_the_schema_makes_no_second_history(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what to type for either. Also with --adopt-legacy."""
    _run("init-db", "--schema", "My trading")
    for options in ([], ["--adopt-legacy"], ["--adopt-legacy", "--dry-run"]):
        assert _error("init-db", *options) == (
            'the tables are in schema "My trading", not in the current schema public. Nothing was changed: to upgrade'
            " them, run trading-history init-db --schema 'My trading'; for a second, empty history, run"
            " trading-history init-db --schema public"
        )
    assert _schemas_of_tables(empty_database_url) == {"My trading": _TABLES}
    assert _execute(_as(empty_database_url, WORKER), "SELECT current_schema()") == [("My trading",)]
    _use(monkeypatch, _as(empty_database_url, WORKER))
    _error("init-db", "--schema", "typo")
    _use(monkeypatch, empty_database_url)
    _run("init-db", "--schema", "My trading")


@pytest.mark.usefixtures("passwords")
def test_init_db_for_a_second_history_leaves_the_logins_at_the_first(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped schema must not move the workers. The statements of the notes move them."""
    _run("init-db", "--schema", "trading")
    second = _run("init-db", "--schema", "tradnig").splitlines()
    database = make_url(empty_database_url).database
    statements = [
        f'ALTER ROLE "{login}" IN DATABASE "{database}" SET search_path = "tradnig"' for login in (API, WORKER)
    ]
    assert second[:4] == [
        "The tables are ready in schema tradnig.",
        "Note: schema trading has tables of trading-history too; these are separate histories",
        *(
            f"Note: login {login} still uses the tables in schema trading; to move it to schema tradnig, run {move}"
            for login, move in zip((API, WORKER), statements, strict=True)
        ),
    ]
    assert _execute(_as(empty_database_url, WORKER), "SELECT current_schema()") == [("trading",)]
    assert "too" not in _run("init-db", "--schema", "tradnig")
    _execute(empty_database_url, *statements)
    assert "Note" not in _run("init-db", "--schema", "tradnig")
    assert _execute(_as(empty_database_url, WORKER), "SELECT current_schema()") == [("tradnig",)]


@pytest.mark.parametrize("name", ["", " ", "a ", "a,b", 'a"b', "$user", "pg_foo", "x" * 64, "é" * 32])
def test_init_db_says_what_the_name_of_a_schema_may_be(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also for the name in DATABASE_URL, as far as it is one name."""
    done = CliRunner().invoke(app, ["init-db", "--schema", name], standalone_mode=False)
    assert str(done.exception).startswith("must be a name of 1 to 63 bytes that does not begin with pg_")
    if name in ("$user", "pg_foo") or len(name) > 30:
        _use(monkeypatch, _with(empty_database_url, schema=name))
        assert _error("init-db").startswith("DATABASE_URL: schema must be a name of 1 to 63 bytes")
    assert _schemas_of_tables(empty_database_url) == {}


def test_doctor_writes_the_schema_as_the_url_needs_it(
    empty_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run("init-db", "--schema", "My % trading")
    assert _checks()["tables"].advice.startswith("write schema=My%20%25%20trading in DATABASE_URL, or run ALTER ROLE")
    assert _advice("history").endswith("add schema=My%20%25%20trading to DATABASE_URL")
    _use(monkeypatch, f"{_with(empty_database_url)}&schema=My%20%25%20trading")
    assert _checks()["tables"].state == "ok"
