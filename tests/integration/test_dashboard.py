"""RQ Dashboard's server: who gets in, what may be changed from where, and that no job, however harmed, stops a page."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from flask import Flask
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from consumers.db.engine import get_db
from consumers.embedded import Addresses
from producers.events import encode, event_of
from tests.dashboard_server import (
    FAILED_KEY,
    PASSWORD,
    QUEUE_KEY,
    SNAPSHOT_FUNCTION,
    Dashboard,
    dashboard_of,
    failure,
    pages,
    plant,
)
from tests.deliveries import burst, enqueue_snapshots
from tests.factories import a_snapshot, an_archive

CHANGES = (
    "job/j/delete",
    "job/j/requeue",
    "requeue/history",
    "queue/history/failed/empty",
    "queue/history/compact",
)


@pytest.fixture(scope="module")
def dashboard(pair: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    with dashboard_of(pair.redis_url, tmp_path_factory.mktemp("dashboard") / "log") as dashboard:
        yield dashboard


@pytest.fixture
def client(dashboard: Dashboard, redis: Redis) -> Iterator[httpx.Client]:
    with dashboard.client() as client:
        yield client


def _everything(redis: Redis) -> dict[Any, Any]:
    return {key: redis.dump(key) for key in redis.keys("*")}


def _call(*arguments: Any, function: str = SNAPSHOT_FUNCTION) -> bytes:
    return json.dumps([function, None, arguments, {}]).encode()


def test_nothing_is_answered_without_the_login(dashboard: Dashboard, redis: Redis) -> None:
    """No page, file, address that exists or not; only user and password together are let in."""
    plant(redis, "j", {"data": _call("x")})
    logins = (None, ("history", "wrong"), ("admin", PASSWORD), ("history", ""), ("", ""))
    odd = ("Bearer x", "Basic", "Basic !!!", "Basic eA==", "Basic /////w==")
    with httpx.Client(base_url=dashboard.url, headers={"Origin": dashboard.url[:-1]}) as stranger:
        for address in [*pages(["j"]), *CHANGES, "static/css/main.css", "no/such/page"]:
            answer = stranger.request("POST" if address in CHANGES else "GET", address)
            assert (answer.status_code, "rq" in answer.text.lower()) == (401, False), address
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        for address in ("0/data/queues.json", "static/css/main.css", "no/such/page"):
            assert {stranger.get(address, auth=login).status_code for login in logins} == {401}
            assert {stranger.get(address, headers={"Authorization": one}).status_code for one in odd} == {401}
    assert redis.exists(Job.key_for("j"))
    with dashboard.client() as client:
        assert client.get("").status_code == 200
    assert "wrong login from 127.0.0.1" in dashboard.log
    assert PASSWORD not in dashboard.log


def test_it_does_not_start_without_a_password() -> None:
    """One line that names the setting; nothing listens."""
    for value in ({}, {"HISTORY_DASHBOARD_PASSWORD": ""}):
        ended = subprocess.run(
            [sys.executable, "-m", "consumers.cli", "dashboard", "--port", "0"],
            env={**os.environ, "REDIS_URL": "redis://127.0.0.1:1", **value},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (ended.returncode, ended.stdout) == (1, "")
        assert re.fullmatch("error: HISTORY_DASHBOARD_PASSWORD is not set.*\n", ended.stderr)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_the_status_of_the_signal(pair: Addresses, tmp_path: Path, how: signal.Signals) -> None:
    """And its password is in no process list."""
    with dashboard_of(pair.redis_url, tmp_path / "log") as dashboard:
        assert PASSWORD not in " ".join(psutil.Process(dashboard.process.pid).cmdline())
        with dashboard.client() as client:
            assert client.get("").status_code == 200
        dashboard.process.send_signal(how)
        assert dashboard.process.wait(15) == 128 + how
        assert dashboard.log == ""


def test_these_are_all_addresses_that_change_something() -> None:
    """In the release of rq-dashboard that is installed."""
    from rq_dashboard.web import blueprint

    app = Flask("rq_dashboard")
    app.register_blueprint(blueprint)
    rules = {str(rule) for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())}
    matching = {re.sub("/j/", "/<job_id>/", one) for one in CHANGES}
    matching = {one.replace("history/failed", "<queue_name>/<registry_name>") for one in matching}
    assert {rule.removeprefix("/") for rule in rules} == {re.sub("/history", "/<queue_name>", one) for one in matching}


@pytest.mark.parametrize("address", CHANGES)
def test_changes_come_by_post_from_its_own_pages_only(
    client: httpx.Client, dashboard: Dashboard, redis: Redis, address: str
) -> None:
    """Another site can make a browser send the login along, and any request that a form or a link can make."""
    plant(redis, "j", {"data": _call("x"), "status": b"failed", "origin": b"history"})
    redis.rpush(QUEUE_KEY, "gone")
    before = _everything(redis)
    own = dashboard.url.rstrip("/")
    for method in ("GET", "HEAD", "OPTIONS"):
        answer = client.request(method, address)
        assert (answer.status_code, "POST" in answer.headers["Allow"], "GET" in answer.headers["Allow"]) == (
            405, True, False,
        )  # fmt: skip
    assert client.put(address).status_code == client.delete(address).status_code == 405
    foreign: list[dict[str, str]] = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": own + ".evil.example"},
        {"Origin": own.replace("http:", "https:")},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": own, "Sec-Fetch-Site": "cross-site"},
        {"Origin": own, "Sec-Fetch-Site": "same-site"},
        {"Origin": own, "Sec-Fetch-Site": "none"},
    ]
    statuses = [client.post(address, headers=headers).status_code for headers in foreign]
    bare = httpx.post(dashboard.url + address, auth=("history", PASSWORD))
    assert (statuses, bare.status_code) == ([403] * len(foreign), 403)
    assert _everything(redis) == before
    assert client.post(address, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert _everything(redis) != before


def test_under_other_names_only_that_of_its_setting(pair: Addresses, redis: Redis, tmp_path: Path) -> None:
    """On loopback. Behind a proxy the browser's origin is that of the setting."""
    url = "https://rq.example:8443/"
    with dashboard_of(pair.redis_url, tmp_path / "log", HISTORY_DASHBOARD_URL=url) as dashboard:
        port = dashboard.url.rstrip("/").rpartition(":")[2]
        hosts = (
            f"localhost:{port}",
            f"[::1]:{port}",
            "127.0.0.1",
            "rq.example:8443",
            "evil.example",
            "rq.example",
            "a b",
        )
        with dashboard.client() as client:
            statuses = [client.get("", headers={"Host": host}).status_code for host in hosts]
            plant(redis, "j", {"data": _call("x")})
            changed = client.post("job/j/delete", headers={"Origin": url.rstrip("/")})
    assert statuses == [200, 200, 200, 200, 421, 421, 421]
    assert changed.status_code == 200


