"""Another process changes the file of an outbox between two steps of this one, or an error ends a step halfway."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from producers.acknowledgements import Acknowledgement, Outcome
from producers.errors import OutboxDamaged, OutboxError
from producers.outbox import Outbox
from producers.outbox_carry_over import CarryOver
from producers.outbox_file import OutboxFile
from producers.outbox_salvage import has_content_of_an_outbox, has_readable_entries
from tests.forking import in_child
from tests.outbox_entries import append_snapshots, job_ids_at, job_ids_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "outbox.db"


def _at_connect(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]) -> None:
    """Call `meanwhile` whenever SQLite opens a file."""
    connect = sqlite3.connect

    def connected(*arguments: Any, **named: Any) -> sqlite3.Connection:
        meanwhile()
        connection: sqlite3.Connection = connect(*arguments, **named)
        return connection

    monkeypatch.setattr(sqlite3, "connect", connected)


def test_a_file_that_is_replaced_when_its_second_connection_is_opened_keeps_its_entries(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and appending have separate connections. Both must be of the file at the path."""
    with Outbox(path) as outbox:
        before = append_snapshots(outbox, 2)
    with Outbox(path.with_name("other.db")) as other:
        there = append_snapshots(other, 1, after=5)

    with Outbox(path) as outbox:  # it has read the file, and has appended nothing yet

        def replaced() -> None:
            monkeypatch.undo()
            other.path.replace(path)

        _at_connect(monkeypatch, replaced)
        after = append_snapshots(outbox, 1, after=9)
        assert outbox.generation == 1
        assert outbox.status().pending == 4
    assert job_ids_at(path) == job_ids_of([*there, *before, *after])


def test_a_file_that_is_replaced_at_each_try_to_open_it_raises_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the call would never return. The next call works if the file stays in its place."""
    outbox = Outbox(path)
    outbox.close()
    names = (path.with_name(f"moved-{n}") for n in itertools.count())
    _at_connect(monkeypatch, lambda: path.rename(next(names)) if path.exists() else None)
    with pytest.raises(OutboxError, match=f"^outbox {path}: was replaced 5 times while it was being opened$"):
        append_snapshots(outbox)
    monkeypatch.undo()
    accepted = append_snapshots(outbox)
    assert job_ids_at(path) == job_ids_of(accepted)


def test_a_second_name_that_another_process_removes_meanwhile_is_no_reason_for_a_copy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the second name. The first one replaces the file, before the other one may change it."""
    Outbox(path).close()
    second = path.with_name("second.db")
    second.hardlink_to(path)
    lock = fcntl.flock

    def locked(descriptor: int, operation: int) -> None:
        second.unlink(missing_ok=True)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", locked)
    before = path.stat().st_ino
    Outbox(path, repair=True).close()
    assert path.stat().st_ino == before


def test_entries_that_a_child_has_carried_over_are_not_carried_over_again(path: Path) -> None:
    """The path is unusable at the fork, so that parent and child both have the entries of the removed file."""
    outbox = Outbox(path)
    before = append_snapshots(outbox, 2)
    path.unlink()
    path.mkdir()
    with pytest.raises(OutboxError, match="is a folder"):
        append_snapshots(outbox)

    def append() -> None:
        path.rmdir()
        assert [one.sequence for one in append_snapshots(outbox)] == [3]

    assert in_child(append) == 0
    assert [one.sequence for one in append_snapshots(outbox)] == [4]
    found = job_ids_at(path)
    assert found[:2] == job_ids_of(before)
    assert len(found) == 4


def test_entries_that_do_not_fit_into_the_new_file_are_carried_over_when_it_has_room(path: Path) -> None:
    """Until then, each call raises an error, and the entries are in a file beside the outbox."""
    with Outbox(path.with_name("full.db")) as full:
        settled = append_snapshots(full, 300)
        full.deliveries.mark_sent({one.position: 0.0 for one in full.deliveries.pending(300)})
    outbox = Outbox(path, max_bytes=2**17)
    before = append_snapshots(outbox, 2, after=1000)
    full.path.replace(path)
    for _ in range(2):
        with pytest.raises(OutboxError, match="is full"):
            append_snapshots(outbox)
    assert len(list(path.parent.glob("*.taken-out-*"))) == 1

    with Outbox(path) as other:
        assert other.quarantine.damaged_files() == []  # this process still has them
        stored = Outcome("stored", row_id=1)
        found = {one: Acknowledgement(one.source_id, one.sequence, one.nonce, None, stored, at=0) for one in settled}
        other.deliveries.settle(settled[0].source_id, 0, found)
        assert other.deliveries.prune(keep_seconds=-1) == 300
    after = append_snapshots(outbox, 1, after=2000)
    assert job_ids_at(path) == job_ids_of([*before, *after])
    assert list(path.parent.glob("*.taken-out-*")) == []
    assert outbox.generation == 1


def test_entries_of_a_removed_file_are_carried_over_when_the_disk_has_room_again(path: Path) -> None:
    """A limit of the process simulates the full disk. Until then, each call raises an error."""
    outbox = Outbox(path)
    before = append_snapshots(outbox, 20)
    path.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for _ in range(2):
            with pytest.raises(OutboxError, match=f"^outbox {path}"):
                append_snapshots(outbox)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(path.parent.glob("*.taken-out-*")) == []
    after = append_snapshots(outbox, after=30)
    assert job_ids_at(path) == job_ids_of([*before, *after])


