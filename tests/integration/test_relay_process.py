"""`trading-history relay`: which process relays an outbox when processes start, stop and die in any order."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis

from consumers.operations import get_portfolio_history
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.outbox_header import RELAY_ALIVE_SECONDS
from tests.deliveries import history_queue
from tests.factories import a_snapshot
from tests.relaying import COMMAND, a_proxy, a_relay, a_worker, states
from tests.rq_programs import until

_AT_ONCE_SECONDS = 3.0


@pytest.fixture(autouse=True)
def outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    return tmp_path / "outbox.db"


def _append(path: Path, count: int = 1) -> None:
    """Append events like a controller that ended before it sent them."""
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot(after=timedelta(number)) for number in range(count)])


def _messages(log: Path) -> list[str]:
    return [line.split(" producers.relay", 1)[1].split(": ", 1)[1] for line in log.read_text().splitlines()]


def test_a_relay_process_relays_several_outboxes_and_one_that_is_created_later(redis: Redis, tmp_path: Path) -> None:
    """An outbox that is named twice is relayed once. Each change is one log line. SIGTERM ends it with status 0."""
    first, second, late, log = (tmp_path / name for name in ("1.db", "2.db", "new/late.db", "log"))
    _append(first, 3)
    _append(second, 2)
    (tmp_path / "link.db").symlink_to(first)
    options = [word for path in (first, second, late, tmp_path / "link.db") for word in ("--outbox", path)]
    with a_relay(log, *options) as relay:
        until(lambda: (states(first), states(second)) == ({"sent": 3}, {"sent": 2}))
        _append(late)
        until(lambda: states(late) == {"sent": 1})
        relay.terminate()
        assert relay.wait(5) == 0
    assert _messages(log) == [
        f"relaying {tmp_path / 'link.db'}, unsettled entries: 3",
        f"relaying {second}, unsettled entries: 2",
        f"there is no outbox at {late} yet: waiting for a producer to create it",
        f"relaying {late}, unsettled entries: 1",
        f"no longer relaying {tmp_path / 'link.db'}",
        f"no longer relaying {second}",
        f"no longer relaying {late}",
    ]
    assert history_queue(redis).count == 6


def test_a_running_producer_leaves_relaying_to_a_relay_process_and_takes_over_when_it_ends(
    redis: Redis, outbox: Path, tmp_path: Path
) -> None:
    """It takes over at once after SIGTERM, and 10 s after the last heartbeat if the process was killed."""
    log = tmp_path / "log"
    with HistoryProducer() as producer:
        for number, (ending, least, most) in enumerate(
            [(signal.SIGTERM, 0.0, _AT_ONCE_SECONDS), (signal.SIGKILL, 5.0, RELAY_ALIVE_SECONDS + 4)]
        ):
            with a_relay(log) as relay:
                until(producer._transport.outbox.header.relay_is_alive)
                time.sleep(0.3)  # until the producer notices
                assert not producer._transport.outbox.relay_lock().acquire()
                relay.send_signal(ending)
                relay.wait(5)
                ended = time.monotonic()
                receipt = producer.record(a_snapshot(after=timedelta(number)))
                until(lambda receipt=receipt: receipt.state == "sent")  # type: ignore[misc]  # a lambda's default
                assert least <= time.monotonic() - ended < most, ending
        # The heartbeat of the killed process is cleared.
        assert producer._transport.outbox.header.read().relay is None
        assert "another process" not in log.read_text()


def test_a_stopped_relay_process_is_replaced_and_doubles_no_event_when_it_continues(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path
) -> None:
    """It keeps the lock. Events recorded meanwhile are stored once and stay settled."""
    with HistoryProducer() as producer, a_worker(redis, tmp_path / "worker.log"), a_relay(tmp_path / "log") as relay:
        producer.record(a_snapshot()).wait(20)
        relay.suspend()
        stopped = time.monotonic()
        receipts = [producer.record(a_snapshot(after=timedelta(1 + number))) for number in range(50)]
        for receipt in receipts:
            receipt.wait(20)
        assert time.monotonic() - stopped < RELAY_ALIVE_SECONDS + 4
        relay.resume()
        again = [producer.record(a_snapshot(after=timedelta(100 + number))) for number in range(50)]
        for receipt in again:
            receipt.wait(20)
        until(lambda: states(outbox) == {"stored": 101})
        relay.terminate()
        assert relay.wait(10) == 0
    assert states(outbox) == {"stored": 101}
    assert len(get_portfolio_history()) == 101


def test_a_second_relay_process_waits_and_takes_over(redis: Redis, outbox: Path, tmp_path: Path) -> None:
    """It takes over at once when the first one is killed, because its lock is free then."""
    _append(outbox)
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    with a_relay(first) as one, a_relay(second) as other:
        until(lambda: len(_messages(second)) == 2)
        _append(outbox)
        until(lambda: states(outbox) == {"sent": 2})
        one.kill()
        one.wait(5)
        until(lambda: len(_messages(second)) == 3, _AT_ONCE_SECONDS)
        _append(outbox)
        until(lambda: states(outbox) == {"sent": 3}, _AT_ONCE_SECONDS)
        other.terminate()
        assert other.wait(5) == 0
    assert _messages(second)[1:] == [
        f"another process is relaying {outbox}: waiting until it ends",
        f"relaying {outbox} now",
        f"no longer relaying {outbox}",
    ]
    assert _messages(first) == [f"relaying {outbox}, unsettled entries: 1"]
    assert history_queue(redis).count == 3


@pytest.mark.parametrize("differs", ["REDIS_URL", "HISTORY_QUEUE"])
def test_a_relay_for_another_redis_or_queue_is_refused(
    redis: Redis, outbox: Path, tmp_path: Path, differs: str
) -> None:
    """It ends with one line and status 1, and changes nothing. The line shows no password."""
    HistoryProducer().close(timeout=0)
    other = {"REDIS_URL": "redis://user:s3cret@127.0.0.1:1/4", "HISTORY_QUEUE": "evening"}[differs]
    with a_relay(tmp_path / "log", wait=False, **{differs: other}) as relay:
        assert relay.wait(20) == 1
    (line,) = (tmp_path / "log").read_text().splitlines()
    place = {"REDIS_URL": "database 4 on 127.0.0.1, port 1, queue history", "HISTORY_QUEUE": "queue evening"}[differs]
    assert line.startswith(f"error: outbox {outbox}: its entries go to database 0 on ")
    assert f"{place}. Set REDIS_URL and HISTORY_QUEUE to those of the producer that opened it last" in line
    assert "s3cret" not in line
    with Outbox(outbox) as untouched:
        assert untouched.header.read().relay is None


def test_an_outbox_of_another_queue_that_is_created_later_does_not_end_the_relay_process(
    redis: Redis, outbox: Path, tmp_path: Path
) -> None:
    """Its own producer relays it, and the process continues to relay the other outbox."""
    late = tmp_path / "late.db"
    _append(outbox)
    with a_relay(tmp_path / "log", "--outbox", outbox, "--outbox", late):
        until(lambda: states(outbox) == {"sent": 1})
        with HistoryProducer(queue="evening", outbox=late) as producer:
            until(lambda: "cannot relay" in (tmp_path / "log").read_text())
            receipt = producer.record(a_snapshot())
            until(lambda: receipt.state == "sent", _AT_ONCE_SECONDS)
            _append(outbox)
            until(lambda: states(outbox) == {"sent": 2})
    refused = [message for message in _messages(tmp_path / "log") if "cannot relay" in message]
    assert len(refused) == 1
    assert refused[0].startswith(f"cannot relay {late}; trying again: outbox {late}: its entries go to ")


def _longest_silence(watched: Outbox, seconds: float) -> float:
    """Return the longest time between two heartbeats during the next `seconds` seconds."""
    began = last = time.monotonic()
    longest, heartbeat = 0.0, watched.header.read().relay_at
    while (now := time.monotonic()) < began + seconds:
        found = watched.header.read().relay_at
        if found != heartbeat:
            heartbeat, last = found, now
        longest = max(longest, now - last)
        time.sleep(0.05)
    return longest


def test_heartbeats_continue_while_redis_does_not_answer(redis: Redis, outbox: Path, tmp_path: Path) -> None:
    """Redis accepts connections and never answers. The log has one line for the outage and one for its end."""
    with a_proxy(os.environ["REDIS_URL"], tmp_path) as (proxy, url), Outbox(outbox) as watched:
        with a_relay(tmp_path / "log", REDIS_URL=url):
            until(watched.header.relay_is_alive)
            proxy.set_mode("swallow")
            _append(outbox)
            longest = _longest_silence(watched, 8.0)
            assert states(outbox) == {"pending": 1}
            proxy.set_mode("pass")
            until(lambda: states(outbox) == {"sent": 1})
            until(lambda: len(_messages(tmp_path / "log")) == 3)
            _, away, back = _messages(tmp_path / "log")
        assert longest < 4.5  # a try waits 5 s for an answer; 10 s without a heartbeat are the limit
    assert away.startswith(f"cannot relay {outbox}: TimeoutError: ")
    assert back.startswith(f"relaying {outbox} again after ")


def test_no_password_of_redis_is_written_anywhere(
    outbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither in the log nor in the outbox's files."""
    monkeypatch.setenv("REDIS_URL", "redis://user:s3cret@127.0.0.1:1/0")
    with HistoryProducer() as producer:
        producer.record(a_snapshot())
        producer.close(timeout=0)
    log = tmp_path / "log"
    with a_relay(log) as relay:
        until(lambda: "cannot relay" in log.read_text())
        relay.terminate()
        assert relay.wait(10) == 0
    assert "127.0.0.1" in log.read_text()
    written = b"".join(path.read_bytes() for path in [log, *tmp_path.glob("outbox.db*")])
    assert b"s3cret" not in written


