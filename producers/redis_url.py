"""Redis client for REDIS_URL: for one server, or for the master of a service behind Sentinel.

redis-py has no URL for Sentinel. This form is that of redis-sentinel-url, limits and Prefect:

    redis+sentinel://[user][:password@]host[:port][,host[:port]…]/service[/db][?options]

The hosts are Sentinels. User, password, db and options apply to the master, as in a redis:// URL; the options
sentinel_username and sentinel_password apply to the Sentinels. rediss+sentinel uses TLS for both, with the same ssl_
options.
"""

from __future__ import annotations

import copy
import re
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.connection import URL_QUERY_ARGUMENT_PARSERS, SSLConnection, parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from producers.errors import SettingsError
from producers.redis_keys import KEY_PREFIX

CONNECT_TIMEOUT_SECONDS = 2.0
ANSWER_TIMEOUT_SECONDS = 5.0
_SENTINEL_TIMEOUT_SECONDS = 1.0  # short, because Sentinels are asked one after the other
_SENTINEL_PORT = 26379

_SENTINEL_SCHEME = re.compile(r"rediss?\+sentinel://")
_SENTINEL_URL = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?:(?P<login>[^@/?#]*)@)?(?P<hosts>[^@/?#]+)/(?P<service>[^/?#]+)"
    r"(?:/(?P<db>\d*))?(?:\?(?P<query>[^#]*))?"
)
_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>\d{1,5}))?")
_OPTION_NAME = re.compile("[a-z_]{1,40}")  # as those of redis-py; a name with digits could be a password
_SENTINEL_LOGIN = {"username": "sentinel_username", "password": "sentinel_password"}
# Other keyword arguments of master_for() are not options of a URL, such as classes.
_OPTIONS = {
    *URL_QUERY_ARGUMENT_PARSERS,
    *_SENTINEL_LOGIN,
    *_SENTINEL_LOGIN.values(),
    *("client_name", "encoding", "encoding_errors"),
}

_FORBIDDEN = re.compile(
    r"no permissions? to run the '(?P<command>[^']+)' command"
    r"|(?P<script>executing the script can't run this command)"
    r"|no permissions to access (?:a|one of the) (?P<object>key|channel)|(?P<key>executing the script can't access)",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(r"unknown (?:redis )?command '?(?P<command>[^',]+)", re.IGNORECASE)


class _SharedSentinel(Sentinel):
    """Sentinel client that several threads can share.

    redis-py moves the Sentinel that answered to the front of its list, in place. If two threads do so at once, the list
    can have that Sentinel twice and lose another one. Here each call works on a copy of the list.
    """

    def discover_master(self, service_name: str) -> tuple[str, int]:
        own = copy.copy(self)
        own.sentinels = list(self.sentinels)
        address: tuple[str, int] = Sentinel.discover_master(own, service_name)  # type: ignore[no-untyped-call]  # redis-py's annotations are incomplete
        self.sentinels = own.sentinels
        return address


def redis_client(url: str) -> Redis:
    """Return a client with timeouts of 2 s for connecting and 5 s for a response, and without retries.

    Raises:
        SettingsError: the URL is not valid or has an unknown option; the message does not repeat the URL.
    """
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "socket_timeout": ANSWER_TIMEOUT_SECONDS,
        "health_check_interval": 30,
        "retry": Retry(NoBackoff(), 0),
    }
    try:
        client = _sentinel_client(url, options) if _SENTINEL_SCHEME.match(url) else Redis.from_url(url, **options)
        client.connection_pool.make_connection()  # checks the options; it does not connect
        return client
    except (AttributeError, RedisError, TypeError, ValueError):  # redis-py raises any of these for a wrong option
        # The library's message may contain the URL with its password, so it is left out.
        if wrong := _wrong_option(url):
            raise SettingsError(
                f"REDIS_URL: the option {wrong} is unknown or has a wrong value: remove or correct it"
            ) from None
        raise SettingsError(
            "REDIS_URL: must be a redis://, rediss:// or unix:// URL, or"
            " redis+sentinel://host:port,host:port/service/db, with known options"
        ) from None


def _wrong_option(url: str) -> str | None:
    """Return the name of the first option that redis-py does not take, or None.

    If an @ follows, the text after the ? is a part of a password that is not percent-encoded, and is not shown.
    """
    scheme, query = "rediss" if url.startswith("rediss") else "redis", url.partition("?")[2]
    if "@" in query:
        return None
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in _SENTINEL_LOGIN.values():
            continue
        try:
            Redis.from_url(f"{scheme}://host?{urlencode({name: value})}").connection_pool.make_connection()
        except (AttributeError, RedisError, TypeError, ValueError):
            return name if _OPTION_NAME.fullmatch(name) else None
    return None


