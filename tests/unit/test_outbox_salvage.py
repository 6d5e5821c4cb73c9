"""A damaged outbox is quarantined without delay for new events; readable entries are salvaged, others are reported."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import random
import shutil
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from producers import outbox_check, outbox_salvage
from producers.acknowledgements import Acknowledgement, Outcome
from producers.entries import Accepted, EntryHead
from producers.errors import OutboxDamaged, OutboxError
from producers.events import Draft
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox, Position
from producers.outbox_salvage import ranges_text
from producers.outbox_schema import VERSION
from producers.redis_keys import acknowledgement_key, job_id_of
from producers.relay import Relay
from tests.factories import a_signal, a_snapshot, an_archive
from tests.unit.conftest import queue_of

NAME = "trading-controller"
COUNT = 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "outbox.db"


@pytest.fixture
def relay_of(redis: fakeredis.FakeRedis) -> Iterator[Callable[[Outbox], Relay]]:
    """Return a function that makes a relay without a thread; each test calls `sweep`."""
    opened: list[Relay] = []

    def make(outbox: Outbox) -> Relay:
        opened.append(Relay(outbox, redis, "history", keep_seconds=3600.0))
        return opened[-1]

    yield make
    for one in opened:
        one.stop()


def _append(outbox: Outbox, count: int, after: int = 0) -> list[Accepted]:
    return outbox.append(NAME, [a_snapshot(after=timedelta(minutes=after + n)) for n in range(count)])


def _filled(path: Path) -> dict[str, tuple[int, str]]:
    """Write an outbox with pending entries; return the number and text of each by its job id."""
    with Outbox(path) as outbox:
        lock = outbox.relay_lock()  # creates the lock file, as each producer does
        lock.acquire()
        lock.release()
        _append(outbox, COUNT)
        return {entry.job_id: (entry.sequence, entry.event) for entry in outbox.entries()}


def _overwrite(path: Path, share: float, filling: str, length: int = 20_000) -> None:
    content = random.Random(1).randbytes(length) if filling == "noise" else bytes(length)
    with path.open("r+b") as file:
        file.seek(round(share * (path.stat().st_size - length)) if share else 0)
        file.write(content)


def _job_id(one: Accepted | EntryHead) -> str:
    return job_id_of(one.source_id, one.sequence, one.nonce)


def _sweep(relay: Relay) -> None:
    while relay.sweep():
        pass


def _lost(outbox: Outbox) -> set[int]:
    return {
        n for ranges in outbox.quarantine.losses().values() for first, last in ranges for n in range(first, last + 1)
    }


@pytest.mark.parametrize("damage", list(itertools.product([0.0, 0.2, 0.5, 0.8, 1.0], ["noise", "zeros"])))
def test_damage_does_not_delay_readable_and_new_events(
    path: Path,
    relay_of: Callable[[Outbox], Relay],
    redis: fakeredis.FakeRedis,
    caplog: pytest.LogCaptureFixture,
    damage: tuple[float, str],
) -> None:
    """20 kB are damaged anywhere in the file: new and readable events are delivered, others are reported."""
    before = _filled(path)
    _overwrite(path, *damage)
    outbox = Outbox(path, repair=True)
    new = _append(outbox, 1, after=9000)
    relay = relay_of(outbox)
    _sweep(relay)
    new += _append(outbox, 1, after=9001)
    _sweep(relay)

    delivered = {entry.job_id: entry.event for entry in outbox.entries()}
    assert {_job_id(one) for one in new} <= set(queue_of(redis).job_ids) == set(delivered)
    assert len(queue_of(redis).job_ids) == len(set(queue_of(redis).job_ids))
    salvaged = {job_id: text for job_id, text in delivered.items() if job_id in before}
    assert salvaged == {job_id: before[job_id][1] for job_id in salvaged}
    assert len(salvaged) > COUNT * 0.7
    assert len(delivered) == len(salvaged) + len(new)
    missing = {sequence for job_id, (sequence, _) in before.items() if job_id not in salvaged}
    read = {before[job_id][0] for job_id in salvaged}
    # Numbers lower than the first one that was read are not reported: they may have been settled and deleted.
    assert {n for n in missing if n > min(read)} == _lost(outbox)

    assert outbox.quarantine.damaged_files() == []
    (moved,) = outbox.quarantine.salvaged_files()
    assert moved.name.startswith("outbox.db.salvaged-")
    assert outbox.quarantine.lossy_files() == ([moved] if _lost(outbox) else [])
    carried = sum(
        one.source_id == next(iter(before)).split("-")[0] for one in new
    )  # appended before the damage was noticed
    messages = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert len(messages) == 2
    assert "the file is damaged and was moved to" in messages[0]
    assert messages[1].startswith(f"salvaged {len(salvaged) + carried} entries from ")
    if lost := _lost(outbox):
        ((source, ranges),) = outbox.quarantine.losses().items()
        assert f" Sequence numbers that were not found: {source}: {ranges_text(ranges)}. " in messages[1]
        assert source.startswith(f"{NAME}/")
        assert len(lost) > 5
    assert outbox.quick_check(60) is None


def test_a_large_event_with_damaged_text_is_not_delivered(path: Path, relay_of: Callable[[Outbox], Relay]) -> None:
    """Its text is on overflow pages, whose content SQLite does not check."""
    with Outbox(path, repair=True) as outbox:
        lock = outbox.relay_lock()
        lock.acquire()
        lock.release()
        outbox.append(NAME, [an_archive(after=timedelta(n), signals=[a_signal()] * 50) for n in range(30)])
        before = {entry.job_id: entry.event for entry in outbox.entries()}
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096 + 500)  # after the number of the next page
        file.write(bytes(3000))
    _overwrite(path, 0.0, "noise", 4096)
    outbox = Outbox(path, repair=True)
    _sweep(relay_of(outbox))

    found = {entry.job_id: entry.event for entry in outbox.entries()}
    assert found.items() <= before.items()
    assert 25 <= len(found) < 30
    assert len(_lost(outbox)) == 30 - len(found)


def test_flush_waits_for_the_entries_of_a_damaged_file(path: Path, redis: fakeredis.FakeRedis) -> None:
    """New events may be in it too: their receipts have a state meanwhile, and `flush` ends when Redis has them."""
    before = _filled(path)
    _overwrite(path, 0.5, "noise")
    producer = HistoryProducer(redis, outbox=path)
    receipts = [producer.record(a_snapshot(after=timedelta(minutes=9000 + n))) for n in range(3)]
    assert {one.state for one in receipts} <= {"pending", "sent"}
    assert producer.flush(20) == 0
    assert {one.state for one in receipts} == {"sent"}
    producer.close(timeout=0)

    assert {_job_id(one._accepted) for one in receipts} <= set(queue_of(redis).job_ids)
    assert len(set(queue_of(redis).job_ids) & set(before)) > COUNT * 0.7
    assert len(Outbox(path).quarantine.salvaged_files()) == 1


def test_entries_of_a_file_that_waits_to_be_salvaged_are_pending(path: Path) -> None:
    """The receipt of such an event reports `pending`; the entries are counted when they are salvaged."""
    outbox = Outbox(path, repair=True)
    (accepted,) = _append(outbox, 1)
    outbox.relay_lock().acquire()
    until = outbox.last_position()
    (moved,) = _quarantine(outbox)
    assert outbox.generation == 1
    assert outbox.pending_count(until) == 0
    assert outbox.status_of(accepted).state == "pending"
    _append(outbox, 1, after=5)
    assert outbox.quarantine.salvage(moved).entries == 1
    assert (outbox.pending_count(until), outbox.unsettled_count(producer_id=9)) == (2, 0)
    assert outbox.status_of(accepted).state == "pending"


def test_no_call_fails_because_it_is_the_first_to_find_damage(path: Path) -> None:
    """Each method quarantines the file if the outbox may repair it, and raises OutboxDamaged otherwise."""
    calls: list[Callable[[Outbox], object]] = [
        lambda outbox: outbox.status(),
        lambda outbox: outbox.pending_count(),
        lambda outbox: outbox.unsettled_count(),
        lambda outbox: outbox.last_position(),
        lambda outbox: outbox.check_now(Position(9, 0)),
        lambda outbox: outbox.resend(0),
    ]
    for call in calls:
        _filled(path)
        with Outbox(path, repair=True) as outbox, Outbox(path) as reading:
            reading.close()
            _overwrite(path, 0.0, "noise", path.stat().st_size)
            with pytest.raises(OutboxDamaged):
                call(reading)
            outbox.close()
            call(outbox)
            assert len(outbox.quarantine.damaged_files()) == 1
        shutil.rmtree(path.parent)


def test_a_file_that_is_damaged_while_it_is_open_is_quarantined(
    path: Path, relay_of: Callable[[Outbox], Relay], redis: fakeredis.FakeRedis
) -> None:
    """The relay finds the damage, after the producer has appended to the file."""
    before = _filled(path)
    outbox = Outbox(path, repair=True)
    relay = relay_of(outbox)
    _overwrite(path, 0.5, "noise")
    new = _append(outbox, 2, after=9000)
    _sweep(relay)
    _sweep(relay)

    assert len(outbox.quarantine.salvaged_files()) == 1
    assert {_job_id(one) for one in new} <= set(queue_of(redis).job_ids)
    assert COUNT * 0.7 < len(set(queue_of(redis).job_ids) & set(before)) < COUNT


def test_salvaged_entries_keep_their_state(path: Path, relay_of: Callable[[Outbox], Relay]) -> None:
    """Stored entries are kept for a resend, and sent entries are checked when their check is due."""
    with Outbox(path, repair=True) as outbox:
        relay = relay_of(outbox)
        accepted = _append(outbox, COUNT)
        found = {
            one.sequence: Acknowledgement(one.source_id, one.sequence, one.nonce, None, Outcome("stored", 7), at=0)
            for one in accepted[:100]
        }
        found[100] = found[100]._replace(outcome=Outcome("rejected", reason="no"))
        outbox.deliveries.settle(accepted[0].source_id, 0, found)
        outbox.deliveries.mark_sent({entry.position: 200.0 for entry in outbox.deliveries.pending(100)})
        relay.turn._lock.acquire()
        relay.turn._lock.release()
    _overwrite(path, 0.0, "noise", 4096)
    outbox = Outbox(path, repair=True)
    _sweep(relay_of(outbox))
    status = outbox.status()
    assert (status.stored, status.rejected, status.sent) == (99, 1, 200)
    assert outbox.status_of(accepted[0]).row_id == 7
    assert outbox.status_of(accepted[99]).reason == "no"
    assert outbox.quarantine.losses() == {}
    (source,) = outbox.sources()
    assert (source.full_name, source.current, source.left_because) == (accepted[0].source, False, "damaged")


@pytest.mark.parametrize("after", ["removal", "damage"])
def test_entries_that_redis_has_are_not_sent_twice(
    path: Path, relay_of: Callable[[Outbox], Relay], redis: fakeredis.FakeRedis, after: str
) -> None:
    """Neither after they were carried over into another file nor after a salvage, however many they are."""
    outbox = Outbox(path, repair=True)
    accepted = _append(outbox, 4 * COUNT)
    relay = relay_of(outbox)
    for _ in range(3):
        relay.sweep()
    job_ids = queue_of(redis).job_ids
    assert sorted(job_ids) == sorted(map(_job_id, accepted))
    if after == "removal":
        path.unlink()
    else:
        relay.turn.end()
        _quarantine(outbox)
        outbox.close()
        outbox = Outbox(path, repair=True)
        relay = relay_of(outbox)
    _sweep(relay)
    assert outbox.status().sent == 4 * COUNT
    assert queue_of(redis).job_ids == job_ids


def test_entries_whose_acknowledgements_wait_are_not_sent_after_a_salvage(
    path: Path, relay_of: Callable[[Outbox], Relay], redis: fakeredis.FakeRedis
) -> None:
    """Workers have stored them, and completed their jobs, before the file was damaged."""
    outbox = Outbox(path, repair=True)
    accepted = _append(outbox, COUNT)
    relay = relay_of(outbox)
    relay.sweep()
    for one in accepted:
        redis.hset(acknowledgement_key(one.source), _job_id(one), f"{int(time.time())} {one.event_id} stored:7")
    redis.delete(queue_of(redis).key, *[f"rq:job:{_job_id(one)}" for one in accepted])
    relay.turn.end()
    _quarantine(outbox)
    outbox.close()
    outbox = Outbox(path, repair=True)
    relay = relay_of(outbox)
    _sweep(relay)
    assert (outbox.status().stored, queue_of(redis).count) == (COUNT, 0)


def test_a_damaged_outcome_and_a_full_disk_do_not_end_a_salvage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of an outcome is not a number. The temporary table does not fit on the disk at first."""
    with Outbox(path, repair=True) as outbox:
        (accepted,) = _append(outbox, 1)
        _append(outbox, 1, after=9)
        stored = Acknowledgement(accepted.source_id, 1, accepted.nonce, None, Outcome("stored", 7), at=0)
        outbox.deliveries.settle(accepted.source_id, 0, {1: stored})
        with outbox._file.transaction() as db:
            db.execute("UPDATE outcomes SET settled_at = 1.5")
    moved = _with_no_number(path, count=2)  # in the table and in its index
    with Outbox(path, repair=True) as outbox:
        with monkeypatch.context() as patch:
            patch.setattr(outbox_salvage, "_copy_outcomes", _full_disk)
            with pytest.raises(OutboxError, match="damaged-1: database or disk is full"):
                outbox.quarantine.salvage(moved)
        assert outbox.quarantine.salvage(moved).entries == 2
        assert outbox.status().depth == 2


