"""The server of RQ Dashboard: its login, the origin of changes, jobs that RQ cannot read, and no pickle."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib
from base64 import b64encode
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
from rq.utils import as_text

from consumers.db.engine import engine, get_db
from consumers.embedded import Addresses
from consumers.operations import get_portfolio_history
from producers.events import encode, event_of
from producers.history_producer import HistoryProducer
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
from tests.factories import a_snapshot

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


def test_the_dashboard_answers_nothing_without_the_login(dashboard: Dashboard, redis: Redis) -> None:
    """No page, file or unknown address. Only the right user with the right password is accepted."""
    plant(redis, "j", {"data": _call("x")})
    logins = (None, ("history", "wrong"), ("admin", PASSWORD), ("history", ""), ("", ""))
    odd = ("Bearer x", "Basic", "Basic !!!", "Basic eA==", "Basic /////w==")
    with httpx.Client(base_url=dashboard.url, headers={"Origin": dashboard.url[:-1]}) as anonymous:
        for address in [*pages(["j"]), *CHANGES, "static/css/main.css", "no/such/page"]:
            answer = anonymous.request("POST" if address in CHANGES else "GET", address)
            assert (answer.status_code, "rq" in answer.text.lower()) == (401, False), address
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        for address in ("0/data/queues.json", "static/css/main.css", "no/such/page"):
            assert {anonymous.get(address, auth=login).status_code for login in logins} == {401}
            assert {anonymous.get(address, headers={"Authorization": one}).status_code for one in odd} == {401}
    assert redis.exists(Job.key_for("j"))
    with dashboard.client() as client:
        assert client.get("").status_code == 200
    assert "login failed: wrong user or password from 127.0.0.1" in dashboard.log
    assert PASSWORD not in dashboard.log


def test_the_dashboard_does_not_start_without_a_password() -> None:
    """The error names the setting in one line."""
    for value in ({}, {"HISTORY_DASHBOARD_PASSWORD": ""}):
        ended = subprocess.run(
            [sys.executable, "-m", "consumers.cli", "dashboard", "--port", "0"],
            env={**os.environ, "REDIS_URL": "redis://127.0.0.1:1", **value},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (ended.returncode, ended.stdout) == (1, "")
        assert re.fullmatch("error: HISTORY_DASHBOARD_PASSWORD is not set.*\n", ended.stderr)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_status_of_the_dashboard_names_the_signal_that_stopped_it(
    pair: Addresses, tmp_path: Path, how: signal.Signals
) -> None:
    """Its command line does not contain the password."""
    with dashboard_of(pair.redis_url, tmp_path / "log") as dashboard:
        assert PASSWORD not in " ".join(psutil.Process(dashboard.process.pid).cmdline())
        with dashboard.client() as client:
            assert client.get("").status_code == 200
        dashboard.process.send_signal(how)
        assert dashboard.process.wait(15) == 128 + how
        assert dashboard.log == ""


def test_the_dashboard_warns_at_an_address_that_other_hosts_can_reach(pair: Addresses, tmp_path: Path) -> None:
    """It serves no TLS itself."""
    with dashboard_of(pair.redis_url, tmp_path / "log", "--host", "0.0.0.0") as dashboard, dashboard.client() as client:
        assert client.get("").status_code == 200
        assert dashboard.log == "The password is sent unencrypted: put a TLS proxy in front of this server.\n"


def test_the_list_of_changing_addresses_is_complete() -> None:
    """For the installed release of rq-dashboard."""
    from rq_dashboard.web import blueprint

    app = Flask("rq_dashboard")
    app.register_blueprint(blueprint)
    rules = {str(rule) for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())}
    matching = {re.sub("/j/", "/<job_id>/", one) for one in CHANGES}
    matching = {one.replace("history/failed", "<queue_name>/<registry_name>") for one in matching}
    assert {rule.removeprefix("/") for rule in rules} == {re.sub("/history", "/<queue_name>", one) for one in matching}


@pytest.mark.parametrize("address", CHANGES)
def test_a_change_must_be_a_post_from_its_own_pages(
    client: httpx.Client, dashboard: Dashboard, redis: Redis, address: str
) -> None:
    """A page of another site can make a browser send requests with the login."""
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


def _walk(client: httpx.Client) -> dict[tuple[str, str], httpx.Response]:
    """Send each method to each rule of the installed rq-dashboard that changes something, and return the answers."""
    from rq_dashboard.web import blueprint

    app = Flask("rq_dashboard")
    app.register_blueprint(blueprint)
    changing = [rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())]
    addresses = [
        str(rule).replace("<job_id>", "j").replace("<queue_name>", "history").replace("<registry_name>", registry)
        for rule in changing
        for registry in (("queued", "failed") if "<registry_name>" in str(rule) else ("",))
    ]
    methods = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
    return {(method, address): client.request(method, address) for address in addresses for method in methods}


def test_a_read_only_dashboard_refuses_every_change_in_one_line(pair: Addresses, redis: Redis, tmp_path: Path) -> None:
    """With the login and from its own pages. All pages answer, and reading them changes nothing in Redis either."""
    plant(redis, "j", _FAILED, result=failure("InvalidEvent: no"))
    plant(redis, "waiting", _FAILED | {"status": b"queued"}, failed=False)
    redis.rpush(QUEUE_KEY, "gone")
    redis.zadd(FAILED_KEY, {"gone": 2})
    redis.sadd("rq:workers", "rq:worker:gone")
    before = _everything(redis)
    with dashboard_of(pair.redis_url, tmp_path / "log", HISTORY_DASHBOARD_READONLY="1") as dashboard:
        assert httpx.get(dashboard.url).status_code == httpx.post(f"{dashboard.url}job/j/delete").status_code == 401
        with dashboard.client() as client:
            answers = _walk(client)
            shown = {address: client.get(address).status_code for address in pages(["j", "waiting"])}
            others = {method: client.request(method, "no/such/page") for method in ("POST", "PUT", "DELETE", "PATCH")}
    assert len({address for _, address in answers}) == 6
    changes = [answer for (method, _), answer in answers.items() if method in ("POST", "PUT", "PATCH", "DELETE")]
    changes += [answers["GET", "/requeue/history"], *others.values()]
    assert {answer.status_code for answer in changes} == {403}
    assert {answer.status_code for answer in answers.values()} == {403, 405}  # 405: a GET of what takes only POST
    assert {answer.text for answer in changes} == {
        "Nothing was changed: HISTORY_DASHBOARD_READONLY makes this dashboard read-only."
        " To requeue or discard a job, use trading-history failed.\n"
    }
    assert set(shown.values()) == {200}
    assert _everything(redis) == before
    assert dashboard.log == ""


@pytest.mark.parametrize(("value", "status"), [("0", 200), ("false", 200), ("true", 403)])
def test_the_setting_of_a_read_only_dashboard_is_a_boolean(
    pair: Addresses, redis: Redis, tmp_path: Path, value: str, status: int
) -> None:
    plant(redis, "j", _FAILED)
    with (
        dashboard_of(pair.redis_url, tmp_path / "log", HISTORY_DASHBOARD_READONLY=value) as dashboard,
        dashboard.client() as client,
    ):
        assert client.post("job/j/requeue").status_code == status


def test_other_host_names_are_rejected_except_that_of_the_setting(
    pair: Addresses, redis: Redis, tmp_path: Path
) -> None:
    """On loopback. Behind a proxy, the browser's origin is that of the setting."""
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
            plant(redis, "j", _FAILED)
            changed = client.post("job/j/delete", headers={"Origin": url.rstrip("/")})
    assert statuses == [200, 200, 200, 200, 421, 421, 421]
    assert changed.status_code == 200


