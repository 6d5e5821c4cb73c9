"""The users of consumers/deploy/redis-users.acl: each program works with its own, and no user may do more."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from fastapi.testclient import TestClient
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError
from rq import Queue
from rq.command import send_shutdown_command
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from consumers.db.engine import get_db
from consumers.errors import StoreUnavailable
from consumers.operations import get_portfolio_history
from consumers.ops import doctor
from consumers.ops.failed import discard, requeue
from consumers.ops.masking import Mask
from consumers.ops.redis_health import redis_checks
from consumers.ops.rejections import rejections
from consumers.ops.status import pipeline_status
from consumers.web.api import app
from consumers.worker import orphans
from consumers.worker.reservations import Reservations, requeue_expired
from consumers.worker.shared_state import SharedState
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redis_url import redis_client
from producers.rq_queue import in_no_list
from producers.settings import TransportSettings
from tests.dashboard_server import SNAPSHOT_FUNCTION, dashboard_of, pages
from tests.deliveries import burst, enqueue_snapshots, history_queue
from tests.factories import INSTANT, a_portfolio, a_snapshot
from tests.redis_servers import USERS, forbidden, rules_of, url_of, users
from tests.rejections import reject_conflicts
from tests.relaying import COMMAND, a_relay, states
from tests.rq_programs import end, registered_workers, until

pytestmark = pytest.mark.usefixtures("database_url")


@pytest.fixture(autouse=True)
def accounts(redis: Redis) -> Iterator[None]:
    with users(redis):
        yield


def _client(redis: Redis, user: str) -> Redis:
    return redis_client(url_of(redis, user))


def _change(redis: Redis, user: str, *rules: str) -> None:
    """Give a user the rules of the file, and then these."""
    redis.execute_command("ACL SETUSER", f"trading_history_{user}", "reset", *rules_of(user), *rules)  # type: ignore[no-untyped-call]


def test_a_controller_and_a_worker_store_reject_and_requeue(redis: Redis, tmp_path: Path) -> None:
    """Also a producer that looks for a lost job, and replays its entries after a restore of the database."""
    controller, worker = _client(redis, "controller"), _client(redis, "worker")
    with HistoryProducer(controller, outbox=tmp_path / "outbox.db") as producer:
        receipts = producer.record_many([a_snapshot(), a_snapshot(balance="1"), a_snapshot(after=timedelta(1))])
        assert producer.flush(10) == 0
        with Outbox(tmp_path / "outbox.db") as outbox:
            assert in_no_list(controller, history_queue(controller), outbox.deliveries.overdue(10)) == []
        burst(worker)
        until(lambda: [one.state for one in receipts] == ["stored", "rejected", "stored"])
        assert requeue(rejections(), worker, "history") == 1
        burst(worker)
        assert discard(rejections(), worker, "history", "known") == 1
        assert producer.resend(INSTANT - timedelta(days=365)) > 0
        assert producer.flush(10) == 0
    assert (len(get_portfolio_history()), forbidden(redis)) == (2, set())


def test_a_worker_recovers_what_others_left(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of dead workers, jobs in no list, dependents, keys of a wrong type, unusable ids and unsupported jobs."""
    monkeypatch.setattr(orphans, "ORPHAN_SECONDS", -1.0)
    worker = _client(redis, "worker")
    queue = history_queue(redis)
    first, second, third, fourth = enqueue_snapshots(redis, 4)
    texts = [Job.fetch(one, connection=redis, serializer=JSONSerializer).args[0] for one in (first, second)]
    queue.enqueue(SNAPSHOT_FUNCTION, texts[0], depends_on=first)
    queue.enqueue("os.getpid")
    dead = Reservations(worker, queue, "dead")
    assert [job.job_id for job in dead.reserve(1).jobs] == [first]
    redis.delete(*redis.keys("history:lease:*"))
    redis.lrem(queue.key, 1, second)
    redis.rpush(queue.intermediate_queue_key, second)
    redis.lrem(queue.key, 1, third)
    redis.zadd(queue.started_job_registry.key, {f"{third}:x": 1})
    redis.lrem(queue.key, 1, fourth)
    redis.rpush(queue.key, "not:an id")
    redis.set("history:timeouts:history", "not a hash")
    for _ in range(3):
        burst(worker)
        redis.delete("history:orphans:history:scanned")

    assert (sorted(row["sequence"] for row in get_portfolio_history()), queue.count) == ([0, 1, 2, 3], 0)
    assert redis.keys("history:reserved:*") == []
    assert forbidden(redis) == set()


