"""DATABASE_URL, with one host or several: the primary of the moment among them is the one to use."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from pydantic import SecretStr
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import ArgumentError

from producers.errors import SettingsError

# As libpq has them: postgresql://user:password@host:port,host:port/database.
_HOSTS = re.compile(r"(?P<begin>[\w+]+://(?:[^@/?#]*@)?)(?P<hosts>[^@/?#]*,[^@/?#]*)(?P<end>.*)", re.DOTALL)
_HOST = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<name>[^:]*))(?::(?P<port>\d*))?")


def parse_database_url(url: SecretStr) -> URL:
    """Several hosts and their ports stand in the query of what it returns, separated by commas.

    Raises:
        SettingsError: it cannot be read; the message does not repeat it.
    """
    try:
        parsed = _with_hosts(url.get_secret_value())
    except (ArgumentError, ValueError):
        raise SettingsError("DATABASE_URL: is not a URL such as postgresql://user@host/database") from None
    if "@" in (parsed.host or ""):
        raise SettingsError("DATABASE_URL: a password with @ in it must have it percent-encoded, as %40")
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise SettingsError("DATABASE_URL: must be a postgresql:// URL")
    return parsed.set(drivername="postgresql+psycopg2")


def _with_hosts(text: str) -> URL:
    """SQLAlchemy reads several hosts only in the query."""
    several = _HOSTS.fullmatch(text)
    if several is None:
        return make_url(text)
    hosts = [_HOST.fullmatch(host) for host in several["hosts"].split(",")]
    if None in hosts:
        raise ValueError("not host:port")
    names = [unquote(host["six"] or host["name"]) for host in hosts if host]
    ports = [host["port"] or "5432" for host in hosts if host]
    parsed = make_url(several["begin"] + several["end"])
    return parsed.update_query_dict({"host": ",".join(names), "port": ",".join(ports)})


def session_attributes(url: URL, *, read_only: bool) -> dict[str, str]:
    """Which of several hosts a session may be on: without a word in the URL, only on one that takes writes.

    A session that is read-only by our own choice must ask for the primary instead.
    """
    several = "," in str(url.query.get("host", "")) or isinstance(url.query.get("host"), tuple)
    asked = url.query.get("target_session_attrs", "read-write" if several else "")
    if not asked:
        return {}
    return {"target_session_attrs": "primary" if read_only and asked == "read-write" else str(asked)}


def try_hosts_in_turn(engine: Engine) -> None:
    """Connect to several hosts one by one, as psycopg 3 does, so that each has its own time limit.

    libpq has none when its caller waits for the answers itself, as a worker does: a first host that is frozen would
    have all the time, and the second, which has become the primary, would never be asked.
    """
    event.listen(engine, "do_connect", _connect)


def _connect(dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    hosts = str(options.get("host", "")).split(",")
    if len(hosts) < 2:
        return None  # as usual
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
                lines = str(error).strip().splitlines()
                reasons.append(f"{host}: {lines[0].rpartition(': ')[2] if lines else type(error).__name__}")
    raise dialect.loaded_dbapi.OperationalError(f"none of the hosts will do: {'; '.join(reasons)}")
