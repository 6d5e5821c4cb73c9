"""Attacks on a worker and the API with their own database roles: no code runs, no secret leaks, no process stops."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from rq import Callback, Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from sqlalchemy import Engine, make_url, text

from consumers.db.engine import create_store_engine
from consumers.db.logins import API, WORKER, set_passwords
from consumers.embedded import Addresses
from consumers.settings import LoginSettings
from producers.events import encode, event_of
from tests.conftest import a_database
from tests.deliveries import history_queue
from tests.factories import a_signal, a_snapshot, an_archive
from tests.rq_programs import end, until

SNAPSHOT = "consumers.handlers.record_portfolio_snapshot"
ARCHIVE = "consumers.handlers.record_signal_archive"
_WORKER_PASSWORD, _API_PASSWORD, _TOKEN = "w0rkers-s3cret", "ap1s-s3cret", "t0ken-s3cret"
_MEGABYTE = 1024 * 1024

_CANARY = """
from pathlib import Path
CANARY = Path(__file__).with_name("it-ran")
CANARY.touch()
def run(*args, **kwargs):
    CANARY.touch()
"""


@dataclass
class System:
    """The attacked processes, and the traces by which a successful attack is noticed."""

    redis: Redis
    store: Engine  # as the owner
    folder: Path
    worker: subprocess.Popen[bytes]
    api: subprocess.Popen[bytes]
    port: int
    heard: list[bytes]  # requests that the listener received
    listener: str
    good_events: int = 0

    @property
    def canary(self) -> Path:
        """The file that exists if code of an attacker ran."""
        return self.folder / "it-ran"

    def outcome(self, job_id: str) -> str | None:
        """Return the reason of a job's recorded rejection; None if there is none."""
        with self.store.connect() as db:
            reason: str | None = db.scalar(
                text("SELECT reason FROM event_outcomes WHERE job_id = :job"), {"job": job_id}
            )
            return reason

    def store_a_good_event(self) -> None:
        """Check that the worker continues: the next event is a row within 5 s."""
        self.good_events += 1
        event = event_of(a_snapshot(after=timedelta(seconds=self.good_events)), source="good/1", sequence=None)
        history_queue(self.redis).enqueue(SNAPSHOT, encode(event))
        until(lambda: self._is_row(str(event.id)), seconds=5)

    def _is_row(self, event_id: str) -> bool:
        with self.store.connect() as db:
            return bool(
                db.scalar(text("SELECT EXISTS (SELECT FROM portfolio_history WHERE event_id = :id)"), {"id": event_id})
            )

    def assert_unaffected(self) -> None:
        """Check that both processes run, no foreign code ran, no webhook was called, and an event is stored."""
        assert (self.worker.poll(), self.api.poll()) == (None, None)
        assert not self.canary.exists()
        assert self.heard == []
        self.store_a_good_event()


def _wait_for_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode()