@contextmanager
def _worker_process(redis: Redis, log: Path) -> Iterator[psutil.Popen]:
    """Run `trading-history worker` as its user, and end it with the block."""
    with log.open("wb") as output:
        process = psutil.Popen(
            [*COMMAND, "worker"], stdout=output, stderr=output, env={**os.environ, "REDIS_URL": url_of(redis, "worker")}
        )
    try:
        yield process
    finally:
        end(process)


def test_a_running_worker_can_be_suspended_and_shut_down(redis: Redis, tmp_path: Path) -> None:
    """It listens for RQ's commands, and an idle worker waits for jobs."""
    with _worker_process(redis, tmp_path / "log") as process:
        until(lambda: bool(registered_workers(redis)), 40)
        suspend(redis)
        (name,) = registered_workers(redis).values()
        until(lambda: redis.hget(f"rq:worker:{name}", "state") == b"suspended")
        resume(redis)
        enqueue_snapshots(redis, 1)
        until(lambda: len(get_portfolio_history()) == 1)
        assert redis.hget(f"rq:worker:{name}", "ip_address") != b"unknown"
        send_shutdown_command(redis, name)
        assert process.wait(20) == 0
    assert forbidden(redis) == set()


def test_a_relay_process_sends_and_settles(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
    with a_relay(tmp_path / "log", "--outbox", path, REDIS_URL=url_of(redis, "controller")):
        until(lambda: states(path) == {"sent": 1})
        burst(_client(redis, "worker"))
        until(lambda: states(path) == {"stored": 1})
    assert forbidden(redis) == set()


@pytest.mark.parametrize("user", ["controller", "worker", "reader"])
def test_status_and_doctor_can_read_the_queue(redis: Redis, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor does not know the server's settings: a controller may not run INFO, and nobody CONFIG GET."""
    enqueue_snapshots(redis, 1)
    monkeypatch.setenv("REDIS_URL", url_of(redis, user))
    values = pipeline_status()
    checks = {check.name: check for check in redis_checks(TransportSettings.from_environment(), Mask(()))}
    assert (values["redis"], values["queued"]) == ("reachable", 1)
    assert (values["capacity"]["redis_key_bytes"] is None) == (user == "controller")
    forbids = values["capacity"]["not_read"].get("Redis keys", "")
    assert forbids.startswith("Redis forbids the command memory|usage to this user: run ACL SETUSER") == (
        user == "controller"
    )
    assert (checks["queue"].state, checks["workers"].found) == ("ok", "none, but jobs wait")
    commands = ("info", "memory|usage") if user == "controller" else ("config|get",)
    assert forbidden(redis) == {(f"trading_history_{user}", "command", command) for command in commands}
    if user == "controller":
        assert checks["Redis server"].state == "unknown"
        assert "Redis forbids the command info to this user: run ACL SETUSER" in checks["Redis server"].found
    else:
        assert checks["Redis persistence"].found == "append-only file, appendfsync unknown (CONFIG is forbidden)"


def test_the_api_reads_the_state_of_the_pipeline(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", url_of(redis, "reader"))
    enqueue_snapshots(redis, 1)
    with TestClient(app) as client:
        assert client.get("/readyz").status_code == 200
        assert "trading_history_redis_up 1.0" in client.get("/metrics").text
    assert forbidden(redis) == set()


def test_the_dashboard_shows_requeues_deletes_and_empties(redis: Redis, tmp_path: Path) -> None:
    """Also the jobs of another program in another queue; it sees no key of ours."""
    for number in range(3):
        history_queue(redis).enqueue(SNAPSHOT_FUNCTION, "{}", job_id=f"bad-{number}")
    burst(redis)
    (job_id,) = enqueue_snapshots(redis, 1)
    Queue("other", connection=redis, serializer=JSONSerializer).enqueue("os.getpid", job_id="theirs")
    with dashboard_of(url_of(redis, "dashboard"), tmp_path / "log") as dashboard, dashboard.client() as client:
        answers = {page: client.get(page).status_code for page in pages([job_id, "bad-0", "theirs"])}
        assert {page for page, status in answers.items() if status != 200} == set()
        for change in (
            "job/bad-0/requeue", "job/bad-1/delete", "requeue/history", "queue/history/compact",
            "queue/history/queued/empty", "queue/history/failed/empty", "queue/other/queued/empty",
        ):  # fmt: skip
            assert client.post(change).status_code == 200, change
    assert (redis.keys("rq:job:*"), forbidden(redis)) == ([], set())


@pytest.mark.parametrize(
    ("user", "command"),
    [
        *((user, command) for user in USERS for command in ("FLUSHALL", "CONFIG GET requirepass", "KEYS *",
                                                           "ACL WHOAMI", "GET another", "SHUTDOWN")),
        ("controller", "HSET history:owners:history x alone"),
        ("controller", "LRANGE rq:queue:other 0 -1"),
        ("controller", "EVAL 'return 1' 0"),
        ("worker", "LRANGE rq:queue:other 0 -1"),
        ("dashboard", "HGET history:ack:x y"),
        ("dashboard", "SET history:outbox:x y"),
        ("reader", "HSET rq:job:x status queued"),
        ("reader", "DEL rq:job:x"),
        ("reader", "RPUSH rq:queue:history x"),
    ],
)  # fmt: skip
def test_a_user_may_not_do_more(redis: Redis, user: str, command: str) -> None:
    with _client(redis, user) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command.split(" "))


@pytest.mark.parametrize("user", USERS)
def test_the_commands_of_a_user_are_sorted(user: str) -> None:
    """So that a difference is easy to see; none is there twice."""
    commands = [rule for rule in rules_of(user) if rule.startswith("+")]
    assert commands == sorted(set(commands))


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        (["-blmove"], "Redis forbids the command blmove to this user: run ACL SETUSER <user> +blmove"),
        (["-evalsha"], "Redis forbids the command evalsha to this user: run ACL SETUSER <user> +evalsha"),
        (["-hset"], "Redis forbids "),
        (["-lmove"], "Redis forbids "),
        (["-scan"], "Redis forbids the command scan to this user: run ACL SETUSER <user> +scan"),
        (["resetchannels"], "Redis forbids a channel to this user: run ACL SETUSER <user> '&rq:pubsub:*'"),
        (["resetkeys", "~rq:worker*", "~rq:queue:*", "~history:*"], "Redis forbids a key to this user: ACL LOG names"),
        (["-client"], "RQ's list will not show its address, because Redis forbids CLIENT"),
    ],
)
def test_a_worker_names_what_is_forbidden_and_continues(
    redis: Redis, rules: list[str], line: str, tmp_path: Path
) -> None:
    """It neither ends nor rejects an event. As soon as the rule is there, the event is stored."""
    log = tmp_path / "log"
    _change(redis, "worker", *rules)
    with _worker_process(redis, log) as process:
        until(lambda: line in log.read_text(), 40)
        enqueue_snapshots(redis, 1)
        _change(redis, "worker")
        until(lambda: len(get_portfolio_history()) == 1, 40)
        assert process.poll() is None
    assert "Traceback" not in log.read_text()
    with get_db() as db:
        assert db.exec_driver_sql("SELECT count(*) FROM event_outcomes WHERE outcome = 'rejected'").scalar() == 0