@pytest.mark.parametrize(
    "values", ["NULL, 5.0, 7, 'text'", "NULL, 5.0, NULL, 7", "NULL, 5.0, 'text', NULL", "NULL, 'text', 7, NULL"]
)
def test_a_record_of_another_table_is_not_taken_for_the_outcome_of_an_entry(path: Path, values: str) -> None:
    """It has as many columns as an outcome, and the position of the entry."""
    with Outbox(path) as outbox:
        _append(outbox, 1)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE other (id INTEGER PRIMARY KEY, a, b, c)")
        db.execute(f"INSERT INTO other VALUES ({values})")
    with Outbox(path.with_name("new.db")) as new:
        assert new.quarantine.salvage(path).entries == 1
        assert (new.status().pending, new.status().stored, new.status().rejected) == (1, 0, 0)


def _with_no_number(path: Path, count: int) -> Path:
    """Replace the number 1.5, which the file contains `count` times, by bytes that are no number; quarantine it."""
    content = path.read_bytes()
    assert content.count(struct.pack(">d", 1.5)) == count
    path.write_bytes(content.replace(struct.pack(">d", 1.5), b"\xff" * 8))
    return path.rename(path.with_name("outbox.db.damaged-1"))


def test_an_entry_whose_time_is_not_a_number_does_not_end_a_salvage(path: Path) -> None:
    """Its number is reported as lost, and the other entries are salvaged."""
    with Outbox(path, repair=True) as outbox:
        _append(outbox, 3)
        with outbox._file.transaction() as db:
            db.execute("UPDATE entries SET recorded_at = 1.5 WHERE sequence = 2")
    moved = _with_no_number(path, count=1)
    with Outbox(path, repair=True) as outbox:
        assert outbox.quarantine.salvage(moved).entries == 2
        assert [entry.sequence for entry in outbox.entries()] == [1, 3]
        assert _lost(outbox) == {2}


