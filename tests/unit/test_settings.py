"""Settings: the environment takes precedence over .env, and errors name the variable without its value."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from redis.connection import SSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.sentinel import SentinelConnectionPool
from sqlalchemy import create_engine

from consumers.db.database_url import parse_database_url, session_attributes, split_schema
from consumers.db.engine import create_store_engine, search_path_of
from consumers.embedded.stack import stack
from consumers.settings import MetricsSettings, StoreSettings
from producers.errors import SettingsError
from producers.settings import TransportSettings
from tests.documents import table


def test_the_settings_of_a_controller_have_defaults() -> None:
    """The queue history, the outbox data/outbox.db, the machine's zone, and no Redis."""
    settings = TransportSettings.from_environment()
    assert (settings.queue, settings.outbox, settings.timezone, settings.redis_url) == (
        "history",
        Path("data/outbox.db"),
        None,
        None,
    )


def test_the_environment_takes_precedence_over_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An empty variable counts as not set. Variables of other programs in .env are ignored."""
    Path(".env").write_text("HISTORY_QUEUE=from-file\nHISTORY_OUTBOX=from-file.db\nUNRELATED=1\n")
    monkeypatch.setenv("HISTORY_QUEUE", "from-environment")
    monkeypatch.setenv("HISTORY_TIMEZONE", "")
    settings = TransportSettings.from_environment()
    assert (settings.queue, settings.outbox, settings.timezone) == ("from-environment", Path("from-file.db"), None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HISTORY_TIMEZONE", "Middle/Earth"),
        ("HISTORY_TIMEZONE", "../../etc/passwd"),
        ("HISTORY_QUEUE", "two queues"),
    ],
)
def test_an_error_names_a_wrong_setting_and_not_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=rf"^{name}: ") as caught:
        TransportSettings.from_environment()
    assert value not in str(caught.value)


def test_the_password_of_an_invalid_redis_url_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the error nor in the repr of the settings."""
    monkeypatch.setenv("REDIS_URL", "amqp://user:s3cret@host")
    settings = TransportSettings.from_environment()
    with pytest.raises(SettingsError, match="^REDIS_URL: must be") as caught:
        settings.redis()
    assert "s3cret" not in str(caught.value) + repr(settings)


def test_the_database_is_set_by_url_or_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are percent-encoded, so a password may have any character. The URL takes precedence."""
    for name, value in {"HOST": "db", "PORT": "6432", "DB": "bot", "USER": "me", "PASSWORD": "p@ss/w:rd"}.items():
        monkeypatch.setenv(f"POSTGRES_{name}", value)
    settings = StoreSettings.from_environment()
    assert settings.url().get_secret_value() == "postgresql://me:p%40ss%2Fw%3Ard@db:6432/bot"
    assert "p@ss" not in repr(settings)
    for name in ("HOST", "PORT", "DB", "USER"):
        monkeypatch.delenv(f"POSTGRES_{name}")
    assert StoreSettings.from_environment().url().get_secret_value() == (
        "postgresql://trading_history:p%40ss%2Fw%3Ard@localhost:5432/trading_history"
    )
    monkeypatch.setenv("DATABASE_URL", "postgresql://x@y/z")
    assert StoreSettings.from_environment().url().get_secret_value() == "postgresql://x@y/z"


def test_the_url_of_the_database_makes_the_parts_irrelevant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even wrong ones, which other programs may have set for themselves."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://x@y/z")
    for name, value in {"PORT": "everything", "HOST": "a b", "DB": "/", "USER": "@"}.items():
        monkeypatch.setenv(f"POSTGRES_{name}", value)
    settings = StoreSettings.from_environment()
    assert settings.url().get_secret_value() == "postgresql://x@y/z"
    assert settings.model_fields_set == {"database_url"}
    monkeypatch.setenv("DATABASE_URL", "")
    with pytest.raises(SettingsError, match="^POSTGRES_PORT: "):
        StoreSettings.from_environment()


@pytest.mark.parametrize("link", ["tcp://10.0.0.5:5432", "udp://10.0.0.5:53", "tcp://[fd00::5]:5432"])
def test_a_service_link_of_kubernetes_is_not_a_port(monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    """It counts as not set, so the value in .env or the default applies."""
    for name in ("POSTGRES_PORT", "HISTORY_METRICS_PORT"):
        monkeypatch.setenv(name, link)
    assert not StoreSettings.from_environment().is_set
    assert MetricsSettings.from_environment().port is None
    monkeypatch.setenv("POSTGRES_HOST", "db")
    assert StoreSettings.from_environment().port == 5432
    Path(".env").write_text(f"POSTGRES_PORT=5433\nHISTORY_METRICS_PORT={link}\n")
    assert StoreSettings.from_environment().port == 5433
    assert MetricsSettings.from_environment().port is None


def test_a_service_link_elsewhere_is_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ports are set by Kubernetes."""
    monkeypatch.setenv("HISTORY_QUEUE", "tcp://10.0.0.5:5432")
    with pytest.raises(SettingsError, match="^HISTORY_QUEUE: "):
        TransportSettings.from_environment()


