"""Read docker-compose.yml as Compose does, and run its services as processes of this machine, without Docker."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TOP = Path(__file__).parents[1]
TEXT = (TOP / "docker-compose.yml").read_text("utf-8")
FILE = yaml.safe_load(TEXT)
SERVICES = FILE["services"]
OURS = ("init-db", "worker", "api", "dashboard", "relay")
SECRETS = {
    "POSTGRES_PASSWORD": "p@ss:w/o?r#d %41 'ü",
    "REDIS_PASSWORD": "0f4c-83.b1_d6~e2",
    "REDIS_CONTROLLER_PASSWORD": "c1-0f4c.83_b1~d6",
    "REDIS_WORKER_PASSWORD": "w1-0f4c.83_b1~d6",
    "REDIS_DASHBOARD_PASSWORD": "d1-0f4c.83_b1~d6",
    "REDIS_READER_PASSWORD": "r1-0f4c.83_b1~d6",
    "HISTORY_WRITER_PASSWORD": "wr:i/t@e?r %41 'ü",
    "HISTORY_READER_PASSWORD": "re:a/d@e?r %41 'ü",
    "HISTORY_API_TOKEN": "t0ken:'%41",
    "HISTORY_DASHBOARD_PASSWORD": "d@shb:oard %41 'ü",
}
LOCALHOST = "127.0.0.1"
NOBODY = 65534


def resolved(value: Any, variables: dict[str, str]) -> Any:
    """Return `value` as Compose interpolates it: ${NAME:-default}, ${NAME:?message}, and $$ for a dollar sign.

    Raises:
        LookupError: a required variable is not set.
    """
    if isinstance(value, dict):
        return {key: resolved(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item, variables) for item in value]

    def replacement(match: re.Match[str]) -> str:
        name, operator, operand = match.groups()
        if match[0] == "$$":
            return "$"
        assert name, f"a lone dollar sign in {value!r}"
        if operator == "?" and not variables.get(name):
            raise LookupError(f"{name} {operand}")
        return variables.get(name) or operand

    pattern = r"\$(?:\$|\{(\w+):([-?])([^}]*)\})?"
    return re.sub(pattern, replacement, value) if isinstance(value, str) else value


def service(name: str) -> Any:
    return resolved(SERVICES[name], SECRETS)


def free_port() -> int:
    with socket.create_server((LOCALHOST, 0)) as server:
        return int(server.getsockname()[1])


class Container:
    """Process of a service: it has only the service's environment, runs as nobody, and cannot write files."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        postgres: int,
        redis: int,
        without: tuple[str, ...] = (),
        volume: Path | None = None,
    ) -> None:
        text = json.dumps(service(name))
        if volume is not None:  # replaces the service's volume, which it may write to
            text = text.replace(f'"{service(name)["volumes"][0]["target"]}/', f'"{volume}/')
        for published in ("8000", "9181", "9464"):
            text = text.replace(f'"{published}"', f'"{free_port()}"')
        for container, here in (('"postgres"', f'"{LOCALHOST}"'), ('"5432"', f'"{postgres}"'),
                                ("@redis:6379/", f"@{LOCALHOST}:{redis}/"), ("0.0.0.0", LOCALHOST)):  # fmt: skip
            text = text.replace(container, here)
        self.settings = json.loads(text)
        self.environment = {key: value for key, value in self.settings["environment"].items() if key not in without}
        self._folder = folder
        self.process = self.run(self.settings["command"], may_write=volume is not None)

    def run(self, command: list[str], *, may_write: bool = False) -> subprocess.Popen[bytes]:
        """Run a command like `docker compose exec`, or like `run` with a volume that it may write to."""
        paths = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "PYTHONPATH": str(TOP)}
        account: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        limit = "" if may_write else "ulimit -f 0 && "
        return subprocess.Popen(
            ["sh", "-c", f'{limit}exec "$@"', "sh", *command],
            cwd=self._folder, env=self.environment | paths, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **account,
        )  # fmt: skip

    def check(self) -> subprocess.Popen[bytes]:
        """Start the health check. Exit status 0 means healthy."""
        kind, *command = self.settings["healthcheck"]["test"]
        assert kind == "CMD"
        return self.run(command)

    def is_healthy(self) -> bool:
        with self.check() as check:
            check.communicate(timeout=20)
            return check.returncode == 0

    def port(self) -> int:
        """Return the port that the health check asks."""
        (port,) = (int(one) for one in self.settings["healthcheck"]["test"] if one.isdigit() and len(one) > 3)
        return port

    def result(self, seconds: float | None = None) -> tuple[int, str]:
        """Return the exit status and the output. The process must end within `seconds`, by default its grace period."""
        if seconds is None:
            seconds = float(self.settings["stop_grace_period"].removesuffix("s"))
        try:
            printed, _ = self.process.communicate(timeout=seconds)
        finally:
            self.kill()
        return self.process.returncode, printed.decode()

    def kill(self) -> None:
        """Kill the process. It may already have ended."""
        self.process.kill()
        self.process.communicate()


def stop(containers: list[Container]) -> list[tuple[int, str]]:
    """Stop the services like `docker compose stop`. Return the exit status and the output of each."""
    for one in containers:
        one.process.terminate()
    return [one.result() for one in containers]


def unwritable(folder: Path) -> Path:
    """Make a read-only folder in `folder`, in which services can run as nobody, and return it."""
    made = folder / "read-only"
    made.mkdir()
    made.chmod(0o555)
    # pytest's folders, and perhaps the home folder with the interpreter, are private to their owner.
    for above in [*made.parents, *Path(sys.executable).resolve().parents]:
        if not (mode := above.stat().st_mode) & stat.S_IXOTH:
            above.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
    return made
