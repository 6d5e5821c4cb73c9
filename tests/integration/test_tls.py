"""TLS to both servers by URL: another CA, another host name or no CA is an error, and nothing is sent in plain text."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme
from pydantic import SecretStr
from redis import Redis

from consumers.db import engine
from consumers.db.engine import create_store_engine
from consumers.db.logins import WORKER, set_passwords
from consumers.db.schema import apply_schema
from consumers.embedded import Addresses, postgres
from consumers.embedded.installation import installed
from consumers.embedded.server_process import checked, run
from consumers.errors import StoreUnavailable
from consumers.operations import get_portfolio_history
from consumers.ops.status import pipeline_status
from consumers.settings import LoginSettings
from tests.deliveries import enqueue_snapshots

_PASSWORD = "tls s3cret/@:"


@dataclass(frozen=True)
class Certificates:
    """Files: the CA of the servers' certificate, another CA, and the servers' certificate and key."""

    right: Path
    wrong: Path
    server: Path

    def __post_init__(self) -> None:
        assert self.right != self.wrong


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as name:
        Path(name).chmod(0o711)  # PostgreSQL's account must reach it
        yield Path(name)


@pytest.fixture(scope="module")
def certificates(folder: Path) -> Certificates:
    files = Certificates(folder / "ca.pem", folder / "other-ca.pem", folder / "server.pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(files.right))
    trustme.CA().cert_pem.write_to_path(str(files.wrong))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(files.server))
    return files


@pytest.fixture(scope="module")
def postgres_port(folder: Path, certificates: Certificates) -> Iterator[int]:
    """Port of a PostgreSQL with the tables and the worker's login, which needs TLS and a password."""
    programs = next((p for p in sorted(Path("/usr/lib/postgresql").glob("*/bin")) if (p / "initdb").exists()), None)
    if programs is None:
        pytest.fail("no PostgreSQL in /usr/lib/postgresql: apt-get install postgresql-15")
    installation = replace(installed(), postgres_bin=programs, postgres_version=programs.parent.name)
    account = installation.account
    data, key = folder / "postgres", folder / "postgres.pem"
    shutil.copy(certificates.server, key)
    key.chmod(0o600)
    if account:
        os.chown(key, account.pw_uid, account.pw_gid)
    port = _free_port()
    with (folder / "lock").open("w") as lock:
        postgres._ensure_data(data, installation, lock)
        (data / "pg_hba.conf").write_text("local all all trust\nhostssl all all all scram-sha-256\n")
        options = (
            f"-h 127.0.0.1 -p {port} -k {data} -c ssl=on -c ssl_cert_file={key} -c ssl_key_file={key} -c fsync=off"
        )
        control = (programs / "pg_ctl", "-D", data, "-w", "-l", data / "log")
        checked(run(*control, "-o", options, "start", account=account, keep=lock))
        try:
            owner = create_store_engine(SecretStr(f"postgresql://postgres@:{port}/postgres?host={quote(str(data))}"))
            apply_schema(owner)
            assert [
                *set_passwords(
                    owner, LoginSettings(HISTORY_WRITER_PASSWORD=SecretStr(_PASSWORD), HISTORY_READER_PASSWORD=None)
                )
            ] == [WORKER]
            owner.dispose()
            yield port
        finally:
            run(*control, "-m", "immediate", "stop", account=account, keep=lock)


