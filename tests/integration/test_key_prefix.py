"""RQ_KEY_PREFIX: with another prefix of RQ's keys, every key of ours has it too, or a program says why it has not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq.defaults import RQ_KEY_PREFIX
from rq.utils import as_text

from consumers.operations import get_portfolio_history
from producers.redis_keys import KEY_PREFIX
from tests.dashboard_server import dashboard_of
from tests.factories import a_portfolio
from tests.redis_servers import USERS, USERS_FILE, forbidden, rules_of, url_of, users
from tests.relaying import a_relay, states
from tests.rq_programs import rq_process, until

_PREFIX: dict[str, Any] = {"RQ_KEY_PREFIX": "{app}:one"}
_SNAPSHOT = ("snapshot", "-", "--timestamp")


def _run(*arguments: str, stdin: object = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "consumers.cli", *arguments],
        input=json.dumps(stdin),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_all_keys_have_the_prefix(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """Recording, storing, rejecting, requeueing and reading work, and a worker without the prefix sees no job."""
    ours = a_portfolio()
    for portfolio in (ours, {**ours, "balance": 1}):
        assert _run(*_SNAPSHOT, "2026-11-22T17:00:00", stdin=portfolio, **_PREFIX).returncode == 0
    assert _run("worker", "--burst").returncode == 0
    assert get_portfolio_history() == []
    queued = json.loads(_run("status", "--json", **_PREFIX).stdout)["queued"]
    worked = _run("worker", "--burst", **_PREFIX)
    requeued = _run("failed", "requeue", "--all", **_PREFIX)
    again = _run("worker", "--burst", **_PREFIX)
    flushed = _run("outbox", "flush", **_PREFIX)

    assert queued == 2
    assert [one.returncode for one in (worked, requeued, again, flushed)] == [0, 0, 0, 0], (requeued, flushed)
    assert len(get_portfolio_history()) == 1
    # The worker without the prefix has left these.
    others = {as_text(key) for key in redis.keys("*") if not as_text(key).startswith(("{app}:one:", "rq:worker:"))}
    assert others == {"history:orphans:history:scanned"}
    assert "{app}:one:history:orphans:history:scanned" in map(as_text, redis.keys("*"))
    with dashboard_of(os.environ["REDIS_URL"], tmp_path / "log", **_PREFIX) as dashboard, dashboard.client() as client:
        assert [one["name"] for one in client.get("0/data/queues.json").json()["queues"]] == ["history"]


def test_a_stock_worker_and_a_relay_use_the_prefix(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """The stock worker acknowledges where the relay looks. A relay without the prefix is refused."""
    path = tmp_path / "outbox.db"
    recorded = _run(*_SNAPSHOT, "2026-11-22T17:00:00", stdin=a_portfolio(), HISTORY_OUTBOX=str(path), **_PREFIX)
    assert recorded.returncode == 0
    refused = _run("relay", "--outbox", str(path))
    with a_relay(tmp_path / "log", "--outbox", path, **_PREFIX), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RQ_KEY_PREFIX", _PREFIX["RQ_KEY_PREFIX"])
        with rq_process("worker", "--serializer", "json", "--burst", "history", log=tmp_path / "worker") as process:
            assert process.wait(60) == 0
        until(lambda: states(path) == {"stored": 1})
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert ", key prefix {app}:one, queue history, and not to database 0 on" in refused.stderr


def test_the_file_of_users_with_the_prefix_allows_the_same(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """The rules are changed as the first lines of redis-users.acl say."""
    text = USERS_FILE.read_text("utf-8")
    assert "replace every rq: by VALUE: and every ~history: by ~VALUE:history:" in text.replace("\n# ", " ")
    with users(redis):
        for user in USERS:
            rules = [rule.replace("rq:", "{app}:one:").replace("~history:", "~{app}:one:history:")
                     for rule in rules_of(user)]  # fmt: skip
            redis.execute_command("ACL SETUSER", f"trading_history_{user}", "reset", *rules)  # type: ignore[no-untyped-call]
        controller, worker, reader = (
            {**_PREFIX, "REDIS_URL": url_of(redis, user)} for user in ("controller", "worker", "reader")
        )
        assert _run(*_SNAPSHOT, "2026-11-22T17:00:00", stdin=a_portfolio(), **controller).returncode == 0
        assert _run("worker", "--burst", **worker).returncode == 0
        assert _run("outbox", "flush", **controller).returncode == 0
        assert json.loads(_run("status", "--json", **reader).stdout)["redis"] == "reachable"
        assert len(get_portfolio_history()) == 1
        assert forbidden(redis) == set()


def test_the_prefix_is_the_one_that_rq_has_read() -> None:
    assert (KEY_PREFIX or "rq") == RQ_KEY_PREFIX


@pytest.mark.parametrize(
    ("dotenv", "environment", "message"),
    [
        (
            "app",
            {},
            "RQ_KEY_PREFIX: RQ does not read .env: remove RQ_KEY_PREFIX from .env and export it in the environment",
        ),
        ("", {"RQ_KEY_PREFIX": "a b"}, "Invalid RQ_KEY_PREFIX 'a b': only letters, digits, and"),
        ("", {"RQ_KEY_PREFIX": ""}, "RQ_KEY_PREFIX is empty, which RQ does not accept: unset it"),
    ],
)
@pytest.mark.usefixtures("redis", "database_url")
def test_a_prefix_that_cannot_be_followed_is_an_error(
    tmp_path: Path, dotenv: str, environment: dict[str, str], message: str
) -> None:
    """In one line, by each command that uses Redis. RQ reads the variable, and we cannot read it for RQ."""
    (tmp_path / ".env").write_text(f"RQ_KEY_PREFIX={dotenv}\n" if dotenv else "")
    for arguments in (["worker", "--burst"], ["status"], ["relay"], [*_SNAPSHOT, "2026-11-22T17:00:00"]):
        ran = _run(*arguments, stdin=a_portfolio(), **environment)
        assert (ran.returncode, ran.stderr.count("\n")) == (1, 1), (arguments, ran.stderr)
        assert ran.stderr.startswith(f"error: {message}"), ran.stderr
    if environment:
        controller = [sys.executable, "-c", "import producers.trading_controller"]
        imported = subprocess.run(
            controller, capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )
        assert imported.stderr.splitlines()[-1].startswith(f"producers.errors.SettingsError: {message}")
    if dotenv:
        options = ("--worker-class", "consumers.worker.HistoryWorker", "--burst", "history")
        with rq_process("worker", *options, log=tmp_path / "log") as process:
            assert process.wait(60) == 1
        assert message in (tmp_path / "log").read_text()