def test_answers_have_headers_against_framing_sniffing_and_storing(client: httpx.Client) -> None:
    """Errors too. The policy allows only the inline script of the page's template."""
    hashes = set()
    for address in ("", "0/data/queues.json", "no/such/page", "static/css/main.css"):
        answer = client.get(address)
        policy = answer.headers["Content-Security-Policy"]
        (scripts,) = re.findall("script-src (.+?);", policy)
        hashes.add(scripts.replace("'self' 'unsafe-eval'", "").strip())
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'none'" in policy
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "server" not in answer.headers
        if not address.startswith("static"):
            assert answer.headers["Cache-Control"] == "no-store"
    (of_the_page,) = hashes - {""}
    assert re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", of_the_page)


class _Trap:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickled_job_breaks_no_page_and_runs_nothing(
    client: httpx.Client, dashboard: Dashboard, redis: Redis, tmp_path: Path
) -> None:
    """Call, meta and results of another program's jobs, next to a JSON job."""
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(_Trap(sprung))
    fields = {"data": zlib.compress(trap), "meta": trap, "result": trap, "status": b"failed", "origin": b"history"}
    plant(redis, "pickled", fields, result=failure("ValueError: no") | {"return_value": b64encode(trap)})
    plant(redis, "stored", fields, result={"type": b"1", "return_value": b64encode(trap)})
    plant(redis, "waiting", fields, failed=False)
    plant(redis, "ours", _FAILED, result=failure("InvalidEvent: no"))

    answers = {address: client.get(address) for address in pages(["pickled", "stored", "waiting", "ours"])}
    assert {address for address, answer in answers.items() if answer.status_code != 200} == set()
    listed = answers["0/data/jobs/history/failed/200/asc/1.json"].json()["jobs"]
    assert {job["id"] for job in listed} == {"pickled", "stored", "ours"}
    assert answers["0/data/job/stored.json"].json()["result"] == f"({len(trap)} bytes that are not JSON)"

    assert client.post("job/pickled/requeue").json() == {"status": "OK"}
    job: Any = redis.hgetall(Job.key_for("pickled"))
    assert (job[b"status"], zlib.decompress(job[b"data"]), job[b"meta"]) == (b"queued", trap, trap)
    for address in ("requeue/history", "job/stored/delete", "queue/history/queued/empty"):
        assert client.post(address).status_code == 200
    assert (redis.keys("rq:job:*"), "Traceback" in dashboard.log, sprung.exists()) == ([], False, False)
    pickle.loads(trap)  # the trap works
    assert sprung.exists()