def test_every_answer_keeps_browsers_from_framing_sniffing_and_storing(client: httpx.Client) -> None:
    """Errors too. Scripts run with the answer's own nonce only."""
    nonces = set()
    for address in ("", "0/data/queues.json", "no/such/page", "static/css/main.css"):
        answer = client.get(address)
        policy = answer.headers["Content-Security-Policy"]
        nonces.update(re.findall("'nonce-(.+?)'", policy))
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'none'" in policy
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "server" not in answer.headers
        if not address.startswith("static"):
            assert answer.headers["Cache-Control"] == "no-store"
    assert len(nonces) == 4


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_nothing_is_unpickled(client: httpx.Client, dashboard: Dashboard, redis: Redis, tmp_path: Path) -> None:
    """Wherever RQ keeps something serialized: call, meta, result, of a job and of the one at a worker's hand."""
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(_Trap(sprung))
    fields = {"data": trap, "meta": trap, "result": trap, "status": b"failed", "origin": b"history"}
    plant(redis, "j", fields, result={"type": b"1", "return_value": trap, "exc_string": trap})
    plant(redis, "waiting", fields, failed=False)
    redis.sadd("rq:workers", "rq:worker:w")
    redis.hset("rq:worker:w", mapping={"state": "busy", "queues": "history", "current_job": "j"})
    for address in pages(["j", "waiting"]):
        assert client.get(address).status_code == 200, address
    for address in ("job/j/requeue", "requeue/history", "job/j/delete", "queue/history/queued/empty"):
        assert client.post(address).status_code in (200, 409)
    assert "Traceback" not in dashboard.log
    assert not sprung.exists()
    pickle.loads(trap)  # the trap works
    assert sprung.exists()