def test_the_note_beside_a_file_that_replaced_another_one_names_it_before_its_log_exists(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the process dies then, the log of the new file is not taken for that of the earlier one."""
    for file in (path, path.with_name("other.db")):
        Outbox(file).close()
    path.with_name("other.db").replace(path)
    found = path.stat()
    notes = []
    _at_connect(monkeypatch, lambda: notes.append(json.loads(path.with_name("outbox.db-pair").read_text())))
    Outbox(path).close()
    assert notes == [[[found.st_dev, found.st_ino], None]]


def test_a_file_that_cannot_be_opened_is_not_quarantined(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether another process has replaced the damaged file is not known then."""
    with Outbox(path, repair=True) as outbox:
        outbox.relay_lock().acquire()
        accepted = append_snapshots(outbox)
        outbox.close()

        def fail(*_: object, **__: object) -> None:
            raise sqlite3.OperationalError("unable to open database file")

        monkeypatch.setattr(sqlite3, "connect", fail)
        with pytest.raises(OutboxError, match="unable to open"):
            _quarantine(outbox)
        monkeypatch.undo()
        assert outbox.quarantine.damaged_files() == []
        assert [entry.job_id for entry in outbox.entries()] == job_ids_of(accepted)


def test_an_open_damaged_file_that_another_process_has_quarantined_prevents_no_event(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its entries cannot be carried over. A relay salvages them from the quarantined file."""
    with Outbox(path, repair=True) as outbox, Outbox(path, repair=True) as other:
        outbox.relay_lock().acquire()
        append_snapshots(outbox)
        _quarantine(other)

        def fail(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(CarryOver, "take_out", fail)
        _quarantine(outbox)
        after = append_snapshots(outbox, after=1)
        assert [entry.job_id for entry in outbox.entries()] == job_ids_of(after)
    assert "its entries could not be carried over: disk I/O error" in caplog.text


def test_a_snapshot_shows_one_state_while_others_write(path: Path) -> None:
    with Outbox(path) as writing, Outbox(path) as reading:
        append_snapshots(writing)
        count = "SELECT count(*) FROM entries"
        with reading._file.snapshot() as db:
            assert db.execute(count).fetchone() == (1,)
            append_snapshots(writing)
            assert db.execute(count).fetchone() == (1,)
        assert reading.status().pending == 2


@pytest.mark.parametrize("block", [OutboxFile.snapshot, OutboxFile.transaction])
def test_an_error_that_has_ended_the_transaction_is_reported(
    path: Path, block: Callable[[OutboxFile], AbstractContextManager[sqlite3.Connection]]
) -> None:
    """SQLite rolls back by itself after some errors, for example of the disk. The file can be used again."""
    file = OutboxFile(path, 2**20, prepare=lambda _: None)

    def fail() -> None:
        with block(file) as db:
            db.execute("ROLLBACK")
            raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(OutboxError, match=f"^outbox {path}: disk I/O error$"):
        fail()
    with block(file) as db:
        assert db.execute("SELECT 1").fetchone() == (1,)


def _quarantine(outbox: Outbox) -> Path:
    with outbox.repaired():
        raise OutboxDamaged("as reported by SQLite")
    return outbox.quarantine.damaged_files()[-1]


def test_a_quarantined_file_replaces_no_earlier_one(path: Path) -> None:
    """Its name has its inode, which an earlier file may have had too."""
    with Outbox(path, repair=True) as outbox:
        outbox.relay_lock().acquire()
        accepted = append_snapshots(outbox)
        first = path.with_name(f"outbox.db.damaged-{path.stat().st_ino}")
        earlier = [first, first.with_name(f"{first.name}-2")]
        for file in earlier:
            file.write_bytes(b"earlier")
        assert _quarantine(outbox) == first.with_name(f"{first.name}-3")
        assert [file.read_bytes() for file in earlier] == [b"earlier"] * 2
        outbox.quarantine.salvage(first.with_name(f"{first.name}-3"))
        assert [entry.job_id for entry in outbox.entries()] == job_ids_of(accepted)


@pytest.mark.parametrize("user", [0, 1000], ids=["root", "another user"])
def test_each_user_can_quarantine_a_file_and_break_its_second_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    """Root creates the new file at once, with the owner of the earlier one."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with Outbox(path, repair=True) as outbox:
        outbox.relay_lock().acquire()
        accepted = append_snapshots(outbox)
        _quarantine(outbox)
        assert path.exists() == (user == 0)
        accepted += append_snapshots(outbox, after=1)
    path.with_name("second.db").hardlink_to(path)
    with Outbox(path, repair=True) as outbox:
        assert path.stat().st_nlink == 1
        outbox.quarantine.salvage(*outbox.quarantine.damaged_files())
        assert {entry.job_id for entry in outbox.entries()} == set(job_ids_of(accepted))


@pytest.mark.parametrize("found", [has_content_of_an_outbox, has_readable_entries])
def test_a_file_that_was_removed_or_cannot_be_read_has_no_content(path: Path, found: Callable[[Path], bool]) -> None:
    """Another process has moved it meanwhile, or a folder has its name."""
    with Outbox(path) as outbox:
        append_snapshots(outbox)
    assert found(path)
    path.unlink()
    assert not found(path)
    path.mkdir()
    assert not found(path)
    shutil.rmtree(path)