def test_pickle_is_disabled_in_the_process_of_the_dashboard(tmp_path: Path) -> None:
    """For RQ's default serializer and for any other code."""
    program = f"""if True:
        import pickle, rq
        from consumers.web.dashboard.json_only import forbid_pickle
        trap = {pickle.dumps(_NAMED)!r}
        forbid_pickle()
        assert rq.serializers.resolve_serializer() is rq.serializers.resolve_serializer("pickle")
        assert rq.serializers.resolve_serializer().dumps([1]) == b"[1]"
        for loads in (pickle.loads, pickle._loads):
            try: loads(trap)
            except RuntimeError as error: print(error)
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "pickle is disabled in this process\n" * 2


_NAMED = os.getcwd  # pickled by its name

_FAILED = {
    "data": b'["f", null, ["x"], {}]',
    "status": b"failed",
    "origin": b"history",
    "created_at": b"2026-11-22T17:02:46Z",
}


def test_every_page_answers_while_a_stock_worker_is_busy_with_a_pickled_job(
    client: httpx.Client, redis: Redis, pair: Addresses
) -> None:
    """The page of workers shows that the call is not JSON."""
    job = Queue("other", connection=redis).enqueue(time.sleep, 60)
    command = [str(Path(sys.executable).with_name("rq")), "worker", "other", "--url", pair.redis_url]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not job.is_started:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answers = {address: client.get(address) for address in pages([job.id])}
    finally:
        for child in psutil.Process(worker.pid).children():
            child.kill()
        worker.kill()
        worker.wait()
    assert {address for address, answer in answers.items() if answer.status_code != 200} == set()
    (listed,) = answers["0/data/workers.json"].json()["workers"]
    assert listed["current_job"]["call_string"].endswith(" bytes that are not JSON)()")


def test_one_job_that_rq_cannot_read_breaks_its_list_and_no_other_page(
    client: httpx.Client, redis: Redis, dashboard: Dashboard
) -> None:
    """Its list answers with an error, as documented. When the key is deleted, the list works again."""
    plant(redis, "ours", _FAILED, result=failure("InvalidEvent: no"))
    redis.zadd(FAILED_KEY, {"a-string": 2})
    redis.set(Job.key_for("a-string"), "x")
    address = "0/data/jobs/history/failed/200/asc/1.json"
    assert client.get(address).status_code == 503
    redis.delete(Job.key_for("a-string"))
    plant(redis, "odd-status", _FAILED | {"status": b"nonsense"})
    answer = client.get(address)
    assert (answer.status_code, answer.headers["Content-Type"]) == (500, "text/plain; charset=utf-8")
    assert "GET /0/data/jobs/history/failed/200/asc/1.json failed" in dashboard.log
    for other in ("", "0/data/queues.json", "0/data/jobs/history/queued/200/asc/1.json", "0/data/job/ours.json"):
        assert client.get(other).status_code == 200
    redis.delete(Job.key_for("odd-status"))
    assert [job["id"] for job in client.get(address).json()["jobs"]] == ["ours"]


def test_a_job_that_is_gone_or_not_failed_gives_404_or_409(
    client: httpx.Client, redis: Redis, dashboard: Dashboard
) -> None:
    """Nothing is logged."""
    before = dashboard.log
    plant(redis, "waiting", _FAILED | {"status": b"queued"}, failed=False)
    statuses = [client.get("0/data/job/gone.json").status_code, client.post("job/waiting/requeue").status_code]
    assert (statuses, dashboard.log) == ([404, 409], before)


def test_the_page_of_jobs_opens_with_the_queue_of_the_settings(client: httpx.Client, redis: Redis) -> None:
    """rq-dashboard's default is the queue `default`."""
    assert 'id="select-queue" title="Queue name" value="history"' in client.get("0/view/jobs").text


