"""Redis servers of tests: Debian's Redis 7, a server with renamed commands, and the users of redis-users.acl."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from redis import Redis, RedisError

from tests.documents import ROOT

DEBIAN_REDIS = Path("/usr/bin/redis-server")
USERS = ("controller", "worker", "dashboard", "reader")
USERS_FILE = ROOT / "consumers/deploy/redis-users.acl"
# redis-py introduces itself at each connection, and ignores it if that is forbidden.
_INTRODUCTIONS = {"client|setinfo", "client|maint_notifications"}
_SETTINGS = 'port 0\nsave ""\nappendonly yes\nappendfsync everysec\nmaxmemory-policy noeviction\nunixsocketperm 777\n'


@contextmanager
def redis_server(program: Path, folder: Path, settings: str = "") -> Iterator[str]:
    """Run a server in `folder`, whose path must be short, and yield its URL; kill it at the end of the block."""
    conf, socket, log = (folder / name for name in ("redis.conf", "redis.sock", "redis.log"))
    conf.write_text(f"{_SETTINGS}dir {folder}\nunixsocket {socket}\nlogfile {log}\n{settings}")
    process = subprocess.Popen([str(program), str(conf)])
    url = f"unix://{quote(str(socket))}?db=0"
    try:
        _wait_until_it_answers(process, url, log)
        yield url
    finally:
        process.kill()
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + 20
    with Redis.from_url(url) as client:
        while process.poll() is None:
            try:
                client.ping()
            except RedisError:
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.02)
            else:
                return
    raise RuntimeError(f"{process.args!r} ended: {log.read_text() if log.exists() else 'no log'}")


def rules_of(user: str) -> list[str]:
    """Return the rules of a user in the file, for the queue `history`; the user's own name is the password."""
    text = USERS_FILE.read_text("utf-8")
    (line,) = re.findall(rf"^user trading_history_{user} (.*)$", text, re.M)
    password = f"$REDIS_{user.upper()}_PASSWORD"
    return str(line.replace(password, user).replace("$HISTORY_QUEUE", "history")).split()


@contextmanager
def users(administrator: Redis) -> Iterator[None]:
    """Create the users of the file during the block, and have the server forget what it has forbidden so far."""
    for user in USERS:
        administrator.execute_command("ACL SETUSER", f"trading_history_{user}", "reset", *rules_of(user))  # type: ignore[no-untyped-call]
    administrator.acl_log_reset()
    try:
        yield
    finally:
        administrator.acl_deluser(*(f"trading_history_{user}" for user in USERS))


def url_of(administrator: Redis, user: str) -> str:
    """Return the URL of the same server for one of these users."""
    path = quote(str(administrator.connection_pool.connection_kwargs["path"]))
    return f"unix://trading_history_{user}:{user}@{path}?db=0"


def forbidden(administrator: Redis) -> set[tuple[str, str, str]]:
    """Return what the server has forbidden: user, reason and object, such as `command` and `get`."""
    found = {(str(one["username"]), str(one["reason"]), str(one["object"])) for one in administrator.acl_log()}
    return {one for one in found if one[2] not in _INTRODUCTIONS}
