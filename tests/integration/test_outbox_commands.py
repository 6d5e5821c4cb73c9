"""`trading-history outbox flush`: exit status 0 means that every event is stored or rejected."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.operations import get_portfolio_history
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from tests.controllers import cli
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
    """Record events with a producer that closes before they are settled; with `send`, Redis has their jobs."""
    with HistoryProducer() as producer:
        producer.record_many([a_snapshot(after=timedelta(seconds=first + number)) for number in range(count)])
        if send:
            assert producer.flush(20) == 0
        producer.close(timeout=0)


def test_flush_sends_jobs_that_redis_lost_again_at_once(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """It does not wait for the next check in some minutes. A rejected event is settled too."""
    _record(1)
    with HistoryProducer() as producer:
        producer.record(a_snapshot(balance="1"))  # the same event with other content
        producer.flush(20)
        producer.close(timeout=0)
        with producer._transport.outbox._file.transaction() as db:
            db.execute("DELETE FROM outcomes")
            db.execute("DELETE FROM batches")
            db.execute("INSERT OR REPLACE INTO retries SELECT position, '', 1, recorded_at + 290 FROM entries")
    redis.flushall()
    with a_worker(redis, tmp_path / "worker.log"):
        began = time.monotonic()
        flushed = _run("flush")
        took = time.monotonic() - began
    assert (flushed.returncode, flushed.stdout) == (0, _deletable(outbox))
    assert states(outbox) == {"stored": 1, "rejected": 1}
    assert took < 10  # a check is due after 295 s


def test_flush_works_while_a_relay_process_relays(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """The relay process sends the entries again."""
    _record(2)
    redis.flushall()
    with a_worker(redis, tmp_path / "worker.log"), a_relay(tmp_path / "relay.log"):
        flushed = _run("flush", "--json")
    facts = json.loads(flushed.stdout)
    assert (flushed.returncode, facts["unsettled"], facts["waits_for"], facts["stored"]) == (0, 0, None, 2)


def test_flush_reports_that_there_is_no_worker(redis: Redis, outbox: Path) -> None:
    """It prints the number of events in each state, what they wait for and what to do, also as JSON."""
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


def test_flush_names_a_damaged_file_that_no_relay_has_salvaged(redis: Redis, outbox: Path) -> None:
    """Another process relays the outbox, and has not salvaged it."""
    damaged = outbox.with_name("outbox.db.damaged-1")
    damaged.touch()
    with Outbox(outbox) as opened:
        lock = opened.relay_lock()
        assert lock.acquire()
        flushed = cli("outbox", "flush", "--timeout", "0.1", outbox=outbox)
        lock.release()
    assert flushed.exit_code == 1
    assert flushed.stderr.endswith(
        f" Not salvaged yet: {damaged}. Start the controller or trading-history relay: either salvages them.\n"
    )


@pytest.mark.parametrize("mode", ["refuse", "swallow"])
def test_flush_reports_that_redis_is_away(redis: Redis, tmp_path: Path, mode: str) -> None:
    """It ends soon after its timeout, even if Redis accepts connections and never answers."""
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
    assert last.endswith(
        "): check that Redis runs, and host and port in REDIS_URL."
        " The events are safe in the outbox; run this again when it is back."
    )
    assert took < 12


def test_flush_reports_that_workers_wait_for_the_database(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """It reads the workers' state from RQ's keys."""
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


def test_flush_does_not_wait_for_events_that_are_recorded_meanwhile(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """The file must not be deleted then, and the exit status and a line report that."""
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


def test_flush_and_resend_fail_with_another_redis_than_the_outboxs(redis: Redis, outbox: Path) -> None:
    """They would redirect the events of a running controller. `status` still reads the file."""
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


def test_resend_brings_back_rows_that_a_restored_database_lacks(
    redis: Redis, work: Callable[[], None], outbox: Path
) -> None:
    """It sends the settled events again that were recorded from that time on."""
    _record(2)
    work()
    with HistoryProducer() as producer:
        assert producer.settle(20) == 0
    with get_db() as db:
        db.execute(text("TRUNCATE portfolio_history, event_outcomes"))
    resent = [cli("outbox", "resend", "--since", since, outbox=outbox) for since in ("2099-01-01", "1h")]
    assert [(run.exit_code, run.stdout) for run in resent] == [
        (0, "0 events sent again, 0 not sent yet\n"),
        (0, "2 events sent again, 0 not sent yet\n"),
    ]
    work()
    assert len(get_portfolio_history()) == 2


def test_resend_counts_what_a_full_redis_does_not_take_and_fails(
    redis: Redis, work: Callable[[], None], outbox: Path
) -> None:
    """The event stays pending, and a relay sends it as soon as Redis has memory again."""
    _record(1)
    work()
    with HistoryProducer() as producer:
        assert producer.settle(20) == 0
    redis.config_set("maxmemory", 1)
    try:
        full = cli("outbox", "resend", "--since", "1h", "--timeout", "0.1", outbox=outbox)
    finally:
        redis.config_set("maxmemory", 0)
    assert (full.exit_code, full.stdout) == (1, "1 event sent again, 1 not sent yet\n")
    assert states(outbox) == {"pending": 1}
    assert cli("outbox", "flush", "--timeout", "0.1", outbox=outbox).exit_code == 1
    assert states(outbox) == {"sent": 1}


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


def test_flush_shows_a_progress_bar_on_a_terminal_only(redis: Redis, outbox: Path) -> None:
    """The bar shows how many of the events are settled."""
    _record(3)
    with _on_a_terminal("flush", "--timeout", "1") as (process, terminal):
        shown = b""
        with suppress(OSError):  # EIO: the other side is closed
            while piece := os.read(terminal, 4096):
                shown += piece
        assert process.wait(20) == 1
    assert b"0/3" in shown
    assert "0/3" not in _run("flush", "--timeout", "0.5").stderr


def test_flush_waits_for_a_worker_that_starts_later(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """A worker starts after the command. `status` then reports the events as stored."""
    _record(2)
    with subprocess.Popen([*COMMAND, "outbox", "flush"], stdout=subprocess.PIPE, text=True) as flushing:
        with a_worker(redis, tmp_path / "worker.log"):
            printed, _ = flushing.communicate(timeout=60)
        assert (flushing.returncode, printed) == (0, _deletable(outbox))
    facts = json.loads(_run("status", "--json").stdout)
    assert (facts["stored"], facts["oldest_unacknowledged_seconds"], facts["check"]) == (2, None, "sound")
    assert len(get_portfolio_history()) == 2


def test_flush_fails_without_an_outbox(redis: Redis, outbox: Path) -> None:
    """It does not create a file."""
    flushed = _run("flush")
    assert (flushed.returncode, flushed.stderr) == (
        1,
        f"error: there is no outbox at {outbox}; set HISTORY_OUTBOX to its path\n",
    )
    assert not outbox.exists()