@pytest.mark.parametrize("asked", ["", "ops/rq/"])
def test_the_dashboard_works_under_the_path_of_a_proxy(
    pair: Addresses, redis: Redis, tmp_path: Path, asked: str
) -> None:
    """All addresses in its pages begin with the path of the setting. The proxy may keep or remove this path."""
    plant(redis, "j", _FAILED)
    url = "https://rq.example/ops/rq/"
    headers = {"Host": "rq.example", "Origin": "https://rq.example"}
    passed_on = str.strip if asked else (lambda address: address.removeprefix("/ops/rq"))
    behind = dashboard_of(pair.redis_url, tmp_path / "log", HISTORY_DASHBOARD_URL=url)
    with behind as dashboard, dashboard.client() as client:
        client.headers.update(headers)
        shown = [client.get(asked + page).text for page in ("", "0/view/queues", "0/view/jobs", "0/view/job/j")]
        addresses = {one for page in shown for one in re.findall('(?:href|src)="(/[^"]*)', page)}
        addresses.add(client.get(asked + "0/data/queues.json").json()["queues"][0]["failed_url"])
        changing = {one for one in addresses if one.endswith(("/empty", "/compact"))}
        statuses = {address: client.get(passed_on(address)).status_code for address in addresses}
        changed = client.post(asked + "job/j/delete").json()
    assert {address for address in addresses if not address.startswith("/ops/rq/")} == set()
    assert statuses == dict.fromkeys(addresses - changing, 200) | dict.fromkeys(changing, 405)
    assert all('var url = "/ops/rq/"' in page for page in shown)
    assert (len(changing), changed, redis.exists(Job.key_for("j"))) == (2, {"status": "OK"}, 0)


def test_pages_log_and_command_line_contain_no_password(
    pair: Addresses, redis: Redis, database_url: str, tmp_path: Path
) -> None:
    """Neither that of Redis nor its own, also when Redis rejects the login."""
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
    text = "\n".join(shown)
    assert [secret for secret in ("s3cr3t", PASSWORD, database_url, "looker") if secret in text] == []


def test_without_redis_pages_answer_503(tmp_path: Path) -> None:
    """With one line of text."""
    with dashboard_of("redis://:s3cr3t@127.0.0.1:1/0", tmp_path / "log") as dashboard, dashboard.client() as client:
        answers = [client.get(address) for address in ("0/data/queues.json", "0/view/jobs", "0/data/workers.json")]
    assert {(answer.status_code, answer.text) for answer in answers} == {(503, "Redis failed: ConnectionError.\n")}
    assert "s3cr3t" not in dashboard.log


def test_a_requeued_rejection_is_stored_and_no_longer_listed(
    client: httpx.Client, redis: Redis, database_url: str
) -> None:
    """Without the conflicting row the worker stores it. Then Failed and event_outcomes are empty."""
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


@pytest.mark.parametrize("killed", [False, True])
def test_a_job_that_is_deleted_while_a_worker_has_it_is_stored_nevertheless(
    client: httpx.Client, redis: Redis, database_url: str, producer: HistoryProducer, killed: bool
) -> None:
    """A worker stores the event that it has read. If it is killed, the outbox sends the event again."""
    with engine().begin() as blocker:
        blocker.exec_driver_sql("LOCK TABLE portfolio_history")
        receipt = producer.record(a_snapshot())
        worker = _start_worker()
        try:
            assert client.post(f"job/{_reserved_job(redis)}/delete").json() == {"status": "OK"}
            if killed:
                worker.kill()
                worker.wait()
                worker = _start_worker()
            blocker.rollback()
            row = receipt.wait(40)
        finally:
            worker.terminate()
            assert worker.wait(20) == 0
    assert [one["id"] for one in get_portfolio_history()] == [row]
    with get_db() as db:
        assert db.exec_driver_sql("SELECT count(*) FROM event_outcomes WHERE outcome <> 'duplicate'").scalar() == 0


def _start_worker() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "consumers.cli", "worker"], stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )


def _reserved_job(redis: Redis) -> str:
    deadline = time.monotonic() + 20
    while redis.exists(QUEUE_KEY) or not redis.exists("rq:workers") or not (keys := redis.keys("rq:job:*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (key,) = keys
    return as_text(key).removeprefix("rq:job:")
