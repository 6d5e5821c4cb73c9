"""A damaged outbox file is renamed together with its log, even if a process dies between the two renames."""

from __future__ import annotations

import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import fakeredis
import pytest

from producers.errors import OutboxError
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.outbox_carry_over import is_in_use
from producers.relay import Relay
from producers.relay_process import run_relay
from tests.factories import a_snapshot
from tests.forking import in_child
from tests.rq_programs import until
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
    """Write entries into a log alone, under the name that quarantine gives it, and leave no file at the path."""
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot(after=timedelta(seconds=number)) for number in range(40)])
        log = path.with_name(f"{path.name}.{mark}-{path.stat().st_ino}-wal")
        log.write_bytes(path.with_name(f"{path.name}-wal").read_bytes())
    path.unlink()
    return log


def test_entries_of_a_log_that_was_quarantined_without_its_file_are_relayed(
    path: Path, redis: fakeredis.FakeRedis
) -> None:
    """A process died after the first rename. The file at the path does not have these entries."""
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
    salvaged.write_bytes(b"unchanged")
    with Outbox(path, repair=True) as outbox, _relaying(outbox, redis) as relay:
        while relay.sweep():
            pass
        assert outbox.entries() == []
    assert not log.exists()
    assert salvaged.read_bytes() == b"unchanged"
    assert salvaged.with_name(f"{salvaged.name}-wal").exists()


def test_a_file_with_carried_entries_is_not_salvaged_while_its_process_lives(path: Path) -> None:
    """Its process puts the entries into the new file. A file that was deleted meanwhile has nothing to salvage."""
    file = path.with_name(f"{path.name}.taken-out-1")
    assert is_in_use(file)
    with Outbox(path) as outbox, file.open("w") as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert is_in_use(file)
        assert outbox.quarantine.damaged_files() == []
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # as the kernel does at the end of the process
        for _ in range(2):
            assert outbox.quarantine.damaged_files() == [file]


def test_the_entries_that_a_dead_process_was_carrying_over_are_salvaged(path: Path) -> None:
    """The path was unusable when the process ended. Its file with the entries is deleted then."""

    def use_removed_file() -> None:
        outbox = Outbox(path)
        outbox.append("bot", [a_snapshot(after=timedelta(seconds=number)) for number in range(3)])
        path.unlink()
        path.mkdir()
        with pytest.raises(OutboxError, match="is a folder"):
            outbox.status()

    assert in_child(use_removed_file) == 0
    path.rmdir()
    with Outbox(path, repair=True) as outbox:
        (file,) = outbox.quarantine.damaged_files()
        assert outbox.quarantine.salvage(file).entries == 3
        assert [entry.sequence for entry in outbox.deliveries.pending(5)] == [1, 2, 3]
        assert (outbox.quarantine.damaged_files(), outbox.quarantine.salvaged_files()) == ([], [])
    assert [one.name for one in path.parent.iterdir() if "taken-out" in one.name] == []


def test_a_starting_relay_quarantines_an_older_file_beside_a_newer_log(path: Path, redis: fakeredis.FakeRedis) -> None:
    """Appending, sending and settling may work for a long time while other pages are unreadable."""
    snapshots = [a_snapshot(after=timedelta(seconds=number)) for number in range(300)]
    with Outbox(path) as outbox:
        outbox.relay_lock().acquire()  # as if a producer had relayed it
        outbox.append("bot", snapshots[:20])
    older = path.read_bytes()
    with Outbox(path) as outbox:
        outbox.append("bot", snapshots[20:])
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("INSERT INTO outcomes SELECT position, 0, 1, NULL FROM entries")
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


def _damage_table_outbox(path: Path) -> None:
    """Write a file that can be opened, with a damaged page of its table `outbox`."""
    with Outbox(path) as outbox:
        outbox.relay_lock().acquire()  # as if a producer had relayed it
        outbox.append("bot", [a_snapshot()])
    with closing(sqlite3.connect(path)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'outbox'").fetchone()
    _overwrite(path, page)


def _overwrite(path: Path, page: int) -> None:
    with open(path, "r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)


def test_a_producer_can_start_on_a_damaged_outbox(path: Path, redis: fakeredis.FakeRedis) -> None:
    _damage_table_outbox(path)
    with HistoryProducer(redis, outbox=path) as producer:
        producer.record(a_snapshot(after=timedelta(seconds=1)))
        producer.flush(5)
        while producer.status().sent < 2:  # the salvaged event too
            time.sleep(0.01)


def test_settle_and_flush_wait_for_the_entries_of_a_damaged_file(
    path: Path, redis: fakeredis.FakeRedis, server: fakeredis.FakeServer
) -> None:
    """The file is quarantined, and the new file is empty at first, but the entries are not settled yet."""
    with Outbox(path) as outbox:
        outbox.relay_lock().acquire()  # as if a producer had relayed it
        outbox.append("bot", [a_snapshot(after=timedelta(seconds=number)) for number in range(40)])
    with closing(sqlite3.connect(path)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'entries'").fetchone()
    _overwrite(path, page)
    server.connected = False
    with HistoryProducer(redis, outbox=path) as producer:
        assert producer.settle(0) > 0
        assert producer.flush(0) > 0
        until(lambda: producer.settle(0) == 40)


def test_a_relay_process_can_start_on_a_damaged_outbox(path: Path, redis: fakeredis.FakeRedis) -> None:
    _damage_table_outbox(path)
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


def test_a_relay_process_leaves_a_file_of_another_program_alone_and_relays_other_outboxes(
    path: Path, redis: fakeredis.FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """It was configured by mistake. The log names it once."""
    content = b"somebody's notes" * 1000
    path.write_bytes(content)
    with Outbox(path.with_name("other.db")) as other:
        other.append("bot", [a_snapshot()])

    def stopped(_: float) -> bool:
        time.sleep(0.01)
        return queue_of(redis).count == 1

    run_relay([path, other.path], redis, "history", keep_seconds=3600.0, stopped=stopped)
    (message,) = [one for one in caplog.messages if "cannot relay" in one]
    assert message.startswith(f"cannot relay {path}; trying again: outbox {path}: file is not a database")
    assert path.read_bytes() == content


def test_a_damaged_file_that_cannot_be_read_delays_no_event_and_is_tried_again(
    path: Path, redis: fakeredis.FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """Here it is a folder. The log names the problem, and no other file changes."""
    unreadable = path.with_name(f"{path.name}.damaged-1")
    unreadable.mkdir()
    with Outbox(path, repair=True) as outbox, _relaying(outbox, redis) as relay:
        outbox.append("bot", [a_snapshot()])
        while relay.sweep():
            pass
        assert (outbox.status().sent, queue_of(redis).count) == (1, 1)
        outbox.append("bot", [a_snapshot(after=timedelta(1))])
        relay.sweep()
        assert queue_of(redis).count == 2
    (message,) = [one for one in caplog.messages if "cannot salvage" in one]
    assert "trying again in 10 s: " in message
    assert "Is a directory" in message
    assert unreadable.is_dir()
