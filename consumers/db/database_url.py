"""Parse DATABASE_URL: one or several hosts, options of libpq, options of other libraries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from psycopg2 import ProgrammingError
from psycopg2.extensions import parse_dsn
from pydantic import SecretStr
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import ArgumentError

from consumers.errors import first_line
from producers.errors import SettingsError

# Several hosts as in libpq: postgresql://user:password@host:port,host:port/database.
_HOSTS = re.compile(r"(?P<begin>[\w+]+://(?:[^@/?#]*@)?)(?P<hosts>[^@/?#]*,[^@/?#]*)(?P<end>.*)", re.DOTALL)
_LOGIN_UNENCODED = re.compile(r"[\w+]+://[^@]*[/?#][^@]*@[^@/?#]*,", re.DOTALL)
_HOST = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<name>[^:]*))(?::(?P<port>\d*))?")

# Options that other libraries read from the same URL. Prisma, JDBC and Rails name the schema in these.
_SCHEMA_NAMES = frozenset({"schema", "currentSchema", "search_path", "schema_search_path"})
# Most set pools, prepared statements and time limits of those libraries, which this program sets itself. The last line:
# Rails' adapter and encoding, JDBC's name and keepalive, a mode of node-postgres, and the names that Supabase adds.
_IGNORED = frozenset(
    {
        "pgbouncer", "connection_limit", "pool", "pool_size", "max_overflow", "pool_recycle", "pool_pre_ping",
        "pool_timeout", "socket_timeout", "command_timeout", "statement_cache_size", "prepared_statement_cache_size",
        "prepared_statements", "prepare_threshold", "conn_max_age", "socketTimeout", "connectTimeout", "loginTimeout",
        "prepareThreshold", "preparedStatementCacheQueries", "reWriteBatchedInserts",
        "adapter", "encoding", "ApplicationName", "tcpKeepAlive", "uselibpqcompat", "supa", "workaround",
    }
)  # fmt: skip
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_OPTION_NAME = re.compile(r"[A-Za-z_]{1,40}")

_ENCODE_LOGIN = "DATABASE_URL: percent-encode /, ?, # and commas in the password, as %2F, %3F, %23, %2C"
_ONE_ADDRESS = "DATABASE_URL: hostaddr takes one address only; give several addresses in place of the hosts"


def parse_database_url(url: SecretStr) -> URL:
    """Parse DATABASE_URL. In the URL returned, several hosts and their ports are in the query, separated by commas.

    Its query has options of libpq only, and `schema` if the URL names one (see `split_schema`).

    Raises:
        SettingsError: the URL cannot be parsed, or an option is unknown; the message does not repeat a value.
    """
    text = url.get_secret_value()
    if text != text.strip() or text.startswith(("'", '"')):
        raise SettingsError("DATABASE_URL: remove the blanks or quotation marks around the URL")
    if text.casefold().startswith("jdbc:"):
        raise SettingsError(
            "DATABASE_URL: remove jdbc: from the beginning, and write user and password before the host"
        )
    scheme, colon, rest = text.partition("://")
    url = SecretStr(scheme.lower() + colon + rest)
    try:
        parsed = _parse(url.get_secret_value())
    except (ArgumentError, ValueError):
        if _LOGIN_UNENCODED.match(url.get_secret_value()):
            raise SettingsError(_ENCODE_LOGIN) from None
        raise SettingsError("DATABASE_URL: must be a URL such as postgresql://user@host/database") from None
    if "@" in (parsed.host or ""):
        raise SettingsError("DATABASE_URL: percent-encode @ in the password, as %40")
    if "," in (parsed.host or ""):
        raise SettingsError(_ENCODE_LOGIN)
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise SettingsError("DATABASE_URL: must be a postgresql:// or postgres:// URL")
    # If a password contains ? unencoded, a part of it is taken for an option. An @ then follows.
    may_repeat_name = "@" not in url.get_secret_value().partition("?")[2]
    query = dict(_libpq_options(parsed.query, may_repeat_name=may_repeat_name))
    return parsed.set(drivername="postgresql+psycopg2", query=query)


def _libpq_options(query: Any, *, may_repeat_name: bool) -> Iterator[tuple[str, Any]]:
    """Yield the options for libpq, and the schema. Leave out options that only other libraries need."""
    for name, value in query.items():
        if name in _IGNORED or (name == "ssl" and "sslmode" in query):
            continue
        if name in _SCHEMA_NAMES:
            yield "schema", value if isinstance(value, str) else value[-1]
        elif name in ("ssl", "sslmode"):
            yield "sslmode", _ssl_mode(name, value if isinstance(value, str) else value[-1])
        else:
            _check_option(name, may_repeat_name=may_repeat_name)
            yield name, value


def _ssl_mode(name: str, value: str) -> str:
    """Return libpq's sslmode. asyncpg calls it ssl; node-postgres has no-verify."""
    mode = {"no-verify": "require", "false": "disable", "0": "disable"}.get(value, value)
    if mode in _SSL_MODES:
        return mode
    if name == "sslmode":
        raise SettingsError(f"DATABASE_URL: sslmode must be one of {', '.join(_SSL_MODES)}")
    raise SettingsError(
        "DATABASE_URL: in place of ssl, write sslmode=require, or sslmode=verify-full, which checks the certificate"
    )


def _check_option(name: str, *, may_repeat_name: bool) -> None:
    """Raise SettingsError for an unknown option. libpq's own message may contain a part of the password."""
    plain = _OPTION_NAME.fullmatch(name)
    try:
        if plain:
            parse_dsn(f"{name}=value")
            return
    except ProgrammingError:
        pass
    named = f"the option {name}" if plain and may_repeat_name else "an option after the ?"
    raise SettingsError(f"DATABASE_URL: {named} is not an option of PostgreSQL: remove it") from None