@pytest.mark.parametrize("command", ["xadd", "hget"])
def test_a_worker_that_may_not_write_rqs_records_of_jobs_says_so_once(
    redis: Redis, tmp_path: Path, command: str
) -> None:
    """In one line a minute: the events are stored and rejected all the same, and no job is lost."""
    log, line = tmp_path / "log", f"Redis forbids the command {command} to this user: run ACL SETUSER <user> +{command}"
    queue = history_queue(redis)
    with _worker_process(redis, log):
        until(lambda: "Listening" in log.read_text(), 40)
        enqueue_snapshots(redis, 3)
        until(lambda: len(get_portfolio_history()) == 3)
        if command == "hget":  # the worker then has more finished jobs than it keeps
            redis.zadd(queue.finished_job_registry.key, {f"old-{n}": 4_000_000_000 for n in range(1000)})
        _change(redis, "worker", f"-{command}")
        for number in range(4):
            enqueue_snapshots(redis, 1, first=3 + number)
            queue.enqueue(SNAPSHOT_FUNCTION, "{}", job_id=f"bad-{number}")
            until(lambda expected=number + 4: len(get_portfolio_history()) == expected)  # type: ignore[misc]  # not inferred
            until(lambda expected=number + 1: queue.failed_job_registry.count == expected)  # type: ignore[misc]  # not inferred
        until(lambda: queue.count == 0 and redis.keys("history:reserved:*") == [])
    assert log.read_text().count("cannot write RQ's records of their jobs") == 1
    assert line in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_forbidden_count_of_crashes_is_reported_and_changes_nothing(redis: Redis) -> None:
    """It would stay at 1, and the event would never count as poison."""
    (job_id,) = enqueue_snapshots(redis, 1)
    worker, queue = _client(redis, "worker"), history_queue(redis)
    dead = Reservations(worker, queue, "dead")
    assert [job.job_id for job in dead.reserve(1).jobs] == [job_id]
    dead.run_alone()
    redis.hset("history:crashes:history", job_id, 1)
    redis.delete(*redis.keys("history:lease:*"))
    _change(redis, "worker", "-hincrby")
    with pytest.raises(ResponseError, match="no permissions to run the 'hincrby' command"):
        requeue_expired(worker, queue)
    assert (queue.count, redis.hget("history:crashes:history", job_id)) == (0, b"1")
    _change(redis, "worker")
    assert requeue_expired(worker, queue) == [job_id]
    assert redis.hget("history:crashes:history", job_id) == b"2"