def test_a_second_stop_signal_ends_the_relay_process_at_once(redis: Redis, outbox: Path, tmp_path: Path) -> None:
    """Its relay waits for an answer of Redis that never comes."""
    with a_proxy(os.environ["REDIS_URL"], tmp_path) as (proxy, url):
        proxy.set_mode("swallow")
        _append(outbox)
        with a_relay(tmp_path / "log", REDIS_URL=url) as relay:
            time.sleep(0.5)  # until the relay waits for Redis
            began = time.monotonic()
            relay.terminate()
            time.sleep(0.2)
            relay.send_signal(signal.SIGINT)
            assert relay.wait(5) == 128 + signal.SIGINT
            assert time.monotonic() - began < 4


# Hides the libraries that only a worker's installation has.
_BLOCKING = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"sqlalchemy", "psycopg2", "prometheus_client", "fastapi", "flask", "rq_dashboard"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def test_the_relay_and_outbox_commands_run_on_a_controllers_installation(
    redis: Redis, database_url: str, outbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No database library can be imported, and no setting names the database."""
    (tmp_path / "blocking").mkdir()
    (tmp_path / "blocking" / "sitecustomize.py").write_text(_BLOCKING)
    with a_worker(redis, tmp_path / "worker.log"):
        monkeypatch.delenv("DATABASE_URL")
        paths = f"{tmp_path / 'blocking'}:{Path(__file__).parents[2]}"
        _append(outbox, 2)
        with a_relay(tmp_path / "log", PYTHONPATH=paths):
            until(lambda: states(outbox) == {"stored": 2})
        _append(outbox, 1)

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, "PYTHONPATH": paths}
            return subprocess.run(
                [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
            )

        flushed, status, history = run("outbox", "flush"), run("outbox", "status"), run("history")
    assert (flushed.returncode, flushed.stdout) == (
        0,
        f"Every event in {outbox} is stored or rejected. Once no process uses the file, it may be deleted.\n",
    )
    assert (status.returncode, status.stderr) == (0, "")
    assert (history.returncode, "pip install" in history.stderr) == (1, True), history.stderr