def schema_name_problem(name: str) -> str | None:
    """Return in words what is wrong with the name of a schema that is to be created, or None."""
    usable = name == name.strip() and not any(letter in name for letter in ',"\0') and len(name.encode()) <= 63
    if usable and name and name != "$user" and not name.startswith("pg_"):
        return None
    return (
        "must be a name of 1 to 63 bytes that does not begin with pg_, is not $user, and has no comma, no quotation"
        " mark, and no blank at either end"
    )


def split_schema(url: URL) -> tuple[URL, tuple[str, ...]]:
    """Return the URL without its `schema`, and the names of the schemas in it, which may be separated by commas."""
    given = str(url.query.get("schema", ""))
    names = tuple(name.strip().strip('"') for name in given.split(",")) if given else ()
    if not all(names) or "\0" in given:
        raise SettingsError("DATABASE_URL: schema must be the name of a schema, as in schema=trading")
    return url.difference_update_query(["schema"]), names


def _parse(text: str) -> URL:
    """Parse a URL and move several hosts into its query, the only place where SQLAlchemy reads them."""
    several = _HOSTS.fullmatch(text)
    if several is None:
        return _with_ports(make_url(text))
    if "@" in several["end"].partition("?")[0]:  # the text before the comma is not a host, but part of a password
        raise SettingsError(_ENCODE_LOGIN)
    parsed = make_url(several["begin"] + several["end"])
    if parsed.query.keys() & {"host", "port"}:
        raise SettingsError("DATABASE_URL: give hosts and ports either before the database or after ?")
    return _with_hosts_in_query(parsed, *_hosts_and_ports(several["hosts"].split(",")))


def _with_ports(parsed: URL) -> URL:
    """Check several hosts in the query, with one port each or one port for all, as in libpq."""
    given = parsed.query.get("host", "")
    if isinstance(given, tuple):  # SQLAlchemy's own form: host=one:5432&host=two:5433
        hosts, own_ports = _hosts_and_ports(list(given))
    else:
        hosts, own_ports = given.split(","), []
    if len(hosts) == 1:
        if "," in str(parsed.query.get("hostaddr", "")):
            raise SettingsError(_ONE_ADDRESS)
        return parsed
    asked = parsed.query.get("port", "")
    ports = [one or "5432" for one in (asked.split(",") if isinstance(asked, str) else asked)] if asked else own_ports
    ports = ports or [str(parsed.port or 5432)]
    if len(ports) not in (1, len(hosts)):
        raise SettingsError(
            f"DATABASE_URL: {len(hosts)} hosts need {len(hosts)} ports, or one for all, not {len(ports)}"
        )
    return _with_hosts_in_query(parsed, hosts, ports * (len(hosts) // len(ports)))


def _hosts_and_ports(listed: list[str]) -> tuple[list[str], list[str]]:
    found = [_HOST.fullmatch(one) for one in listed]
    if None in found:
        raise ValueError("not host:port")
    names = [unquote(one["six"] or one["name"]) for one in found if one]
    return names, [one["port"] or "5432" for one in found if one]


def _with_hosts_in_query(parsed: URL, hosts: list[str], ports: list[str]) -> URL:
    if not all(hosts):
        raise SettingsError("DATABASE_URL: a host is missing before or after a comma")
    if not all(port.isascii() and port.isdigit() and 1 <= int(port) <= 65535 for port in ports):
        raise SettingsError("DATABASE_URL: a port must be a number from 1 to 65535")
    if "hostaddr" in parsed.query:
        raise SettingsError(_ONE_ADDRESS)
    return parsed.update_query_dict({"host": ",".join(hosts), "port": ",".join(ports)})


def session_attributes(url: URL, *, read_only: bool) -> dict[str, str]:
    """Return the target_session_attrs of a session. With several hosts the default is read-write.

    A session that is read-only by our own setting is never read-write, so it asks for the primary instead.
    """
    several = "," in str(url.query.get("host", ""))
    asked = url.query.get("target_session_attrs", "read-write" if several else "")
    if not asked:
        return {}
    return {"target_session_attrs": "primary" if read_only and asked == "read-write" else str(asked)}


def try_hosts_in_turn(engine: Engine) -> None:
    """Connect to several hosts one by one, as psycopg 3 does, so that each has its own time limit.

    When the caller waits for the answers itself, as a worker does, libpq has no time limit per host. A frozen first
    host would use up all the time, and the second one, the new primary, would never be tried.
    """
    event.listen(engine, "do_connect", _connect)


def _connect(dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    hosts = str(options.get("host", "")).split(",")
    if len(hosts) < 2:
        return None  # SQLAlchemy then connects by itself
    ports = str(options.get("port", "")).split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    asked = options.get("target_session_attrs", "any")
    reasons: list[str] = []
    for attributes in ("standby", "any") if asked == "prefer-standby" else (asked,):
        for host, port in zip(hosts, ports, strict=True):
            one = {**options, "host": host, "port": port or "5432", "target_session_attrs": attributes}
            try:
                return dialect.connect(*arguments, **one)
            except dialect.loaded_dbapi.OperationalError as error:
                reasons.append(f"{host}: {first_line(error).rpartition(': ')[2]}")
    raise dialect.loaded_dbapi.OperationalError(f"no usable host in DATABASE_URL: {'; '.join(reasons)}")