def test_in_its_process_no_pickle_gets_hold_of_code(tmp_path: Path) -> None:
    """Not by RQ's defaults, and not by anybody else who might load one."""
    program = f"""if True:
        import pickle, rq
        from consumers.web.dashboard.json_only import forbid_pickle
        trap = {pickle.dumps(_NAMED)!r}
        forbid_pickle()
        assert rq.serializers.resolve_serializer() is rq.serializers.resolve_serializer("pickle")
        assert rq.serializers.resolve_serializer() is rq.serializers.JSONSerializer
        for loads in (pickle.loads, pickle._loads):
            try: loads(trap)
            except RuntimeError as error: print(error)
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "nothing is unpickled in this process\n" * 2


_NAMED = os.getcwd  # pickled by its name

_GOOD = {
    "data": b'["f", null, ["x"], {}]',
    "status": b"failed",
    "origin": b"history",
    "created_at": b"2026-11-22T17:02:46Z",
}
_JUNK = b"\x80\xff\x00\x05"
_NINES = "9" * 5000
_DEEP = "[" * 100_000 + "]" * 100_000
_ODD_EVENT = '{"type": [], "subject": {}, "time": 3, "data": {"signals": {}, "x": [null]}}'
_HARMED: dict[str, dict[str, bytes]] = {
    "binary": dict.fromkeys(("data", "status", "origin", "created_at", "description", "timeout", "meta"), _JUNK),
    "without-data": {"status": b"failed"},
    "bad-zlib": _GOOD | {"data": b"\x78\x9c\xff\xff"},
    "empty": _GOOD | {"data": b""},
    "bomb": _GOOD | {"data": zlib.compress(b" " * 60_000_000)},
    "no-array": _GOOD | {"data": b"17"},
    "short-array": _GOOD | {"data": b'["f"]'},
    "odd-types": _GOOD | {"data": b'[null, 1, {"a": 1}, 2]'},
    "no-arguments": _GOOD | {"data": b'["f", null, [], {}]'},
    "deep": _GOOD | {"data": _call(_DEEP)},
    "deep-call": _GOOD | {"data": b"[" * 100_000},
    "no-utf8": _GOOD | {"data": b'["f", null, ["\xff"], {}]'},
    "surrogates": _GOOD | {"data": _call("\ud800"), "description": b"\xed\xa0\x80"},
    "numbers": _GOOD | {"data": _call('{"data": {"a": NaN, "b": 1e999999999, "c": ' + _NINES + "}}")},
    "odd-event": _GOOD | {"data": _call(_ODD_EVENT)},
    "dates": _GOOD | {"created_at": b"yesterday", "ended_at": b"\xff", "enqueued_at": b"9999999-01-01T00:00:00Z"},
    "status": _GOOD | {"status": b"nonsense"},
    "ttl": _GOOD | {"result_ttl": b"x", "failure_ttl": b"y", "dependency_ids": b"{", "webhooks": b"{"},
    "group": _GOOD | {"group_id": b"no such group"},
}  # fmt: skip


def test_a_harmed_job_stops_no_page_and_can_be_deleted(
    client: httpx.Client, dashboard: Dashboard, redis: Redis
) -> None:
    """Each harm in the queue and in Failed, beside a good job; looking changes nothing."""
    for name, fields in _HARMED.items():
        plant(redis, name, fields, result={"type": b"\xff", "exc_string": b"\x00no base64"})
        redis.rpush(QUEUE_KEY, name)
    plant(redis, "good", _GOOD, result=failure("InvalidEvent: data.balance: no"))
    redis.set(Job.key_for("a-string"), "x")
    redis.rpush("rq:results:good-2", "x")
    plant(redis, "good-2", _GOOD)
    odd = ["a-string", "gone", "with blank", "..", "a/b", "ü"]
    for name in odd:
        redis.zadd(FAILED_KEY, {name: 2})
    redis.rpush(QUEUE_KEY, b"\xff\xfe", *odd)
    redis.zadd(FAILED_KEY, {b"\xff\xfe": 3})
    names = [*_HARMED, "good", "good-2", "a-string", "with blank"]
    before = _everything(redis)

    answers = {address: client.get(address).status_code for address in pages(names)}
    listed = client.get("0/data/jobs/history/failed/200/asc/1.json").json()["jobs"]
    missing = client.get("0/data/job/gone.json")

    exists = set(_HARMED) | {"good", "good-2", "a-string"}
    assert {a: s for a, s in answers.items() if s != 200} == {"0/data/job/with blank.json": 404}
    assert exists <= {job["id"] for job in listed}
    assert [job["exc_info"] for job in listed if job["id"] == "good"] == ["InvalidEvent: data.balance: no"]
    assert (missing.status_code, missing.text) == (404, "Redis has no job gone any more.\n")
    assert _everything(redis) == before
    requeued = {name: client.post(f"job/{name}/requeue").status_code for name in _HARMED}
    assert set(requeued.values()) <= {200, 409}
    assert {name: client.post(f"job/{name}/delete").status_code for name in names} == dict.fromkeys(names, 200)
    assert client.post("queue/history/failed/empty").status_code == 200
    assert client.post("queue/history/compact").status_code == 200
    assert (redis.zcard(FAILED_KEY), redis.llen(QUEUE_KEY)) == (0, 0)
    assert "Traceback" not in dashboard.log


def test_a_harmed_worker_or_queue_stops_no_page(client: httpx.Client, redis: Redis) -> None:
    """Names and fields that nobody would write."""
    redis.hset(
        "rq:worker:odd", mapping={"birth": "x", "pid": b"\xff", "queues": b"\xff,history", "current_job": "gone"}
    )
    redis.set("rq:worker:string", "x")
    redis.sadd("rq:workers", "rq:worker:odd", "rq:worker:string", "rq:worker:gone", b"\xff")
    redis.sadd("rq:queues", "nonsense", b"\xff", "rq:queue:<b>", QUEUE_KEY)
    redis.set("rq:queue:<b>", "no list")
    assert {address: client.get(address).status_code for address in pages([])} == dict.fromkeys(pages([]), 200)
    workers = client.get("0/data/workers.json").json()["workers"]
    assert [worker["name"] for worker in workers] == ["odd"]


def test_out_of_bounds_is_not_found(client: httpx.Client) -> None:
    """Where rq-dashboard would fail, or read the whole of a queue."""
    lists = ("queued/0/asc/1", "queued/1000000/asc/1", "queued/8/asc/0", "nonsense/8/asc/1", "queued/8/up/1",
             "queued/x/asc/1", "queued/8/asc/-1")  # fmt: skip
    addresses = [f"0/data/jobs/history/{one}.json" for one in lists] + ["1/view/queues", "99/data/workers.json"]
    assert [client.get(address).status_code for address in addresses] == [404] * len(addresses)


def test_the_lists_page_through_in_both_orders(client: httpx.Client, redis: Redis) -> None:
    """Each job once; the newest first when descending."""
    for number in range(5):
        plant(redis, str(number), _GOOD, failed=False)
        redis.zadd(FAILED_KEY, {str(number): number + 1})
    for registry in ("queued", "failed"):
        seen = {
            order: [
                job["id"]
                for page in (1, 2, 3)
                for job in client.get(f"0/data/jobs/history/{registry}/2/{order}/{page}.json").json()["jobs"]
            ]
            for order in ("asc", "dsc")
        }
        assert seen == {"asc": list("01234"), "dsc": list("43210")}
    pagination = client.get("0/data/jobs/history/failed/2/asc/2.json").json()["pagination"]
    assert (pagination["num_pages"], pagination["prev_page"]["url"], pagination["next_page"]["url"]) == (
        3, "/0/view/jobs/history/failed/2/asc/1", "/0/view/jobs/history/failed/2/asc/3",
    )  # fmt: skip


def test_a_rejected_event_is_shown_field_by_field_with_its_reason(
    client: httpx.Client, redis: Redis, database_url: str
) -> None:
    """Amounts as they were sent, digit by digit; also of a sender that described nothing."""
    text = encode(event_of(a_snapshot(), source="other/1", sequence=7)).replace('"9900.12"', '"9900.123456789"')
    queue = Queue("history", connection=redis, serializer=JSONSerializer)
    job = queue.enqueue(SNAPSHOT_FUNCTION, text)
    archive = encode(event_of(an_archive(), source="other/1", sequence=8)).replace("0.455", "0.45500000000000000001")
    second = queue.enqueue("consumers.handlers.record_signal_archive", archive)
    assert client.get(f"0/data/job/{second.id}.json").json()["text"].count("0.45500000000000000001") == 2
    burst(redis)

    told = client.get(f"0/data/job/{job.id}.json").json()
    assert told["reason"].startswith("InvalidEvent: data.balance: ")
    assert (told["status"], told["traceback"]) == ("failed", None)
    assert dict(told["data"])["balance"] == "9900.123456789"
    assert dict(told["data"])["total_value"] == "10097.37"
    assert dict(told["event"])["source"] == "other/1"
    assert told["title"] == "portfolio/1 · 2026-11-22T17:02:46.101234+00:00"
    (listed,) = client.get("0/data/jobs/history/failed/8/asc/1.json").json()["jobs"]
    assert (listed["description"], listed["exc_info"]) == (told["title"], told["reason"])
    assert dict(client.get(f"0/data/job/{second.id}.json").json()["job"])["row"] == "1"


def test_no_page_log_or_process_list_has_a_secret(
    pair: Addresses, redis: Redis, database_url: str, tmp_path: Path
) -> None:
    """Neither Redis's password nor its own, when all is well and when Redis refuses or is away."""
    redis.acl_setuser("looker", enabled=True, passwords=["+s3cr3t%/pw"], categories=["+@all"], keys=["*"])
    try:
        url = re.sub("^(unix|redis)://", r"\1://looker:s3cr3t%25%2Fpw@", pair.redis_url)
        enqueue_snapshots(redis, 1)
        shown = []
        with dashboard_of(url, tmp_path / "log") as dashboard, dashboard.client() as client:
            answers = [client.get(address) for address in pages(["x"])]
            assert {answer.status_code for answer in answers} <= {200, 404}
            redis.acl_deluser("looker")
            answers += [client.get(address) for address in pages(["x"])]
            assert answers[-1].status_code == 503
            shown = [answer.text + str(answer.headers) for answer in answers]
            shown.append(" ".join(psutil.Process(dashboard.process.pid).cmdline()))
        shown.append(dashboard.log)
    finally:
        redis.acl_deluser("looker")
    told = "\n".join(shown)
    assert [secret for secret in ("s3cr3t", PASSWORD, database_url, "looker") if secret in told] == []