def test_losses_in_several_files_are_listed_by_source_and_number(path: Path) -> None:
    """A repeated salvage of one file leaves those of the others unchanged."""
    with Outbox(path) as outbox:
        names = {
            outbox.append(name, [a_snapshot(after=timedelta(n)) for n in range(6)])[0].source_id: name for name in "ab"
        }
    low, high = sorted(names)
    damaged = [path.with_name(f"outbox.db.damaged-{n}") for n in (1, 2)]
    for file, lost in zip(damaged, ([(low, 5)], [(low, 3), (high, 2)]), strict=True):
        shutil.copy(path, file)
        with closing(sqlite3.connect(file)) as db, db:
            db.executemany("DELETE FROM entries WHERE source_id = ? AND sequence = ?", lost)
    expected = [(f"{names[low]}/{low}", [(3, 3), (5, 5)]), (f"{names[high]}/{high}", [(2, 2)])]
    with Outbox(path.with_name("new.db")) as new:
        for file in [*damaged, path.with_name("outbox.db.salvaged-1")]:
            new.quarantine.salvage(file)
        assert list(new.quarantine.losses().items()) == expected


def _full_disk(*_: Any) -> Iterator[None]:
    raise sqlite3.OperationalError("database or disk is full")
    yield


def test_a_file_of_another_format_that_a_dead_process_has_taken_out_is_kept(path: Path) -> None:
    """Its entries cannot be recognized, so it is renamed instead of deleted."""
    with Outbox(path, repair=True) as outbox:
        taken_out = path.with_name("outbox.db.taken-out-1")
        with closing(sqlite3.connect(taken_out, isolation_level=None)) as db:
            db.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY, event TEXT)")
            db.execute("INSERT INTO entries VALUES (1, 'an event')")
        before = taken_out.read_bytes()
        for file in outbox.quarantine.damaged_files():
            outbox.quarantine.salvage(file)
        assert outbox.quarantine.damaged_files() == []
        assert [file.read_bytes() for file in outbox.quarantine.lossy_files()] == [before]


