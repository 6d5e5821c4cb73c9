"""The embedded Valkey, a Redis-compatible server: settings and start."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import IO
from urllib.parse import quote

from consumers.embedded.installation import Installation
from consumers.embedded.server_process import Server, run


def server(home: Path) -> Server:
    """Return the Valkey server whose files are in `home`."""
    # SIGTERM has the effect of the SHUTDOWN command, and also works while the server cannot answer.
    clean = ((signal.SIGTERM, 20), (signal.SIGKILL, 5))
    conf = home / "valkey.conf"
    return Server("Valkey", "valkey-server", home / "valkey.pid", conf, home / "valkey.log", clean)


def start(valkey: Server, folder: Path, installation: Installation, lock: IO[str]) -> str:
    """Start Valkey if necessary and return its URL. `folder` is its home, or a link to it with a short, plain path."""
    url = f"unix://{quote(str(folder / 'valkey.sock'))}?db=0"
    valkey.bring_up(lambda: _answers(url), functools.partial(_launch, valkey, folder, installation, lock))
    return url


def _launch(valkey: Server, folder: Path, installation: Installation, lock: IO[str]) -> None:
    home = valkey.argument.parent
    (home / "valkey").mkdir(mode=0o700, exist_ok=True)
    valkey.pid_file.unlink(missing_ok=True)
    settings = {
        "dir": home / "valkey", "logfile": valkey.log, "pidfile": valkey.pid_file, "daemonize": "yes",
        "set-proc-title": "no",  # keeps the command line, by which Server.process finds it
        "port": 0, "unixsocket": folder / "valkey.sock", "unixsocketperm": 700,
        "appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction",
    }  # fmt: skip
    escaped = {key: str(value).replace("\\", r"\\").replace('"', r"\"") for key, value in settings.items()}
    text = "".join(f'{key} "{value}"\n' for key, value in escaped.items())
    valkey.argument.write_bytes(os.fsencode(text))
    # The command returns before the daemon has written its pid file, so the shell keeps the lock until it exists.
    script = '"$0" "$1" </dev/null || exit; for _ in $(seq 500); do [ -s "$2" ] && exit; sleep 0.01; done; exit 1'
    command = ("-c", script, installation.valkey, valkey.argument, valkey.pid_file)
    if (result := run("/bin/sh", *command, keep=lock)).returncode:
        raise valkey.error(": ".join(filter(None, ("did not start", result.stdout.strip()))))


def _answers(url: str) -> bool:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis.from_url(url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):  # includes LOADING
            return False