def place_of(client: Redis) -> str:
    """Return the server of a client, and the prefix of RQ's keys there, for messages, without user and password.

    Outboxes store this text and compare it, so it must not change.
    """
    pool = client.connection_pool
    options = pool.connection_kwargs
    how = ", by TLS" if issubclass(pool.connection_class, SSLConnection) else ""
    how += "" if KEY_PREFIX is None else f", key prefix {KEY_PREFIX}"
    database = f"database {options.get('db') or 0} on"
    if isinstance(pool, SentinelConnectionPool):
        asked = (one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels)
        sentinels = ", ".join(f"{one['host']}:{one['port']}" for one in asked)
        return f"{database} the master of {pool.service_name}{how}, by Sentinel {sentinels}"
    place = options.get("path") or f"{options.get('host') or 'localhost'}, port {options.get('port') or 6379}"
    return f"{database} {place}{how}"


def is_forbidden(error: BaseException) -> bool:
    """Return whether Redis' access list forbids this user the command, a key or a channel."""
    return isinstance(error, RedisError) and _FORBIDDEN.search(str(error)) is not None


def redis_reason(error: RedisError) -> str:
    """Return the first line of an error of Redis, or its type if it is empty.

    If an access list forbids a command, the line names the command and the rule that would allow it.
    """
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if found := _FORBIDDEN.search(reason):
        return f"Redis forbids {_forbidden(found)} ({reason})"
    if found := _UNKNOWN.search(reason):
        return f"Redis does not have command {found['command']}, or it is renamed or disabled there ({reason})"
    return reason


def _forbidden(found: re.Match[str]) -> str:
    rules = "; the rules are in consumers/deploy/redis-users.acl"
    if command := found["command"]:
        return f"the command {command} to this user: run ACL SETUSER <user> +{command}"
    if found["object"] == "channel":
        return f"a channel to this user: run ACL SETUSER <user> '&{KEY_PREFIX or 'rq'}:pubsub:*'"
    if found["script"]:
        return f"a command to this user: ACL LOG names it, and ACL SETUSER <user> +<command> allows it{rules}"
    return f"a key to this user: ACL LOG names it, and ACL SETUSER <user> ~<pattern> allows it{rules}"


def _sentinel_client(url: str, options: dict[str, Any]) -> Redis:
    parts = _SENTINEL_URL.fullmatch(url)
    if parts is None:
        raise ValueError("not the URL of a service behind Sentinel")
    given = parse_qsl(parts["query"] or "", keep_blank_values=True)
    if not all(name in _OPTIONS or name.startswith("ssl_") for name, _ in given):
        raise ValueError("not an option of a connection")
    sentinel_login = {name: dict(given).get(option) for name, option in _SENTINEL_LOGIN.items()}
    rest = urlencode([(name, value) for name, value in given if name not in _SENTINEL_LOGIN.values()])
    login = f"{parts['login']}@" if parts["login"] else ""
    # redis-py decodes the login and converts the options to their types.
    master = {**options, **parse_url(f"{parts['scheme']}://{login}master/{parts['db'] or ''}?{rest}")}  # type: ignore[no-untyped-call]  # likewise
    del master["host"]
    if master.pop("connection_class", None) is not None:
        master["ssl"] = True
    tls = {name: value for name, value in master.items() if name == "ssl" or name.startswith("ssl_")}
    limits = dict.fromkeys(("socket_connect_timeout", "socket_timeout"), _SENTINEL_TIMEOUT_SECONDS)
    sentinel = _SharedSentinel(  # type: ignore[no-untyped-call]  # likewise
        [_address(host) for host in parts["hosts"].split(",")],
        sentinel_kwargs={"retry": Retry(NoBackoff(), 0), **limits, **sentinel_login, **tls},
    )
    client: Redis = sentinel.master_for(unquote(parts["service"]), **master)  # type: ignore[no-untyped-call]  # likewise
    return client


def _address(host: str) -> tuple[str, int]:
    parts = _HOST.fullmatch(host)
    if parts is None or int(parts["port"] or _SENTINEL_PORT) > 65535:
        raise ValueError("not host:port")
    return parts["six"] or unquote(parts["name"]), int(parts["port"] or _SENTINEL_PORT)