def test_a_database_host_may_be_the_folder_of_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq allows that too."""
    monkeypatch.setenv("POSTGRES_HOST", "/var/run/postgresql")
    assert StoreSettings.from_environment().url().get_secret_value() == (
        "postgresql://trading_history@:5432/trading_history?host=%2Fvar%2Frun%2Fpostgresql"
    )


def test_an_error_names_the_missing_setting_of_the_database() -> None:
    with pytest.raises(SettingsError, match="^DATABASE_URL is not set"):
        StoreSettings.from_environment().url()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DATABASE_URL", "postgresql://h/d", "^the database is set but REDIS_URL is not"),
        ("POSTGRES_PASSWORD", "secret", "^the database is set but REDIS_URL is not"),
        ("REDIS_URL", "redis://h", "^REDIS_URL is set but DATABASE_URL"),
    ],
)
def test_one_server_without_the_other_is_an_error_not_a_fallback(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """A command that needs both does not start embedded servers if one is configured."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message), stack(database=True, redis=True):
        pass


_SENTINEL = "redis+sentinel://us%40er:p%2Fw%3A@one,two:26380,[::1]:26381/mymaster"


def test_redis_behind_sentinel_is_one_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """Login, database and options apply to the master. Sentinels have their own login and short timeouts."""
    monkeypatch.setenv(
        "REDIS_URL", f"{_SENTINEL}/3?sentinel_username=watch&sentinel_password=s%25p&health_check_interval=7"
    )
    pool = TransportSettings.from_environment().redis().connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    options = pool.connection_kwargs
    assert (pool.service_name, pool.is_master) == ("mymaster", True)
    assert (options["username"], options["password"], options["db"]) == ("us@er", "p/w:", 3)
    assert (options["health_check_interval"], options["socket_timeout"]) == (7, 5.0)
    asked = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"]) for one in asked] == [("one", 26379), ("two", 26380), ("::1", 26381)]
    assert {(one["username"], one["password"], one["socket_timeout"]) for one in asked} == {("watch", "s%p", 1.0)}
    assert not isinstance(pool.make_connection(), SSLConnection)


