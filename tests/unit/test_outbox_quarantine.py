"""A damaged outbox file is given another name together with its log, also when a process dies between the two."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import fakeredis
import pytest

from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.relay import Relay
from producers.relay_process import run_relay
from tests.factories import a_snapshot
from tests.unit.conftest import queue_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@contextmanager
def _relaying(outbox: Outbox, redis: fakeredis.FakeRedis) -> Iterator[Relay]:
    relay = Relay(outbox, redis, "history", keep_seconds=3600.0)
    yield relay
    relay.stop()


def _log_alone(path: Path, mark: str) -> Path:
    """Entries that only the log has, under the name that it gets first; the file at the path is empty, and sound."""
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot(after=timedelta(seconds=number)) for number in range(40)])
        log = path.with_name(f"{path.name}.{mark}-{path.stat().st_ino}-wal")
        log.write_bytes(path.with_name(f"{path.name}-wal").read_bytes())
    path.unlink()
    return log


def test_the_entries_of_a_log_that_was_quarantined_without_its_file_are_relayed(
    path: Path, redis: fakeredis.FakeRedis
) -> None:
    """A process died after the first rename. What it left at the path is an older copy, without these entries."""
    log = _log_alone(path, "damaged")
    with Outbox(path, repair=True) as outbox, _relaying(outbox, redis) as relay:
        assert outbox.entries() == []
        while relay.sweep():
            pass
        assert (outbox.status().sent, outbox.quarantine.damaged_files()) == (40, [])
    assert not log.exists()


def test_a_log_whose_file_was_salvaged_with_it_is_not_salvaged_again(path: Path, redis: fakeredis.FakeRedis) -> None:
    """A process died between the two renames at the end of a salvage."""
    log = _log_alone(path, "damaged")
    salvaged = log.with_name(log.name.replace("damaged", "salvaged").removesuffix("-wal"))
    salvaged.write_bytes(b"as it was")
    with Outbox(path, repair=True) as outbox, _relaying(outbox, redis) as relay:
        while relay.sweep():
            pass
        assert outbox.entries() == []
    assert not log.exists()
    assert salvaged.read_bytes() == b"as it was"
    assert salvaged.with_name(f"{salvaged.name}-wal").exists()


def test_an_older_file_that_was_put_back_beside_a_newer_log_is_quarantined_when_a_relay_begins(
    path: Path, redis: fakeredis.FakeRedis
) -> None:
    """Appending, sending and settling may go well for long in it, while the rest of it cannot be read."""
    snapshots = [a_snapshot(after=timedelta(seconds=number)) for number in range(300)]
    with Outbox(path) as outbox:
        outbox.relay_lock().acquire()  # a producer has relayed it once
        outbox.append("bot", snapshots[:20])
    older = path.read_bytes()
    with Outbox(path) as outbox:
        outbox.append("bot", snapshots[20:])
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE entries SET state = 'stored', row_id = 1, settled_at = 0")
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(RESTART)")
        outbox.append("bot", snapshots[:1])
        newer_log = path.with_name("outbox.db-wal").read_bytes()
    path.write_bytes(older)
    path.with_name("outbox.db-wal").write_bytes(newer_log)

    with Outbox(path, repair=True) as outbox, _relaying(outbox, redis) as relay:
        (before,) = outbox.append("bot", snapshots[:1])
        while relay.sweep():
            pass
        (after,) = outbox.append("bot", snapshots[:1])
        while relay.sweep():
            pass
        assert outbox.quick_check(5) is None
        assert outbox.quarantine.salvaged_files()
        assert {outbox.status_of(before).state, outbox.status_of(after).state} == {"sent"}
        assert before.source_id != after.source_id


def _without_its_own_table(path: Path) -> None:
    """The file can be opened, and the page of what it knows of itself is damaged."""
    with Outbox(path) as outbox:
        outbox.relay_lock().acquire()  # a producer has relayed it once
        outbox.append("bot", [a_snapshot()])
    with closing(sqlite3.connect(path)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'outbox'").fetchone()
    _overwrite(path, page)


def _overwrite(path: Path, page: int) -> None:
    with open(path, "r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)


def test_a_producer_begins_on_a_damaged_outbox(path: Path, redis: fakeredis.FakeRedis) -> None:
    _without_its_own_table(path)
    with HistoryProducer(redis, outbox=path) as producer:
        producer.record(a_snapshot(after=timedelta(seconds=1)))
        producer.flush(5)
        while producer.status().sent < 2:  # what was salvaged as well
            time.sleep(0.01)


def test_entries_in_a_damaged_file_are_not_settled(
    path: Path, redis: fakeredis.FakeRedis, server: fakeredis.FakeServer
) -> None:
    """The file is quarantined, and the new one is empty at first: that does not mean that all is done."""
    with Outbox(path) as outbox:
        outbox.relay_lock().acquire()  # a producer has relayed it once
        outbox.append("bot", [a_snapshot(after=timedelta(seconds=number)) for number in range(40)])
    with closing(sqlite3.connect(path)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'entries'").fetchone()
    _overwrite(path, page)
    server.connected = False
    with HistoryProducer(redis, outbox=path) as producer:
        assert producer.settle(0) > 0
        assert producer.flush(0) > 0
        assert producer.settle(2) == 40


def test_a_relay_process_begins_on_a_damaged_outbox(path: Path, redis: fakeredis.FakeRedis) -> None:
    _without_its_own_table(path)
    stopping = threading.Event()
    process = threading.Thread(
        target=run_relay, args=([path], redis, "history"), kwargs={"keep_seconds": 3600.0, "stopped": stopping.wait}
    )
    process.start()
    deadline = time.monotonic() + 10
    while queue_of(redis).count < 1 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    stopping.set()
    process.join()
    assert queue_of(redis).count == 1