def test_without_redis_it_says_so(tmp_path: Path) -> None:
    """503 and one line in place of each page."""
    with dashboard_of("redis://:s3cr3t@127.0.0.1:1/0", tmp_path / "log") as dashboard, dashboard.client() as client:
        answers = [client.get(address) for address in ("0/data/queues.json", "0/view/jobs", "0/data/workers.json")]
    assert {(answer.status_code, answer.text) for answer in answers} == {
        (503, "Redis does not answer: ConnectionError.\n")
    }
    assert "s3cr3t" not in dashboard.log


def test_a_requeued_rejection_is_stored_and_leaves_no_trace(
    client: httpx.Client, redis: Redis, database_url: str
) -> None:
    """What was in the way is gone: the worker stores it, and Failed and event_outcomes are empty."""
    text = encode(event_of(a_snapshot(), source="other/1", sequence=1))
    other = encode(event_of(a_snapshot(balance="1"), source="other/1", sequence=2))
    queue = Queue("history", connection=redis, serializer=JSONSerializer)
    for event in (text, other):
        queue.enqueue(SNAPSHOT_FUNCTION, event, failure_ttl=-1)
    burst(redis)
    assert redis.zcard(FAILED_KEY) == 1
    with get_db() as db:
        db.exec_driver_sql("DELETE FROM portfolio_history")

    assert client.post("requeue/history").json() == {"status": "OK", "count": 1}
    burst(redis)

    with get_db() as db:
        counts = db.exec_driver_sql(
            "SELECT (SELECT count(*) FROM portfolio_history), (SELECT count(*) FROM event_outcomes)"
        ).one()
    assert (tuple(counts), redis.zcard(FAILED_KEY)) == ((1, 0), 0)