@pytest.mark.parametrize("log", ["kept", "damaged", "lost"])
def test_resent_entries_of_a_damaged_file_are_sent(path: Path, log: str) -> None:
    """A salvage may read the outcomes that the resend has deleted: those are of the database that was replaced."""
    with Outbox(path, repair=True) as outbox:
        accepted = _append(outbox, COUNT)
        found = {
            one.sequence: Acknowledgement(one.source_id, one.sequence, one.nonce, None, Outcome("stored", 7), at=0)
            for one in accepted
        }
        outbox.deliveries.mark_sent({entry.position: 200.0 for entry in outbox.deliveries.pending(COUNT)})
        outbox.deliveries.settle(accepted[0].source_id, 0, found)
        with outbox._file.transaction() as db:
            pass
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert outbox.resend(since=0) == COUNT
        copy = path.with_name("copy.db")
        for end in ("", "-wal"):
            shutil.copy(f"{path}{end}", f"{copy}{end}")
    wal = Path(f"{copy}-wal")
    if log == "damaged":
        content = bytearray(wal.read_bytes())
        content[32 + 8 : 32 + 16] = b"\1" * 8  # the salt of its first frame
        wal.write_bytes(content)
    elif log == "lost":
        wal.unlink()
    copy.rename(copy.with_name("outbox.db.damaged-1"))
    for file in wal.parent.glob("copy.db-*"):
        file.rename(path.with_name("outbox.db.damaged-1-wal"))
    with Outbox(path.with_name("new.db"), repair=True) as new:
        new.quarantine.salvage(path.with_name("outbox.db.damaged-1"))
        unsettled = COUNT if log != "lost" else 0  # without its log, the file is as before the resend
        assert (new.status().depth, new.status().stored) == (unsettled, COUNT - unsettled)


