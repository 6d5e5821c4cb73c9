"""`trading-history outbox flush`: it ends with 0 only when every event has reached its end, and says so in one line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.operations import get_portfolio_history
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot
from tests.relaying import COMMAND, ROOT, a_proxy, a_relay, a_worker, states
from tests.rq_programs import until


@pytest.fixture(autouse=True)
def outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "outbox.db"


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "outbox", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def _deletable(outbox: Path) -> str:
    return f"Every event in {outbox} is stored or rejected. Once no process uses the file, it may be deleted.\n"


def _record(count: int, *, first: int = 0, send: bool = True) -> None:
    """A controller that ends before its events are settled; with `send`, Redis has them."""
    with HistoryProducer() as producer:
        producer.record_many([a_snapshot(after=timedelta(seconds=first + number)) for number in range(count)])
        if send:
            assert producer.flush(20) == 0
        producer.close(timeout=0)


def test_jobs_that_redis_has_lost_are_sent_again_at_once(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """Not at its next check, which is minutes away. A rejection is an end too."""
    _record(1)
    with HistoryProducer() as producer:
        producer.record(a_snapshot(balance="1"))  # the same event with other content
        producer.flush(20)
        producer.close(timeout=0)
        with producer._transport.outbox._file.transaction() as db:
            db.execute("UPDATE entries SET state = 'sent', check_at = check_at + 290")
    redis.flushall()
    with a_worker(redis, tmp_path / "worker.log"):
        began = time.monotonic()
        flushed = _run("flush")
        took = time.monotonic() - began
    assert (flushed.returncode, flushed.stdout) == (0, _deletable(outbox))
    assert states(outbox) == {"stored": 1, "rejected": 1}
    assert took < 10  # a check is due after 295 s


def test_a_relay_process_does_the_work_while_it_lives(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """The command only asks for it."""
    _record(2)
    redis.flushall()
    with a_worker(redis, tmp_path / "worker.log"), a_relay(tmp_path / "relay.log"):
        flushed = _run("flush", "--json")
    facts = json.loads(flushed.stdout)
    assert (flushed.returncode, facts["unsettled"], facts["waits_for"], facts["stored"]) == (0, 0, None, 2)


def test_without_a_worker_it_says_so_in_time(redis: Redis, outbox: Path) -> None:
    """How many are in which state, what they wait for and what to do; as JSON too."""
    _record(3)
    began = time.monotonic()
    flushed = _run("flush", "--timeout", "0.5")
    took = time.monotonic() - began
    as_json = _run("flush", "--timeout", "0", "--json")

    reason = "Queue history has 3 waiting jobs and no worker. Start one: trading-history worker"
    assert flushed.returncode == as_json.returncode == 1
    assert flushed.stderr == f"3 events not settled: 0 pending, 3 sent. {reason}\n"
    assert "may be deleted" not in flushed.stdout
    assert took < 10
    facts = json.loads(as_json.stdout)
    assert facts["oldest_unsettled_seconds"] < 60
    assert {name: facts[name] for name in ("path", "pending", "sent", "unsettled", "waits_for")} == {
        "path": str(outbox),
        "pending": 0,
        "sent": 3,
        "unsettled": 3,
        "waits_for": reason,
    }


@pytest.mark.parametrize("mode", ["refuse", "swallow"])
def test_with_redis_away_it_says_so(redis: Redis, tmp_path: Path, mode: str) -> None:
    """And ends soon after its timeout, although Redis keeps whoever asks it waiting."""
    with a_proxy(os.environ["REDIS_URL"], tmp_path) as (proxy, url):
        proxy.set_mode(mode)  # type: ignore[arg-type]  # one of its modes
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REDIS_URL", url)
            _record(1, send=False)
            began = time.monotonic()
            flushed = _run("flush", "--timeout", "0.5")
            took = time.monotonic() - began
    assert flushed.returncode == 1
    last = flushed.stderr.splitlines()[-1]
    assert last.startswith("1 event not settled: 1 pending, 0 sent. Redis cannot be reached (")
    assert last.endswith("). The events are safe in the outbox; run this again when it is back.")
    assert took < 12


def test_with_workers_that_wait_for_the_database_it_says_so(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """RQ has their state."""
    with get_db() as db:
        db.execute(text("ALTER TABLE portfolio_history RENAME TO away"))
    _record(1)
    with a_worker(redis, tmp_path / "worker.log"):
        until(lambda: "waits for the database" in (tmp_path / "worker.log").read_text(), 30)
        flushed = _run("flush", "--timeout", "0.5")
    assert flushed.returncode == 1
    assert flushed.stderr.splitlines()[-1].endswith(
        " and its workers wait for the database: run trading-history doctor on a worker's host."
    )


def test_flush_does_not_wait_for_events_recorded_meanwhile(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """But the file may not be deleted then: the exit status and a line say so."""
    stop = threading.Event()

    def record(producer: HistoryProducer) -> None:
        number = 0
        while not stop.wait(0.02):
            number += 100
            producer.record_many([a_snapshot(after=timedelta(seconds=number + n)) for n in range(100)])

    with HistoryProducer() as producer, a_worker(redis, tmp_path / "worker.log"):
        recording = threading.Thread(target=record, args=(producer,))
        recording.start()
        flushed = _run("flush", "--timeout", "40")
        stop.set()
        recording.join()
        producer.settle(40)
    assert (flushed.returncode, flushed.stdout) == (1, "")
    assert flushed.stderr.startswith(f"Every event that was in {outbox} is stored or rejected, but not ")
    assert flushed.stderr.endswith(" since then. Stop the controllers and run this again before you delete the file.\n")


def test_another_redis_than_the_outboxs_is_refused(redis: Redis, outbox: Path) -> None:
    """It would redirect the events of a running controller. `status` reads the file all the same."""
    with HistoryProducer() as producer:
        refused = [
            _run(*command, **{name: value})
            for command in (["flush", "--timeout", "1"], ["resend", "--since", "2020-01-01", "--timeout", "1"])
            for name, value in (("REDIS_URL", "redis://u:s3cret@127.0.0.1:1/0"), ("HISTORY_QUEUE", "evening"))
        ]
        status = _run("status", REDIS_URL="redis://u:s3cret@127.0.0.1:1/0")
        assert producer.record(a_snapshot()).state == "pending"
        assert producer.flush(10) == 0
        producer.close(timeout=0)
    for run in refused:
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
        assert run.stderr.startswith(f"error: outbox {outbox}: its entries go to database 0 on ")
        assert "s3cret" not in run.stderr
    assert (status.returncode, status.stderr) == (0, "")


@contextmanager
def _on_a_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    main, other = pty.openpty()
    process = subprocess.Popen([*COMMAND, "outbox", *arguments], stdout=subprocess.PIPE, stderr=other)
    os.close(other)
    try:
        yield process, main
    finally:
        process.kill()
        process.communicate()
        os.close(main)


def test_a_terminal_gets_a_bar_and_a_pipe_gets_none(redis: Redis, outbox: Path) -> None:
    """How many of how many are settled."""
    _record(3)
    with _on_a_terminal("flush", "--timeout", "1") as (process, terminal):
        shown = b""
        with suppress(OSError):  # EIO: the other side is closed
            while piece := os.read(terminal, 4096):
                shown += piece
        assert process.wait(20) == 1
    assert b"0/3" in shown
    assert "0/3" not in _run("flush", "--timeout", "0.5").stderr


def test_an_event_that_is_stored_by_then_is_counted_as_such(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """A worker begins after the command; `status` then has nothing that is old."""
    _record(2)
    with subprocess.Popen([*COMMAND, "outbox", "flush"], stdout=subprocess.PIPE, text=True) as flushing:
        with a_worker(redis, tmp_path / "worker.log"):
            printed, _ = flushing.communicate(timeout=60)
        assert (flushing.returncode, printed) == (0, _deletable(outbox))
    facts = json.loads(_run("status", "--json").stdout)
    assert (facts["stored"], facts["oldest_unacknowledged_seconds"], facts["check"]) == (2, None, "sound")
    assert len(get_portfolio_history()) == 2


def test_there_is_nothing_to_flush_without_an_outbox(redis: Redis, outbox: Path) -> None:
    """It makes none."""
    flushed = _run("flush")
    assert (flushed.returncode, flushed.stderr) == (
        1,
        f"error: there is no outbox at {outbox}; set HISTORY_OUTBOX to its path\n",
    )
    assert not outbox.exists()