@contextmanager
def _listener(heard: list[bytes]) -> Iterator[str]:
    """Listen for the requests of webhooks; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    heard.append(client.recv(1000))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def _as(url: str, login: str, password: str) -> str:
    return make_url(url).set(username=login, password=password).render_as_string(hide_password=False)


def _run(command: list[str], folder: Path, log: str, **environment: str) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HISTORY_", "POSTGRES_"))}
    paths = os.pathsep.join([str(folder), *sys.path])
    with (folder / log).open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "consumers.cli", *command],
            stdout=subprocess.PIPE, stderr=errors, cwd=folder,
            env={**inherited, "PYTHONPATH": paths, **environment},
        )  # fmt: skip


@pytest.fixture(scope="module")
def system(pair: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "canary_module.py").write_text(_CANARY)
    redis = Redis.from_url(pair.redis_url)
    redis.flushall()
    heard: list[bytes] = []
    with a_database(pair) as url, _listener(heard) as listener:
        store = create_store_engine(SecretStr(url))
        logins = LoginSettings(
            HISTORY_WRITER_PASSWORD=SecretStr(_WORKER_PASSWORD), HISTORY_READER_PASSWORD=SecretStr(_API_PASSWORD)
        )
        assert list(set_passwords(store, logins)) == [WORKER, API]
        worker = _run(
            ["worker"], folder, "worker.log",
            DATABASE_URL=_as(url, WORKER, _WORKER_PASSWORD), REDIS_URL=pair.redis_url,
        )  # fmt: skip
        api = _run(
            ["api", "--port", "0"], folder, "api.log",
            DATABASE_URL=_as(url, API, _API_PASSWORD), REDIS_URL=pair.redis_url, HISTORY_API_TOKEN=_TOKEN,
        )  # fmt: skip
        try:
            port = int(_wait_for_line(api).split()[0].rstrip("/").rpartition(":")[2])
            yield System(redis, store, folder, worker, api, port, heard, listener)
        finally:
            for process in (worker, api):
                end(process)
                assert process.stdout is not None
                process.stdout.close()
            store.dispose()
            redis.close()


# ---- unsupported jobs


def _put(system: System, job_id: str, data: bytes, **fields: Any) -> str:
    """Write a job without RQ, as any client of Redis can, and queue it."""
    values: dict[Any, Any] = {
        "data": data,
        "origin": "history",
        "status": "queued",
        "created_at": "2026-01-01T00:00:00.0Z",
        **fields,
    }
    system.redis.hset(Job.key_for(job_id), mapping=values)
    system.redis.rpush("rq:queue:history", job_id)
    return job_id


def _call(function: Any, *arguments: Any, instance: Any = None, **keywords: Any) -> bytes:
    return json.dumps((function, instance, arguments, keywords)).encode()


def _valid(number: int = 0) -> str:
    return encode(event_of(a_snapshot(portfolio_id=2, after=timedelta(seconds=number)), source="x/1", sequence=None))


class _Exploit:
    """An object that makes pickle run a command when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._canary}",)


def _pickled_job(system: System) -> str:
    return str(Queue("history", connection=system.redis).enqueue("os.system", f"touch {system.canary}").id)


def _with_callback(name: str, event: str) -> Callable[[System], str]:
    def enqueue(system: System) -> str:
        callback: Any = {name: Callback("canary_module.run")}
        return str(history_queue(system.redis).enqueue(SNAPSHOT, event, **callback).id)

    return enqueue


def _with_webhook(status: str, event: str) -> Callable[[System], str]:
    def enqueue(system: System) -> str:
        webhook = {"url": system.listener, "job_status": status, "method": "POST", "headers": None, "timeout": 5}
        return _put(system, f"webhook-{status}", _call(SNAPSHOT, event), webhooks=json.dumps([webhook]))

    return enqueue


_NOT_JSON = "unsupported job: its data cannot be read as JSON"
_FOREIGN = "unsupported job: it calls a function other than our job functions"
_ARGUMENT = "unsupported job: its call must have one argument, the event's text"
_MORE = "unsupported job: it asks RQ for"
_TOO_LARGE = "unsupported job: it is larger than 48 MiB"
_SHAPELESS = "unsupported job: its call is larger than 64 KiB and does not have the form [function, null, [text], {}]"