def test_rediss_uses_tls_for_the_master_and_the_sentinels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both use the same certificates."""
    monkeypatch.setenv("REDIS_URL", "rediss+sentinel://one/mymaster?ssl_ca_certs=/ca.pem&ssl_check_hostname=false")
    pool = TransportSettings.from_environment().redis().connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    (sentinel,) = pool.sentinel_manager.sentinels
    for one in (pool, sentinel.connection_pool):
        assert isinstance(one.make_connection(), SSLConnection)
        assert one.connection_kwargs["ssl_ca_certs"] == "/ca.pem"
        assert one.connection_kwargs["ssl_check_hostname"] is False


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://:s3cret@one",
        "redis+sentinel://:s3cret@one/",
        "redis+sentinel://:s3cret@one/mymaster/zero",
        "redis+sentinel://:s3cret@one:99999/mymaster",
        "redis+sentinel://:s3cret@one;two/mymaster?unknown=1",
        "redis+sentinel://:s3cret@one,,two/mymaster",
        "redis+sentinel://:s3/cret@one/mymaster",
        "sentinel://:s3cret@one/0",
        "redis+sentinel://:s3cret@one/mymaster?redis_class=x",
        "redis+sentinel://:s3cret@one/mymaster?connection_pool_class=x",
        "redis+sentinel://:s3cret@one/mymaster?connection_class=x",
        "redis+sentinel://:s3cret@one/mymaster?retry=x",
        "redis+sentinel://:s3cret@one/mymaster?host=two",
        "redis+sentinel://:s3cret@one/mymaster?port=1",
        "rediss+sentinel://:s3cret@one/mymaster?ssl_cert_reqs=bogus",
        "rediss://:s3cret@one?ssl_cert_reqs=bogus",
        "redis://:s3cret@one?connection_class=x",
    ],
)
def test_the_password_of_an_invalid_sentinel_url_is_not_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The error shows the form of a URL, or the name of the option that is wrong."""
    monkeypatch.setenv("REDIS_URL", url)
    form = r"^REDIS_URL: (must be .*redis\+sentinel://host|the option [a-z_]+ is unknown or has a wrong value)"
    with pytest.raises(SettingsError, match=form) as caught:
        TransportSettings.from_environment().redis()
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "option"),
    [
        ("redis://:s3cret@h/0?foo=1", "foo"),
        ("redis://h?db=x", "db"),
        ("redis://h?health_check_interval=1&socket_timeout=soon", "socket_timeout"),
        ("redis://h?ssl_cert_reqs=none", "ssl_cert_reqs"),
        ("rediss://h?ssl_cert_reqs=none&bar=1", "bar"),
        ("redis+sentinel://h/s?sentinel_password=p&foo=1", "foo"),
    ],
)
def test_a_wrong_option_of_the_redis_url_is_named(monkeypatch: pytest.MonkeyPatch, url: str, option: str) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(SettingsError, match=f"^REDIS_URL: the option {option} is unknown or has a wrong value"):
        TransportSettings.from_environment().redis()