def test_a_requeue_that_may_not_read_jobs_changes_nothing(redis: Redis) -> None:
    """A job that cannot be read must not be taken for a lost one, which would be made anew."""
    reject_conflicts(redis, 1)
    _change(redis, "worker", "-hkeys")
    with pytest.raises(NoPermissionError):
        requeue(rejections(), _client(redis, "worker"), "history")
    assert (history_queue(redis).count, history_queue(redis).failed_job_registry.count) == (0, 1)


def test_a_worker_that_may_not_quarantine_a_key_waits_until_it_may(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noted = SharedState.note_outage

    def allow(shared: SharedState, error: RedisError | StoreUnavailable) -> None:
        noted(shared, error)
        _change(redis, "worker")

    enqueue_snapshots(redis, 1)
    redis.set("history:crashes:history", "no hash")
    _change(redis, "worker", "-rename")
    monkeypatch.setattr(SharedState, "note_outage", allow)
    burst(_client(redis, "worker"))
    assert (len(get_portfolio_history()), redis.get("history:crashes:history:quarantined")) == (1, b"no hash")
    assert "waits for Redis and tries again" in caplog.text


def test_a_worker_that_may_not_remove_its_registration_ends_with_a_warning(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    enqueue_snapshots(redis, 1)
    _change(redis, "worker", "-srem")
    burst(_client(redis, "worker"))
    assert len(get_portfolio_history()) == 1
    assert caplog.messages[-1].endswith(
        " could not remove its registration, which expires within 2 minutes: NoPermissionError"
    )


def test_a_relay_names_what_is_forbidden_and_continues(
    redis: Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _change(redis, "controller", "-rpush")
    with HistoryProducer(_client(redis, "controller"), outbox=tmp_path / "outbox.db") as producer:
        producer.record(a_snapshot())
        until(lambda: "run ACL SETUSER <user> +rpush" in caplog.text)
        _change(redis, "controller")
        assert producer.flush(20) == 0
    (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING and "cannot" in one.msg]
    assert line.startswith(f"cannot relay {tmp_path / 'outbox.db'}: NoPermissionError: Redis forbids the command rpush")


def test_a_command_names_what_is_forbidden(redis: Redis) -> None:
    """In one line, with exit status 1."""
    _change(redis, "reader", "-llen")
    environment = {**os.environ, "REDIS_URL": url_of(redis, "reader")}
    for command in ("status", "doctor"):
        ran = subprocess.run(
            [*COMMAND, command],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        found = [line for line in (ran.stdout + ran.stderr).splitlines() if "Redis forbids the command llen" in line]
        assert (ran.returncode, len(found), "Traceback" in ran.stderr) == (1, 1, False), ran


@pytest.mark.parametrize("user", ["controller", "worker"])
def test_doctor_on_a_host_with_an_outbox_fails_for_no_user(
    redis: Redis, user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outbox may be beside a worker, too. No advice asks for a rule that no user may have."""
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    with HistoryProducer(_client(redis, "controller"), outbox=tmp_path / "outbox.db") as producer:
        producer.record(a_snapshot())
        assert producer.flush(10) == 0
    monkeypatch.setenv("REDIS_URL", url_of(redis, user))
    checks = doctor.diagnose(list)
    assert [one for one in checks if one.state == "fail" and one.name != "workers"] == []
    assert {one.found for one in checks if one.name == "outbox copies"} == {"no other copy found"}
    assert not any("CONFIG GET" in one.advice for one in checks)


def test_doctor_names_the_rule_that_its_user_lacks(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not call a missing rule or a wrong setting a bug."""
    monkeypatch.setenv("REDIS_URL", url_of(redis, "dashboard"))
    (failed,) = [one for one in doctor.diagnose(list) if one.state == "fail"]
    assert (failed.name, failed.found[:49]) == ("Redis", "Redis forbids the command ping to this user: run ")
    assert failed.advice.startswith("add this rule, or run doctor as one of the users in consumers/deploy/redis-users")
    monkeypatch.setenv("HISTORY_QUEUE", "a b")
    wrong = [one for one in doctor.diagnose(list) if one.state == "fail"]
    assert {one.advice for one in wrong} == {"correct it in the environment or in .env"}


def test_commands_that_wait_say_that_redis_forbids_to_send(redis: Redis, tmp_path: Path) -> None:
    """Their last line has the command and the rule, and does not ask for a worker."""
    _change(redis, "controller", "-rpush")
    environment = {
        **os.environ, "REDIS_URL": url_of(redis, "controller"), "HISTORY_OUTBOX": str(tmp_path / "outbox.db")
    }  # fmt: skip
    for command in (["snapshot", "-", "--wait", "2"], ["outbox", "flush", "--timeout", "2"]):
        run = subprocess.run(
            [*COMMAND, *command], input=json.dumps(a_portfolio()), env=environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        last = run.stderr.splitlines()[-1]
        assert run.returncode == 1
        assert "Redis forbids the command rpush to this user: run ACL SETUSER <user> +rpush" in last, run.stderr
        assert "Start one" not in run.stderr