REJECTED: dict[str, tuple[Callable[[System], str], str]] = {
    "a pickled call": (_pickled_job, _NOT_JSON),
    "a pickle that runs": (lambda s: _put(s, "pickle", pickle.dumps(_Exploit(s.canary))), _NOT_JSON),
    "a compressed pickle": (lambda s: _put(s, "zpickle", zlib.compress(pickle.dumps(_Exploit(s.canary)))), _NOT_JSON),
    "a pickle as meta": (
        lambda s: _put(s, "meta", _call("os.system", "true"), meta=pickle.dumps(_Exploit(s.canary))), _FOREIGN,
    ),
    "os.system": (lambda s: _put(s, "os", _call("os.system", f"touch {s.canary}")), f"{_FOREIGN}: os.system"),
    "an attacker's module": (lambda s: _put(s, "module", _call("canary_module.run")), f"{_FOREIGN}: canary_module.run"),
    "another function of ours": (lambda s: _put(s, "ours", _call("consumers.handlers.settle", "x")), _FOREIGN),
    "almost our function": (lambda s: _put(s, "nearly", _call(f"{SNAPSHOT} ", _valid())), _FOREIGN),
    "control characters as name": (
        lambda s: _put(s, "control", _call("a\r\n\x1b[2J\0b")), rf"{_FOREIGN}: a\r\n\x1b[2J\x00b",
    ),
    "no name": (lambda s: _put(s, "none", _call({"a": 1})), _FOREIGN),
    "a method": (lambda s: _put(s, "method", _call(SNAPSHOT, _valid(), instance="x")), _ARGUMENT),
    "keywords": (lambda s: _put(s, "keywords", _call(SNAPSHOT, _valid(), x=1)), _ARGUMENT),
    "two arguments": (lambda s: _put(s, "two", _call(SNAPSHOT, _valid(), _valid())), _ARGUMENT),
    "no text": (lambda s: _put(s, "no-text", _call(SNAPSHOT, {"a": 1})), "event: must be one JSON string, not dict"),
    "a callback on success": (_with_callback("on_success", _valid()), _MORE),
    "a callback on failure": (_with_callback("on_failure", "{}"), _MORE),
    "a callback on stop": (_with_callback("on_stopped", _valid()), _MORE),
    "a webhook on success": (_with_webhook("finished", _valid()), _MORE),
    "a webhook on failure": (_with_webhook("failed", "{}"), _MORE),
    "brackets": (lambda s: _put(s, "brackets", b"[" * 1000), _NOT_JSON),
    "many brackets": (lambda s: _put(s, "many-brackets", b"[" * 1_000_000), _SHAPELESS),
    "many lists": (lambda s: _put(s, "lists", b"[" + b"[]," * 1_000_000 + b"1]"), _SHAPELESS),
    "100 MB": (lambda s: _put(s, "100MB", b'["' + b"x" * 100 * _MEGABYTE + b'"]'), _TOO_LARGE),
    "100 MB compressed": (lambda s: _put(s, "100MB-z", zlib.compress(b" " * 100 * _MEGABYTE)), _TOO_LARGE),
    "a bomb": (lambda s: _put(s, "bomb", _bomb()), _TOO_LARGE),
    "50 MB as meta": (
        lambda s: _put(s, "large-meta", _call(SNAPSHOT, _valid()), webhooks="[]", meta=b"x" * 50 * _MEGABYTE),
        _MORE,
    ),
    "44 MB of lists as webhooks": (
        lambda s: _put(s, "lists-webhooks", _call(SNAPSHOT, _valid()), webhooks=_lists()), _MORE,
    ),
    "44 MB of lists as meta": (lambda s: _put(s, "lists-meta", _call("x"), meta=_lists()), _FOREIGN),
    "44 MB of lists as dependencies": (
        lambda s: _put(s, "lists-dependencies", _call("x"), dependency_ids=_lists()), _FOREIGN,
    ),
    "50 MB as meta of an invalid event": (
        lambda s: _put(s, "invalid", _call(SNAPSHOT, "{}"), meta=b"x" * 50 * _MEGABYTE), "specversion: is missing",
    ),
    "10 MB as a text": (lambda s: _put(s, "10MB", _call(SNAPSHOT, "x" * 10 * _MEGABYTE)), "event: is larger than"),
    "deep nesting": (lambda s: _put(s, "deep", _call(ARCHIVE, _nested(100_000))), "Invalid JSON: recursion"),
    "nesting slightly too deep": (lambda s: _put(s, "deeper", _call(ARCHIVE, _nested(60))), "data.signals.0.a."),
    "too many signals": (
        lambda s: _put(s, "signals", _call(ARCHIVE, _archive_text("{}," * 500_000 + "{}"))),
        "data.signals: has more than 20000 items",
    ),
    "a huge time to live": (lambda s: _put(s, "ttl", _call("x"), failure_ttl="9" * 30, result_ttl="9" * 30), _FOREIGN),
}  # fmt: skip


def _bomb() -> bytes:
    """Return a megabyte that decompresses to a gigabyte: one compressed piece, repeated."""
    compressor = zlib.compressobj()
    start = compressor.compress(b" ") + compressor.flush(zlib.Z_FULL_FLUSH)
    piece = compressor.compress(b" " * _MEGABYTE) + compressor.flush(zlib.Z_FULL_FLUSH)
    return start + piece * 1024


def _lists() -> bytes:
    return b"[" + b"[]," * 15_500_000 + b"[]]"


def _archive_text(signals: str) -> str:
    valid = encode(event_of(an_archive(signals=[{"a": 1}]), source="x/1", sequence=None))
    return valid.replace('{"a":1}', signals)


def _nested(depth: int) -> str:
    return _archive_text('{"a":' + "[" * depth + "]" * depth + "}")