@pytest.mark.parametrize("url", ["redis://:s3?cret=1@h/0", "redis://:s3?cret%21=1@h/0", "redis://h?a b=s3cret"])
def test_a_part_of_a_password_is_not_taken_for_an_option(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(SettingsError, match="^REDIS_URL: must be ") as caught:
        TransportSettings.from_environment().redis()
    assert "cret" not in str(caught.value)


def test_two_threads_that_discover_the_master_at_once_lose_no_sentinel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first Sentinel is down, and each thread moves the second one to the front."""
    monkeypatch.setenv("REDIS_URL", "redis+sentinel://one,two,three/mymaster")
    pool = TransportSettings.from_environment().redis().connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    first, second, third = pool.sentinel_manager.sentinels
    both_threads_ask = threading.Barrier(2)
    state = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 2, "ip": "h", "port": 1}

    def masters(sentinel: Redis) -> dict[str, Any]:
        if sentinel is not second:
            raise RedisConnectionError
        both_threads_ask.wait(10)
        return {"mymaster": state}

    monkeypatch.setattr(Redis, "sentinel_masters", masters)
    threads = [threading.Thread(target=pool.get_master_address) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert pool.sentinel_manager.sentinels == [second, first, third]


def test_several_database_hosts_are_read_as_libpq_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host has a port, passwords are decoded, and by default only a host that accepts writes will do."""
    url = parse_database_url(SecretStr("postgresql://me:p%40ss@one,two:5433,[::1]:5434/history?sslmode=prefer"))
    assert dict(url.query) == {"host": "one,two,::1", "port": "5432,5433,5434", "sslmode": "prefer"}
    assert (url.username, url.password, url.database, url.host) == ("me", "p@ss", "history", None)
    assert session_attributes(url, read_only=False) == {"target_session_attrs": "read-write"}
    assert session_attributes(url, read_only=True) == {"target_session_attrs": "primary"}
    chosen = url.update_query_dict({"target_session_attrs": "prefer-standby"})
    assert session_attributes(chosen, read_only=True) == {"target_session_attrs": "prefer-standby"}
    alone = parse_database_url(SecretStr("postgresql://me@one/history"))
    assert session_attributes(alone, read_only=False) == {}
    monkeypatch.setenv("POSTGRES_HOST", "one,two")
    monkeypatch.setenv("POSTGRES_PORT", "6000")
    parts = parse_database_url(StoreSettings.from_environment().url())
    assert (parts.query["host"], parts.query["port"]) == ("one,two", "6000,6000")


@pytest.mark.parametrize("url", ["postgresql://:s3cret@one,two:x/d", "mysql://:s3cret@one,two/d"])
def test_the_password_of_an_invalid_url_of_several_hosts_is_not_shown(url: str) -> None:
    with pytest.raises(SettingsError, match="^DATABASE_URL: ") as caught:
        parse_database_url(SecretStr(url))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "hosts", "ports"),
    [
        ("postgresql://me@/d?host=a,b&port=1", "a,b", "1,1"),
        ("postgresql://me@/d?host=a,b&port=1,", "a,b", "1,5432"),
        ("postgresql://me@/d?host=a,b", "a,b", "5432,5432"),
        ("postgresql://me@:6000/d?host=/run/one,/run/two", "/run/one,/run/two", "6000,6000"),
        ("postgresql://me@/d?host=a:1&host=b", "a,b", "1,5432"),
    ],
)
def test_several_hosts_may_be_in_the_query(url: str, hosts: str, ports: str) -> None:
    """In the form of libpq, which allows one port for all hosts, or of SQLAlchemy."""
    parsed = parse_database_url(SecretStr(url))
    assert (parsed.query["host"], parsed.query["port"]) == (hosts, ports)
    (_, options) = create_engine(parsed).dialect.create_connect_args(parsed)
    assert (options["host"], options["port"]) == (hosts, ports)


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("me:s3c/ret@a,b/d", "percent-encode"),
        ("me:s3c?ret@a,b/d", "percent-encode"),
        ("me:s3c#ret@a:1,b:2/d", "percent-encode"),
        ("me:1,s3c/ret@a/d", "percent-encode"),
        ("me:s3cret@a,/d", "a host is missing"),
        ("me:s3cret@,/d", "a host is missing"),
        ("me:s3cret@/d?host=a,", "a host is missing"),
        ("me:s3cret@a:0,b/d", "a port must be a number from 1 to 65535"),
        ("me:s3cret@/d?host=a,b&port=x", "a port must be a number from 1 to 65535"),
        ("me:s3cret@/d?host=a,b,c&port=1,2", "3 hosts need 3 ports, or one for all, not 2"),
        ("me:s3cret@a,b/d?port=1", "either before the database or after"),
        ("me:s3cret@a/d?hostaddr=::1,::2", "hostaddr takes one address only"),
        ("me:s3cret@a,b/d?hostaddr=::1", "hostaddr takes one address only"),
    ],
)
def test_errors_in_a_list_of_hosts_are_reported(rest: str, reason: str) -> None:
    """No connection is tried, and no part of the password is shown."""
    with pytest.raises(SettingsError, match=f"^DATABASE_URL: .*{reason}") as caught:
        parse_database_url(SecretStr(f"postgresql://{rest}"))
    assert "s3c" not in str(caught.value)


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "POSTGRESQL", "postgresql+asyncpg", "postgresql+psycopg", "postgres+pg8000"]
)
def test_a_url_of_another_driver_is_taken(scheme: str) -> None:
    parsed = parse_database_url(SecretStr(f"{scheme}://me:p%40ss@h:6543/d"))
    assert parsed.render_as_string(hide_password=False) == "postgresql+psycopg2://me:p%40ss@h:6543/d"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("jdbc:postgresql://h/d?user=me&password=s3cret", "remove jdbc: from the beginning"),
        ('"postgresql://me:s3cret@h/d"', "remove the blanks or quotation marks around the URL"),
        ("'postgresql://me:s3cret@h/d'", "remove the blanks or quotation marks around the URL"),
        (" postgresql://me:s3cret@h/d", "remove the blanks or quotation marks around the URL"),
        ("postgresql://me:s3cret@h/d\n", "remove the blanks or quotation marks around the URL"),
    ],
)
def test_what_is_around_the_url_is_named(url: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=f"^DATABASE_URL: {reason}") as caught:
        parse_database_url(SecretStr(url))
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "of_libpq"),
    [
        ("pgbouncer=true&connection_limit=1&pool_timeout=0", {}),
        ("statement_cache_size=0&prepared_statement_cache_size=0&prepareThreshold=0", {}),
        ("sslmode=require&channel_binding=require", {"sslmode": "require", "channel_binding": "require"}),
        ("sslmode=no-verify&uselibpqcompat=true", {"sslmode": "require"}),
        ("ssl=verify-full&sslrootcert=system", {"sslmode": "verify-full", "sslrootcert": "system"}),
        ("ssl=true&sslmode=verify-ca", {"sslmode": "verify-ca"}),
        ("ssl=false", {"sslmode": "disable"}),
        ("options=endpoint%3Dcool-name-1&application_name=bot&connect_timeout=9",
         {"options": "endpoint=cool-name-1", "application_name": "bot", "connect_timeout": "9"}),
    ],
)  # fmt: skip
def test_options_of_other_libraries_are_translated_or_left_out(query: str, of_libpq: dict[str, str]) -> None:
    """The same URL serves Prisma, asyncpg, JDBC, Rails or node-postgres. Those of libpq stay."""
    for hosts in ("h", "one,two:5433"):
        parsed = parse_database_url(SecretStr(f"postgresql://me@{hosts}/d?{query}"))
        assert {name: value for name, value in parsed.query.items() if name not in ("host", "port")} == of_libpq


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("schema=trading", ("trading",)),
        ("currentSchema=trading,public", ("trading", "public")),
        ("pgbouncer=true&search_path=%22My%20Schema%22", ("My Schema",)),
        ("", ()),
    ],
)
def test_a_schema_in_the_url_is_the_search_path(query: str, names: tuple[str, ...]) -> None:
    """It is not an option of libpq, so it is set by a statement in each transaction."""
    url = SecretStr(f"postgresql://me@h/d?{query}")
    parsed, found = split_schema(parse_database_url(url))
    assert (dict(parsed.query), found, search_path_of(create_store_engine(url))) == ({}, names, names)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("me:s3cret@h/d?unheard_of=1", "the option unheard_of is not an option of PostgreSQL"),
        ("me:s3cret@h/d?connection.limit=s3cret", "an option after the ? is not an option of PostgreSQL"),
        ("me:p@x?scret=1@h/d", "an option after the ? is not an option of PostgreSQL"),
        ("me:s3cret@h/d?sslmode=s3cret", "sslmode must be one of disable, allow, prefer, require, "),
        ("me:s3cret@h/d?ssl=true", "in place of ssl, write sslmode=require, or sslmode=verify-full"),
        ("me:s3cret@h/d?schema=a,,b", "schema must be the name of a schema"),
        ("me:s3cret@h/d?schema=a%00s3cret", "schema must be the name of a schema"),
    ],
)
def test_an_option_that_nobody_knows_is_an_error_without_its_value(rest: str, message: str) -> None:
    """Its name is shown, unless it may be a part of a password."""
    with pytest.raises(SettingsError, match=f"^DATABASE_URL: {re.escape(message)}") as caught:
        create_store_engine(SecretStr(f"postgresql://{rest}"))
    assert "cret" not in str(caught.value)


def test_the_document_names_the_options_that_the_url_may_have() -> None:
    """Each row's effect is the one of each of its options."""
    (schema, *_), (ssl, *_), *ignored = table("consumers/SETTINGS.md", "options of the url")
    for name in re.findall(r"`(\w+)`", schema):
        assert parse_database_url(SecretStr(f"postgresql://h/d?{name}=own")).query == {"schema": "own"}
    assert ssl == "`ssl`"
    for name in re.findall(r"`(\w+)`", " ".join(row[0] for row in ignored)):
        assert not parse_database_url(SecretStr(f"postgresql://h/d?{name}=1")).query