@pytest.fixture(scope="module")
def redis_port(pair: Addresses, certificates: Certificates) -> Iterator[int]:
    """Port of a proxy that accepts only TLS and forwards to the Valkey of this run."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.server)
    behind = str(Redis.from_url(pair.redis_url).connection_pool.connection_kwargs["path"])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_terminate_tls, args=(listening, context, behind), daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def _terminate_tls(listening: socket.socket, context: ssl.SSLContext, behind: str) -> None:
    while True:
        try:
            plain, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=_forward, args=(plain, context, behind), daemon=True).start()


def _forward(plain: socket.socket, context: ssl.SSLContext, behind: str) -> None:
    import selectors

    try:
        client = context.wrap_socket(plain, server_side=True)
    except (OSError, ssl.SSLError):
        plain.close()
        return
    with client, socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as selector:
        server.connect(behind)
        selector.register(client, selectors.EVENT_READ, server)
        selector.register(server, selectors.EVENT_READ, client)
        try:
            while True:
                for ready, _ in selector.select():
                    source, sink = ready.fileobj, ready.data
                    assert isinstance(source, socket.socket)
                    part = source.recv(1 << 17)  # at least one TLS record, so no decrypted bytes stay behind
                    if not part:
                        return
                    sink.sendall(part)
        except OSError:
            return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def _database(port: int, certificate: Path | None, host: str = "localhost", mode: str = "verify-full") -> str:
    root = "" if certificate is None else f"&sslrootcert={certificate}"
    return f"postgresql://{WORKER}:{quote(_PASSWORD, safe='')}@{host}:{port}/postgres?sslmode={mode}{root}"


def _redis(port: int, certificate: Path | None, host: str = "localhost", scheme: str = "rediss") -> str:
    root = "" if certificate is None else f"?ssl_ca_certs={certificate}"
    return f"{scheme}://{host}:{port}/0{root}"


def _use(monkeypatch: pytest.MonkeyPatch, *, database: str, redis: str) -> None:
    engine.engine.cache_clear()
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setenv("REDIS_URL", redis)


def _has_no_password(message: str) -> None:
    assert _PASSWORD not in message
    assert quote(_PASSWORD, safe="") not in message


def test_worker_stores_through_tls_with_a_password(
    redis: Redis,
    postgres_port: int,
    redis_port: int,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The URLs alone configure it; the connections are encrypted."""
    enqueue_snapshots(redis, 2)
    addresses = {
        "database": _database(postgres_port, certificates.right), "redis": _redis(redis_port, certificates.right),
    }  # fmt: skip
    worker = subprocess.run(
        [sys.executable, "-m", "consumers.cli", "worker", "--burst"],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "DATABASE_URL": addresses["database"], "REDIS_URL": addresses["redis"]},
    )  # fmt: skip
    assert worker.returncode == 0, worker.stderr
    _has_no_password(worker.stderr)
    _use(monkeypatch, **addresses)
    assert len(get_portfolio_history()) == 2
    store = create_store_engine(SecretStr(addresses["database"]))
    with store.connect() as db:
        in_use = db.exec_driver_sql("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").scalar_one()
    store.dispose()
    assert in_use is True


@pytest.mark.parametrize(
    ("certificate", "host", "mode", "reason"),
    [
        ("wrong", "localhost", "verify-full", "certificate verify failed"),
        ("right", "127.0.0.1", "verify-full", "does not match host name"),
        ("missing", "localhost", "verify-full", "does not exist"),
        (None, "localhost", "disable", "no pg_hba.conf entry"),
    ],
    ids=["another CA", "another name", "no such file", "plain"],
)
def test_tls_error_of_postgresql_is_one_line_without_the_password(
    postgres_port: int,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    *,
    certificate: str | None,
    host: str,
    mode: str,
    reason: str,
) -> None:
    path = None if certificate is None else getattr(certificates, certificate, Path("/nowhere/ca.pem"))
    _use(monkeypatch, database=_database(postgres_port, path, host, mode), redis="")
    with pytest.raises(StoreUnavailable, match="^PostgreSQL: .*" + reason) as caught:
        get_portfolio_history()
    assert len(str(caught.value).splitlines()) == 1
    _has_no_password(str(caught.value))


@pytest.mark.parametrize(
    ("certificate", "host", "scheme", "reason"),
    [
        ("wrong", "localhost", "rediss", "CERTIFICATE_VERIFY_FAILED"),
        ("right", "127.0.0.1", "rediss", "CERTIFICATE_VERIFY_FAILED"),
        (None, "localhost", "rediss", "CERTIFICATE_VERIFY_FAILED"),
        ("missing", "localhost", "rediss", "No such file"),
        (None, "localhost", "redis", "ConnectionError"),
    ],
    ids=["another CA", "another name", "no CA", "no such file", "plain"],
)
def test_tls_error_of_redis_is_one_line_in_the_status(
    postgres_port: int,
    redis_port: int,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    *,
    certificate: str | None,
    host: str,
    scheme: str,
    reason: str,
) -> None:
    """`status` shows the reason, and the client sends nothing in plain text."""
    path = None if certificate is None else getattr(certificates, certificate, Path("/nowhere/ca.pem"))
    _use(
        monkeypatch,
        database=_database(postgres_port, certificates.right), redis=_redis(redis_port, path, host, scheme),
    )  # fmt: skip
    values = pipeline_status()
    assert (values["problems"] != [], values["database"]) == (True, "reachable")
    assert reason in values["redis"]
    assert len(values["redis"].splitlines()) == 1