def _peak_bytes(process: subprocess.Popen[bytes]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize("attack", REJECTED)
def test_an_unsupported_or_invalid_job_is_rejected_with_a_reason(system: System, attack: str) -> None:
    """The reason is in event_outcomes and the failed registry. No code ran, memory stays low, the worker continues."""
    enqueue, reason = REJECTED[attack]
    before = _peak_bytes(system.worker)
    job_id = enqueue(system)
    until(lambda: system.outcome(job_id) is not None)
    until(lambda: history_queue(system.redis).failed_job_registry.get_job_ids() == [job_id])

    assert str(system.outcome(job_id)).startswith(reason)
    job = Job.fetch(job_id, connection=system.redis, serializer=JSONSerializer)
    result = job.latest_result()
    assert result is not None
    assert str(system.outcome(job_id)) in str(result.exc_string)
    assert system.redis.hstrlen(job.key, "data") < _MEGABYTE
    assert (system.redis.memory_usage(job.key) or 0) < 2 * _MEGABYTE
    system.assert_unaffected()
    assert _peak_bytes(system.worker) - before < 400 * _MEGABYTE
    job.delete()


# ---- keys that belong to a job of ours


def test_a_dependent_of_an_unsupported_job_is_rejected_too(system: System) -> None:
    """RQ enqueues it if it allows the failure of the first; the function that it names is not imported."""
    from rq.job import Dependency

    queue = history_queue(system.redis)
    system.redis.set("rq:suspended", 1)
    first = queue.enqueue("os.system", "true")
    waiting = queue.enqueue("canary_module.run", depends_on=Dependency([first], allow_failure=True))
    system.redis.delete("rq:suspended")
    until(lambda: system.outcome(waiting.id) is not None)
    system.assert_unaffected()
    assert str(system.outcome(waiting.id)).startswith(
        "unsupported job: it calls a function other than our job functions"
    )
    first.delete()
    waiting.delete()


@pytest.mark.parametrize("problem", ["a key of another type", "a job that cannot be read", "a zip bomb"])
def test_unusable_dependents_of_a_job_do_not_end_the_worker(system: System, problem: str) -> None:
    """The event is stored; the keys that RQ cannot read stay unchanged."""
    dependents = Job.dependents_key_for("depended-on")
    if problem == "a key of another type":
        system.redis.set(dependents, "x")
    else:
        system.redis.sadd(dependents, "dependent")
        fields: dict[Any, Any] = {"data": _call("canary_module.run"), "created_at": "garbage", "origin": "history"}
        if problem == "a zip bomb":
            fields |= {"created_at": "2026-01-01T00:00:00.0Z", "data": zlib.compress(b"x" * 200 * _MEGABYTE)}
        system.redis.hset(Job.key_for("dependent"), mapping=fields)
    before = _peak_bytes(system.worker)
    _put(system, "depended-on", _call(SNAPSHOT, _valid(1)))
    system.assert_unaffected()
    until(lambda: system.redis.hget(Job.key_for("depended-on"), "status") != b"queued")
    system.assert_unaffected()  # again, since dependents are read after the job has finished

    assert system.outcome("depended-on") is None
    assert _peak_bytes(system.worker) - before < 100 * _MEGABYTE
    system.redis.delete(dependents, Job.key_for("dependent"))


def test_a_result_ttl_that_redis_does_not_accept_delays_no_batch(system: System) -> None:
    """The event is stored, and its job is not tried again."""
    _put(system, "long-lived", _call(SNAPSHOT, _valid(2)), result_ttl="9" * 30)
    until(lambda: system.redis.hget(Job.key_for("long-lived"), "status") == b"finished")
    system.assert_unaffected()


# ---- SQL in every string

_SQL = "'; DROP TABLE portfolio_history; --"
_HOSTILE = [
    _SQL,
    '"; DROP TABLE signal_archives; --',
    "\\'; SELECT pg_sleep(60); --",
    "{1,2}",
    "NULL",
    "$1",
    ":id",
    "%s",
    "%(id)s",
]


def test_sql_in_the_strings_of_an_event_is_stored_as_it_is(system: System) -> None:
    """SQL in keys and values, at any depth, is text. The API finds it by its market."""
    signals = [a_signal(market_id=one) | {one: {one: [one]}} for one in _HOSTILE]
    event = event_of(an_archive(signals=signals, portfolio_id=3), source="x/1", sequence=None)
    history_queue(system.redis).enqueue(ARCHIVE, encode(event))
    system.assert_unaffected()

    def stored() -> Any:
        with system.store.connect() as db:
            return db.scalar(text("SELECT signals_data FROM signal_archives WHERE portfolio_id = 3"))

    until(lambda: stored() is not None)
    assert stored() == signals
    for one in _HOSTILE:
        status, body = _get(system, "/trading/signals", market_id=one)
        assert (status, [row["signal"] for row in json.loads(body)]) == (200, [signals[_HOSTILE.index(one)]])


@pytest.mark.parametrize(("member", "reason"), [("portfolio_id", "data.portfolio_id: "), ("source", "source: ")])
def test_sql_in_a_field_that_is_not_text_is_rejected(system: System, member: str, reason: str) -> None:
    document = json.loads(_valid(3))
    (document["data"] if member == "portfolio_id" else document)[member] = _SQL
    job_id = _put(system, f"sql-{member}", _call(SNAPSHOT, json.dumps(document)))
    until(lambda: system.outcome(job_id) is not None)
    assert str(system.outcome(job_id)).startswith(reason)
    system.assert_unaffected()


@pytest.mark.parametrize("name", ["limit", "portfolio_id", "since", "until", "cursor", "daily", "format"])
def test_sql_in_a_parameter_is_an_error_of_the_client(system: System, name: str) -> None:
    for value in (_SQL, "1 OR 1=1", "1; SELECT pg_sleep(60)", "-1", "99999999999999999999", "1e9", "\0", "٣"):
        status, _ = _get(system, "/trading/portfolio-history", **{name: value})
        assert status == 422 or (name, value, status) == ("portfolio_id", "-1", 200), (name, value, status)
    system.assert_unaffected()


# ---- the API


def _get(system: System, path: str, token: str | None = _TOKEN, **parameters: str) -> tuple[int, str]:
    import httpx

    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    answer = httpx.get(f"http://127.0.0.1:{system.port}{path}", params=parameters, headers=headers, timeout=10)
    return answer.status_code, answer.text


def _talk(system: System, request: bytes, *, seconds: float = 5) -> bytes:
    """Send raw bytes to the API, and return its answer up to the end of the headers or of the connection."""
    answer = b""
    with socket.create_connection(("127.0.0.1", system.port), timeout=seconds) as client:
        try:
            client.sendall(request)
            while part := client.recv(65536):
                answer += part
                if b"\r\n\r\n" in answer:
                    break
        except (ConnectionError, TimeoutError):
            pass
    return answer


def _request(line: str, *headers: str) -> bytes:
    lines = [line, "Host: localhost", f"Authorization: Bearer {_TOKEN}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


_HISTORY = "GET /trading/portfolio-history"
RAW: dict[str, tuple[bytes, set[int | None]]] = {
    "a header of a megabyte": (_request(f"{_HISTORY} HTTP/1.1", "X: " + "x" * _MEGABYTE), {431, None}),
    "an endless header": (_request(f"{_HISTORY} HTTP/1.1", "X: " + "x" * 100 * _MEGABYTE), {431, None}),
    "many headers": (_request(f"{_HISTORY} HTTP/1.1", *[f"X{n}: {n}" for n in range(100_000)]), {431, None}),
    "a long path": (_request(f"GET /{'x' * _MEGABYTE} HTTP/1.1"), {404, 414, 431, None}),
    "a long query": (_request(f"{_HISTORY}?limit={'1' * 10_000} HTTP/1.1"), {414}),
    "NUL in a header": (_request(f"{_HISTORY} HTTP/1.1", "X: a\0b"), {400}),
    "NUL in the path": (_request("GET /static/\0 HTTP/1.1"), {400}),
    "an encoded NUL": (_request("GET /%00 HTTP/1.1"), {404}),
    "an encoded line end": (_request(f"{_HISTORY}?cursor=%0d%0aSet-Cookie:%20a=b HTTP/1.1"), {422}),
    "a line end in the path": (_request("GET /x%0d%0aSet-Cookie:%20a=b HTTP/1.1"), {404}),
    "two lengths": (_request(f"{_HISTORY} HTTP/1.1", "Content-Length: 5", "Content-Length: 6"), {400}),
    "length and chunks": (
        _request(f"{_HISTORY} HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n", {400},
    ),
    "another host": (_request(f"{_HISTORY} HTTP/1.1").replace(b"localhost", b"evil.example"), {200}),
    "ranges": (_request(f"{_HISTORY} HTTP/1.1", "Range: bytes=" + ",".join(f"{n}-" for n in range(1000))), {200, 206}),
    "ranges of the page": (_request("GET /app.js HTTP/1.1", "Range: bytes=0-0,1-1"), {200, 404}),
    "TRACE": (_request("TRACE / HTTP/1.1"), {405}),
    "a body for GET": (_request(f"{_HISTORY} HTTP/1.1", "Content-Length: 5") + b"xxxxx", {200}),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 100 + b"\r\n\r\n", {400}),
    "HTTP/9.9": (_request(f"{_HISTORY} HTTP/9.9"), {400, 505}),
    "tags without end": (_request(f"{_HISTORY} HTTP/1.1", "If-None-Match: " + '"x",' * 2000), {422}),
    "Accept without end": (_request(f"{_HISTORY} HTTP/1.1", "Accept: " + "text/csv;q=9e999," * 3000), {200}),
}  # fmt: skip


@pytest.mark.parametrize("request_kind", RAW)
def test_a_malformed_request_to_the_api_has_no_effect(system: System, request_kind: str) -> None:
    """No injected header, no traceback, little memory; and the next request is answered."""
    request, allowed = RAW[request_kind]
    before = _peak_bytes(system.api)
    answer = _talk(system, request)
    status = int(answer.split()[1]) if answer.startswith(b"HTTP/1") else None
    assert status in allowed, answer[:200]
    assert b"set-cookie" not in answer.lower()
    assert b"Traceback" not in answer
    assert b"evil" not in answer
    assert _get(system, "/trading/portfolio-history", limit="1")[0] == 200
    assert _peak_bytes(system.api) - before < 20 * _MEGABYTE


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "PROPFIND"])
def test_other_methods_are_not_allowed(system: System, method: str) -> None:
    answer = _talk(system, _request(f"{method} /trading/portfolio-history HTTP/1.1"))
    assert answer.split()[1] in (b"405", b"400")