def test_a_stored_entry_that_a_damaged_file_has_as_unsettled_is_sent_again(path: Path) -> None:
    """The outcome may be one that a resend has deleted. The other entry has its outcome in both files and keeps it."""
    with Outbox(path) as outbox:
        accepted = _append(outbox, 2)
        found = {
            one.sequence: Acknowledgement(one.source_id, one.sequence, one.nonce, None, Outcome("stored", 7), at=0)
            for one in accepted
        }
        outbox.deliveries.mark_sent({entry.position: 200.0 for entry in outbox.deliveries.pending(2)})
        outbox.deliveries.settle(accepted[0].source_id, 0, {1: found[1]})
        with outbox._file.transaction() as db:
            pass
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        damaged = path.with_name("outbox.db.damaged-1")
        shutil.copy(path, damaged)
        outbox.deliveries.settle(accepted[0].source_id, 0, {2: found[2]})
        assert outbox.status().stored == 2

        assert outbox.quarantine.salvage(damaged).entries == 1
        assert [(entry.sequence, entry.checks) for entry in outbox.deliveries.pending(2)] == [(2, 0)]
        assert [outbox.status_of(one).state for one in accepted] == ["stored", "pending"]
        assert outbox.status().stored == 1


def test_one_text_that_is_not_utf_8_loses_one_entry(
    path: Path, relay_of: Callable[[Outbox], Relay], redis: fakeredis.FakeRedis
) -> None:
    """One byte is invalid, which SQLite does not detect."""
    _filled(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE entries SET event = CAST(CAST(event AS BLOB) || x'ff' AS TEXT) WHERE sequence = 150")
    outbox = Outbox(path, repair=True)
    _sweep(relay_of(outbox))

    assert _lost(outbox) == {150}
    assert sorted(int(job_id.split("-")[1]) for job_id in queue_of(redis).job_ids) == [
        n for n in range(1, COUNT + 1) if n != 150
    ]


@pytest.mark.parametrize("content", [b"somebody's notes\n" * 1000, b"somebody's notes"])
def test_a_file_that_never_was_an_outbox_is_left_alone(path: Path, content: bytes) -> None:
    """It was configured by mistake: no relay has left its lock beside it."""
    path.parent.mkdir()
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(OutboxDamaged, match=f"^outbox {path}: ") as raised:
            Outbox(path, repair=True)
        assert raised.value.advice == "the file is of another program: set HISTORY_OUTBOX to another path"
    assert path.read_bytes() == content
    assert [one.name for one in path.parent.iterdir()] == ["outbox.db"]


@pytest.mark.parametrize("beside", ["-relay", "-pair", "-wal"])
def test_an_outbox_that_was_emptied_is_quarantined(path: Path, beside: str, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite would treat it as new and remove its log."""
    path.parent.mkdir()
    path.touch()
    path.with_name(path.name + beside).write_bytes(b"some content")
    with pytest.raises(OutboxDamaged, match=f"outbox.db: the file is empty .*outbox.db{beside} exists"):
        Outbox(path)
    with Outbox(path, repair=True) as outbox:
        accepted = _append(outbox, 1)
        (moved,) = outbox.quarantine.damaged_files()
        assert moved.stat().st_size == 0
        assert moved.with_name(f"{moved.name}-wal").exists() == (beside == "-wal")
        assert [entry.job_id for entry in outbox.entries()] == [_job_id(one) for one in accepted]
    assert "the file is empty (0 bytes)" in caplog.text
    assert "was moved to" in caplog.text


def test_an_empty_file_that_replaced_an_open_one_is_quarantined(path: Path) -> None:
    """The open file still has all entries."""
    with Outbox(path, repair=True) as outbox:
        accepted = _append(outbox, 3)
        path.unlink()
        path.touch()
        accepted += _append(outbox, 1)
        assert [entry.job_id for entry in outbox.entries()] == [_job_id(one) for one in accepted]
        assert len(outbox.quarantine.damaged_files()) == 1


@pytest.mark.parametrize("made", [True, False], ids=["empty", "none"])
def test_a_new_file_is_not_taken_for_a_damaged_one(path: Path, made: bool) -> None:
    """Neither an empty file made by an administrator, nor a new file beside the files that a removed one left."""
    path.parent.mkdir()
    if made:
        path.touch()
    else:
        path.with_name(f"{path.name}-pair").write_bytes(b"[]")
        path.with_name(f"{path.name}-relay").touch()
    with Outbox(path, repair=True) as outbox, Outbox(path, repair=True):
        assert outbox.quarantine.damaged_files() == []


@pytest.mark.parametrize("count", [COUNT, 0], ids=["entries", "sources alone"])
def test_a_damaged_outbox_is_recognized_by_its_content(path: Path, count: int) -> None:
    """It was put back from a backup without the small files beside it."""
    _filled(path)
    if not count:
        with Outbox(path) as outbox, outbox._file.transaction() as db:
            db.execute("DELETE FROM entries")
    for end in ("-relay", "-pair"):
        path.with_name(path.name + end).unlink()
    _overwrite(path, 0.0, "noise", 4096)
    with pytest.raises(OutboxDamaged):
        Outbox(path)
    with Outbox(path, repair=True) as outbox:
        _append(outbox, 1)
        assert len(outbox.quarantine.damaged_files()) == 1


@pytest.mark.parametrize("columns", [3, 6, 10])
def test_a_damaged_database_of_another_program_is_left_alone(path: Path, columns: int) -> None:
    """Also if its rows have as many columns as those of an outbox: a source has 6, and an entry 10."""
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"CREATE TABLE accounts ({', '.join(f'c{n}' for n in range(columns))})")
        for one in range(500):
            values = (one, random.Random(one).randbytes(16).hex(), *range(one, one + columns - 2))
            db.execute(f"INSERT INTO accounts VALUES ({', '.join('?' * columns)})", values)
    _overwrite(path, 0.0, "noise", 4096)
    content = path.read_bytes()
    with pytest.raises(OutboxDamaged):
        Outbox(path, repair=True)
    assert path.read_bytes() == content
    assert [one.name for one in path.parent.iterdir()] == ["outbox.db"]


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """Simulate root; return the owner given to each file, by its inode."""
    given: dict[int, tuple[int, int]] = {}
    stat_before = os.stat

    def fchown(descriptor: int, uid: int, gid: int) -> None:
        given[os.fstat(descriptor).st_ino] = (uid, gid)

    def stat(path: Any, **named: Any) -> os.stat_result:
        found = stat_before(path, **named)
        changed = list(found)
        changed[4:6] = given.get(found.st_ino, (1234, 567))
        return os.stat_result(changed)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", fchown)
    monkeypatch.setattr("producers.outbox_place.os.stat", stat)
    return given


def test_files_created_by_root_get_the_owner_of_the_earlier_files(
    path: Path, owners: dict[int, tuple[int, int]]
) -> None:
    """An operator's command finds the damage first, and another user's producer must be able to use the new file."""
    path.parent.mkdir(mode=0o750)
    with Outbox(path, repair=True) as outbox:
        assert outbox.relay_lock().acquire()
        for end in ("", "-pair", "-relay"):
            found = path.with_name(path.name + end).stat()
            assert (owners[found.st_ino], found.st_mode & 0o777) == ((1234, 567), 0o640)
    path.chmod(0o660)
    _overwrite(path, 0.0, "noise", 4096)
    with Outbox(path, repair=True) as outbox:
        (moved,) = outbox.quarantine.damaged_files()
        assert path.stat().st_ino != moved.stat().st_ino
        assert (owners[path.stat().st_ino], path.stat().st_mode & 0o777) == ((1234, 567), 0o660)


def test_opening_a_damaged_file_for_reading_leaves_it_in_place(path: Path) -> None:
    """`outbox status`, for example, reports the damage."""
    _filled(path)
    _overwrite(path, 0.0, "noise")
    with pytest.raises(OutboxDamaged, match=f"^outbox {path}: "):
        Outbox(path)
    assert sorted(one.name for one in path.parent.iterdir()) == ["outbox.db", "outbox.db-pair", "outbox.db-relay"]


def test_a_quick_check_finds_damage_and_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It returns the first fault, or SQLite's error if there is no time to find the fault."""
    _filled(path)
    _overwrite(path, 0.5, "noise")
    monkeypatch.setattr(outbox_check, "_CHECK_STEPS", 1)
    with Outbox(path) as outbox:
        found = outbox.quick_check(60)
        assert found
        assert "in database main" in found

        def end_of_time(statement: str) -> None:
            if "quick_check" in statement:
                monkeypatch.setattr(time, "monotonic", lambda: float("inf"))

        outbox._file._connections["NORMAL"].set_trace_callback(end_of_time)
        assert outbox.quick_check(60) == f"outbox {path}: database disk image is malformed"
        monkeypatch.undo()
    assert path.exists()


def test_a_quick_check_finds_damage_on_pages_that_no_state_needs(path: Path) -> None:
    """The text of a large event is on several pages, and each has the number of the next one."""
    with Outbox(path) as outbox:
        outbox.append(NAME, [an_archive(signals=[a_signal()] * 50)])
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4096 // 2 * 4096)
        file.write(b"\xff" * 4)
    with Outbox(path) as outbox:
        found = outbox.quick_check(60)
        assert found is not None
        assert "in database main" in found


def _use_damaged(path: Path, pipe: Any) -> None:
    pipe.recv()
    with Outbox(path, repair=True) as outbox:
        pipe.send([_job_id(one) for _ in range(5) for one in _append(outbox, 1)])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_processes_that_find_damage_together_quarantine_the_file_once(path: Path) -> None:
    """All of them continue with the same new file."""
    _filled(path)
    _overwrite(path, 0.0, "noise")
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(4)]
    users = [context.Process(target=_use_damaged, args=(path, pipe), daemon=True) for _, pipe in pipes]
    for user in users:
        user.start()
    for pipe, _ in pipes:
        pipe.send("now")
    accepted = [job_id for pipe, _ in pipes for job_id in pipe.recv()]
    for user in users:
        user.join(60)

    assert [user.exitcode for user in users] == [0] * 4
    with Outbox(path) as outbox:
        assert sorted(entry.job_id for entry in outbox.entries()) == sorted(accepted)
        assert [entry.sequence for entry in outbox.entries()] == list(range(1, 21))
        assert len(outbox.quarantine.damaged_files()) == 1


def test_a_late_quarantine_leaves_the_new_file_in_place(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Several outboxes found the same damage; the later ones find a sound file at the path."""
    _filled(path)
    _overwrite(path, 0.5, "noise")
    first, second, third = (Outbox(path, repair=True) for _ in range(3))
    third.close()
    quarantined: list[list[Path]] = []
    for outbox in (first, second, third):
        with outbox.repaired():
            raise OutboxDamaged("as reported by SQLite")
        quarantined.append(outbox.quarantine.damaged_files())
        _append(outbox, 1)

    assert quarantined[0] == quarantined[1] == quarantined[2]
    assert len(quarantined[0]) == 1
    assert [one.generation for one in (first, second, third)] == [1, 2, 1]
    assert caplog.text.count("was moved to") == 1
    assert [entry.sequence for entry in first.entries()] == [1, 2, 3]


def test_events_of_a_process_that_has_the_damaged_file_open_are_not_lost(
    path: Path, relay_of: Callable[[Outbox], Relay], redis: fakeredis.FakeRedis
) -> None:
    """The file is renamed while it is open: new events are in the new file, and earlier entries are salvaged."""
    before = _filled(path)
    _overwrite(path, 0.5, "noise")
    busy, other = Outbox(path, repair=True), Outbox(path, repair=True)
    relay = relay_of(other)
    mine = _append(busy, 2, after=9000)
    _sweep(relay)
    mine += _append(busy, 2, after=9002)
    _sweep(relay)

    assert {_job_id(one) for one in mine} <= set(queue_of(redis).job_ids)
    assert len(set(queue_of(redis).job_ids) & set(before)) > COUNT * 0.7


def _open_files(folder: Path, name: str) -> list[str]:
    """Return the files in a folder that this process has open and whose path contains `name`."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of /proc/self/fd itself
            found.append(os.readlink(descriptor))
    return [one for one in found if one.startswith(str(folder)) and name in one]


@pytest.mark.parametrize("repair", [True, False])
def test_a_file_that_cannot_be_opened_is_closed_again(path: Path, repair: bool) -> None:
    """Another version wrote it, or a table is missing. An open file would keep its space after its removal."""
    _filled(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(OutboxError, match="newer version"):
        Outbox(path, repair=repair)
    assert _open_files(path.parent, "outbox.db") == []
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("DROP TABLE outbox")
    with pytest.raises(OutboxError, match="no such table"):
        Outbox(path, repair=repair)
    assert _open_files(path.parent, "outbox.db") == []


def test_a_damaged_file_is_closed_before_its_content_is_looked_at(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would release the locks that SQLite has on it in this process."""
    _filled(path)
    open_files = []

    def has_content(file: Path) -> bool:
        open_files.append(_open_files(file.parent, "outbox.db"))
        return True

    monkeypatch.setattr("producers.outbox.has_content_of_an_outbox", has_content)
    with Outbox(path, repair=True) as outbox:
        _append(outbox, 1, after=9000)
        for end in ("-relay", "-pair"):
            path.with_name(path.name + end).unlink()
        _quarantine(outbox)
    assert open_files == [[]]


def test_an_append_during_which_the_file_is_quarantined_and_salvaged_is_not_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its commit goes into the renamed file after the relay of another process has read that file."""
    _filled(path)
    _overwrite(path, 0.5, "noise")
    busy, other = Outbox(path, repair=True), Outbox(path, repair=True)

    def quarantined_meanwhile(*arguments: Any) -> str:
        monkeypatch.undo()
        (moved,) = _quarantine(other)
        other.quarantine.salvage(moved)
        return Draft.text(*arguments)

    monkeypatch.setattr(Draft, "text", quarantined_meanwhile)
    accepted = _append(busy, 1, after=9000)

    with Outbox(path) as reading:
        assert {_job_id(one) for one in accepted} <= {entry.job_id for entry in reading.entries()}
        assert len(reading.quarantine.salvaged_files()) == 1
        assert reading.quarantine.damaged_files() == []
    assert "outbox.db was removed, and its entries cannot be read: database disk image is malformed" in caplog.text
    assert list(path.parent.glob("*.taken-out-*")) == []
    assert _open_files(path.parent, "taken-out") == []


def test_an_interrupted_salvage_is_repeated_without_doubling_an_entry(
    path: Path,
    relay_of: Callable[[Outbox], Relay],
    redis: fakeredis.FakeRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The relay's process ended halfway."""
    monkeypatch.setattr(outbox_salvage, "_INSERT_PAGE", 50)
    before = _filled(path)
    _overwrite(path, 0.5, "noise")
    with Outbox(path, repair=True) as outbox:
        (moved,) = _quarantine(outbox)
        steps = outbox.quarantine.salvaging(moved)
        while not outbox.entries():
            next(steps)
        assert 1 < len(outbox.entries()) <= 50
        del steps
    outbox = Outbox(path, repair=True)
    assert outbox.quarantine.damaged_files() == [moved]
    _sweep(relay_of(outbox))

    job_ids = queue_of(redis).job_ids
    assert len(job_ids) == len(set(job_ids)) == len(outbox.entries())
    assert set(job_ids) <= set(before)
    first = min(before[job_id][0] for job_id in job_ids)
    assert len(_lost(outbox)) == COUNT - len(job_ids) - (first - 1)
    lost = outbox.quarantine.losses()
    again = outbox.quarantine.salvage(*outbox.quarantine.salvaged_files())
    assert (again.entries, again.unread) == (0, lost)
    assert outbox.quarantine.losses() == lost
    assert len(outbox.quarantine.salvaged_files()) == 1


def test_a_repeated_salvage_keeps_the_number_of_resends(path: Path) -> None:
    """Otherwise acknowledgements from before a resend would settle its entries."""
    _filled(path)
    outbox = Outbox(path, repair=True)
    outbox.quarantine.salvage(*_quarantine(outbox))
    outbox.deliveries.mark_sent({entry.position: 1.0 for entry in outbox.deliveries.pending(1)})
    ((_, _, resends),) = outbox.deliveries.awaiting("sent")
    assert resends == 0
    outbox.resend(since=0)
    outbox.quarantine.salvage(*outbox.quarantine.salvaged_files())
    outbox.deliveries.mark_sent({entry.position: 1.0 for entry in outbox.deliveries.pending(1)})
    ((_, _, resends),) = outbox.deliveries.awaiting("sent")
    assert resends == 1


def test_a_damaged_copy_gives_back_its_entry_with_the_number_of_another(path: Path, tmp_path: Path) -> None:
    """Two copies may give one number to two events. Both are delivered."""
    with Outbox(path) as outbox:
        _append(outbox, 1)
    shutil.copy(path, tmp_path / "copy.db")
    with Outbox(tmp_path / "copy.db") as copy:
        (foreign,) = _append(copy, 1, after=5)
    outbox = Outbox(path, repair=True)
    (own,) = _append(outbox, 1, after=7)
    assert own.sequence == foreign.sequence
    outbox.quarantine.salvage(tmp_path / "copy.db")
    assert {_job_id(own), _job_id(foreign)} <= {entry.job_id for entry in outbox.entries()}
    assert len(outbox.entries()) == 3


@pytest.mark.parametrize(("event", "name"), [("event", NAME), ("json_remove(event, '$.source')", "unknown")])
def test_a_source_that_cannot_be_read_gets_the_name_that_is_in_its_events(path: Path, event: str, name: str) -> None:
    with Outbox(path) as outbox:
        (accepted,) = _append(outbox, 1)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE entries SET event = {event}")
        db.execute("DELETE FROM sources")
    with Outbox(path.with_name("new.db")) as new:
        new.quarantine.salvage(path)
        assert [source.full_name for source in new.sources()] == [f"{name}/{accepted.source_id}"]
        assert [entry.job_id for entry in new.deliveries.pending(2)] == [_job_id(accepted)]


def _quarantine(outbox: Outbox) -> list[Path]:
    with outbox.repaired():
        raise OutboxDamaged("as reported by SQLite")
    return outbox.quarantine.damaged_files()


def test_an_older_file_beside_a_newer_log_does_not_stop_new_events(
    path: Path, tmp_path: Path, relay_of: Callable[[Outbox], Relay], redis: fakeredis.FakeRedis
) -> None:
    """A backup was put back by `cp` after the process had been killed, so that its log is still there."""
    _filled(path)
    shutil.copyfile(path, tmp_path / "older.db")
    with Outbox(path) as outbox:
        _append(outbox, 200, after=1000)
        outbox.deliveries.mark_sent({entry.position: 300.0 for entry in outbox.deliveries.pending(50)})
        newer = tmp_path / "newer-wal"
        shutil.copyfile(path.with_name("outbox.db-wal"), newer)
    shutil.copyfile(tmp_path / "older.db", path)
    shutil.copyfile(newer, path.with_name("outbox.db-wal"))

    outbox = Outbox(path, repair=True)
    relay = relay_of(outbox)
    new = _append(outbox, 1, after=9000)
    _sweep(relay)
    new += _append(outbox, 1, after=9001)
    _sweep(relay)
    assert {_job_id(one) for one in new} <= set(queue_of(redis).job_ids)
    assert outbox.quick_check(60) is None
    assert len(outbox.entries()) >= COUNT + 2


def test_a_damaged_file_in_a_read_only_folder_raises_an_error_that_names_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk became read-only when it failed: the call raises OutboxError, and nothing is recorded."""
    _filled(path)
    outbox = Outbox(path, repair=True)
    _overwrite(path, 0.0, "noise")
    outbox.close()

    def read_only(*_: Any) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(OutboxError, match=r"outbox\.db: "):
        _append(outbox, 1)


@pytest.mark.parametrize(
    ("ranges", "text"), [([(2, 3), (6, 6)], "2-3, 6"), ([(1, 1)], "1"), ([], "")], ids=["two", "one", "none"]
)
def test_ranges_text_joins_inclusive_ranges(ranges: list[tuple[int, int]], text: str) -> None:
    """A range of one number is that number."""
    assert ranges_text(ranges) == text