@pytest.mark.parametrize(
    "path",
    [
        "/../schema.sql", "/..%2f..%2fschema.sql", "/static/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd", "/app.js/../../queries.py", "/page/queries.py", "/..\\..\\etc\\passwd", "/app.js%00.png",
    ],
)  # fmt: skip
def test_the_api_serves_only_the_files_of_the_page(system: System, path: str) -> None:
    answer = _talk(system, _request(f"GET {path} HTTP/1.1"))
    assert answer.split()[1] in (b"404", b"400"), answer[:200]
    assert b"root:" not in answer
    assert b"SELECT" not in answer


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", "Bearer x", f"Bearer {_TOKEN}x", f"Bearer {_TOKEN[:-1]}", f"Basic {_TOKEN}",
        f"Bearer {_TOKEN.upper()}", "Bearer \xff", f"Token {_TOKEN}", f"Bearer {_TOKEN} {_TOKEN}",
    ],
)  # fmt: skip
def test_without_the_token_the_api_answers_nothing(system: System, header: str | None) -> None:
    """Nor with the token in a parameter or a cookie."""
    headers = [] if header is None else [f"Authorization: {header}"]
    lines = [f"{_HISTORY}?token={_TOKEN} HTTP/1.1", "Host: localhost", f"Cookie: token={_TOKEN}", *headers]
    answer = _talk(system, "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))
    assert answer.split()[1] == b"401", answer[:200]


def test_no_secret_is_in_a_log_or_the_process_list(system: System) -> None:
    """This runs after all the attacks, and reads the logs of our processes and every command line of the machine."""
    lines = [path.read_bytes() for path in _readable(Path("/proc").glob("[0-9]*/cmdline"))]
    logs = [(system.folder / name).read_bytes() for name in ("worker.log", "api.log")]
    assert any(b"consumers.cli" in line for line in lines)
    assert logs[0]
    for secret in (_WORKER_PASSWORD, _API_PASSWORD, _TOKEN):
        assert [one for one in [*lines, *logs] if secret.encode() in one] == []


def _readable(paths: Iterator[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            path.read_bytes()
        except OSError:
            continue  # the process has ended, or belongs to another user
        yield path
