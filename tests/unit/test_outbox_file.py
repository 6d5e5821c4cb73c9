"""The file of an outbox is removed or replaced while it is open: accepted events are in the file at the path."""

from __future__ import annotations

import fcntl
import itertools
import multiprocessing
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from producers import entry_sender, events, outbox_check
from producers.acknowledgements import Acknowledgement, Outcome
from producers.entries import Accepted
from producers.errors import OutboxError
from producers.file_operations import copy_file, folder_lock
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.relay import Relay
from tests.factories import a_snapshot
from tests.forking import in_child
from tests.outbox_entries import append_snapshots, job_ids_at, job_ids_of
from tests.unit.conftest import queue_of

NAME = "trading-controller"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "outbox.db"


def _settle(outbox: Outbox, one: Accepted) -> None:
    found = Acknowledgement(one.source_id, one.sequence, one.nonce, None, Outcome("stored", row_id=1), at=0)
    assert outbox.deliveries.settle(one.source_id, 0, {"key": found}).changed == ["key"]


def _unlink(path: Path) -> None:
    path.unlink()


def _remove_all_files(path: Path) -> None:
    for one in path.parent.iterdir():
        one.unlink()


def _remove_folder(path: Path) -> None:
    # In one step, because a running producer would create the folder again while its files are removed one by one.
    away = path.parent.with_name("away")
    path.parent.rename(away)
    shutil.rmtree(away)


def _move_away(path: Path) -> None:
    path.rename(path.with_name("moved.db"))


def _replace_by_another(path: Path) -> None:
    with Outbox(path.with_name("new.db")) as other:
        append_snapshots(other, 2, after=50)
    path.with_name("new.db").replace(path)


_removals = pytest.mark.parametrize(
    "remove", [_unlink, _remove_all_files, _remove_folder, _move_away, _replace_by_another]
)


@_removals
def test_appending_after_the_file_was_removed_appends_to_the_file_at_the_path(
    path: Path, caplog: pytest.LogCaptureFixture, remove: Callable[[Path], None]
) -> None:
    """Unsettled entries are carried over once, with state and job ids. One log line reports it."""
    outbox = Outbox(path)
    stored, *before = append_snapshots(outbox, 4)
    _settle(outbox, stored)
    (sent,) = outbox.deliveries.pending(1)
    outbox.deliveries.mark_sent({sent.position: 100.0})
    remove(path)
    after = append_snapshots(outbox, 2, after=10)

    found = job_ids_at(path)
    there = 2 if remove is _replace_by_another else 0
    assert found[there:] == job_ids_of([*before, *after])
    assert [outbox.status_of(one).state for one in (*before, *after)] == ["sent", *["pending"] * 4]
    (overdue,) = outbox.deliveries.overdue(10)
    assert overdue.job_id == sent.job_id  # is its job still in Redis?
    outbox.deliveries.postpone({overdue.position: 100.0})
    assert outbox.deliveries.overdue(10) == []
    assert outbox.generation == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"outbox {path} was removed or replaced while it was in use. Continuing")
    assert record.getMessage().endswith("with 3 entries carried over")
    append_snapshots(outbox, after=20)
    assert len(job_ids_at(path)) == len(found) + 1


@pytest.mark.parametrize("remove", [_unlink, _remove_all_files, _remove_folder, _move_away])
def test_numbers_continue_in_a_new_file(path: Path, remove: Callable[[Path], None]) -> None:
    """The new file also keeps the source, its number of resends and the token: it is the same outbox."""
    outbox = Outbox(path)
    *_, before = append_snapshots(outbox, 3)
    for _ in range(2):
        outbox.resend(since=0)
    token = outbox.header.read().token
    outbox.header.set_destination("database 0 on here", "history")
    remove(path)
    (after,) = append_snapshots(outbox)

    assert (after.source, after.sequence) == (before.source, before.sequence + 1)
    assert outbox.sources()[0].current
    outbox.deliveries.mark_sent({entry.position: 1.0 for entry in outbox.deliveries.pending(2)})
    assert outbox.deliveries.awaiting("sent") == [(before.source_id, NAME, 2)]
    identity = outbox.header.read()
    assert (identity.token, identity.redis, identity.queue) == (token, "database 0 on here", "history")


def test_deleted_rows_are_overwritten(path: Path) -> None:
    """A salvage reads what is left of a file, and must not take a deleted outcome for a present one."""
    with Outbox(path, repair=True) as outbox:
        append_snapshots(outbox)
        modes = [db.execute("PRAGMA secure_delete").fetchone() for db in outbox._file._connections.values()]
        assert modes == [(1,)] * 2


@_removals
@pytest.mark.parametrize("read", ["pending", "overdue"])
def test_a_batch_of_a_file_that_was_replaced_changes_no_other_entry(
    path: Path, read: str, remove: Callable[[Path], None]
) -> None:
    """Its positions are those of other entries, or of none, in the file that is at the path then."""
    outbox = Outbox(path)
    for one in append_snapshots(outbox, 20)[:10]:
        _settle(outbox, one)
    if read == "pending":
        mark: Callable[[dict[int, float]], object] = outbox.deliveries.mark_sent
        batch = [one.position for one in outbox.deliveries.pending(10)]
    else:
        outbox.deliveries.mark_sent({one.position: 0.0 for one in outbox.deliveries.pending(10)})
        mark, batch = outbox.deliveries.postpone, [one.position for one in outbox.deliveries.overdue(10)]
    assert len(batch) == 10
    remove(path)
    append_snapshots(outbox, 5, after=30)
    before = outbox.status()
    assert before.depth == before.pending + before.sent >= 15
    mark(dict.fromkeys(batch, 100.0))
    append_snapshots(outbox, 5, after=40)
    status = outbox.status()
    assert (status.pending, status.sent) == (before.pending + 5, before.sent)
    assert len(outbox.deliveries.pending(100)) == status.pending
    assert len(outbox.deliveries.overdue(100)) == status.sent


def test_new_events_get_the_source_of_an_outbox_that_replaced_the_open_one(path: Path) -> None:
    """Entries that are carried over keep their source."""
    outbox = Outbox(path)
    (before,) = append_snapshots(outbox)
    with Outbox(path.with_name("other.db")) as other:
        (there,) = append_snapshots(other)
        token = other.header.read().token
    path.with_name("other.db").replace(path)
    (after,) = append_snapshots(outbox)

    assert (after.source, after.sequence) == (there.source, 2)
    assert [(one.full_name, one.current) for one in outbox.sources()] == [(there.source, True), (before.source, False)]
    assert [entry.source for entry in outbox.deliveries.pending(5)] == [there.source, before.source, there.source]
    assert outbox.header.read().token == token


def test_newer_entries_are_carried_over_into_an_older_copy_of_the_outbox(path: Path, tmp_path: Path) -> None:
    """No number is used twice. Entries that are unsettled in the copy stay so, which only makes a duplicate."""
    outbox = Outbox(path)
    first = append_snapshots(outbox)
    outbox.close()
    shutil.copyfile(path, tmp_path / "older.db")
    second = append_snapshots(outbox, 2, after=5)
    _settle(outbox, first[0])
    _settle(outbox, second[0])
    (tmp_path / "older.db").replace(path)
    (third,) = append_snapshots(outbox, after=9)

    assert (third.source, third.sequence) == (first[0].source, 4)
    assert [entry.job_id for entry in outbox.entries()] == job_ids_of([*first, second[1], third])
    assert outbox.status().pending == 3


def test_entries_that_a_file_at_the_path_has_are_left_unchanged(path: Path, tmp_path: Path) -> None:
    """An older copy was put back, in which the entries are pending. Only newer entries are carried over as sent."""
    outbox = Outbox(path)
    before = append_snapshots(outbox, 3)
    outbox.close()
    shutil.copyfile(path, tmp_path / "older.db")
    (newer,) = append_snapshots(outbox, after=5)
    outbox.deliveries.mark_sent({entry.position: 100.0 for entry in outbox.deliveries.pending(4)})
    outbox.resend(since=time.time() + 100)
    (tmp_path / "older.db").replace(path)
    assert outbox.status_of(newer).state == "sent"
    assert [outbox.status_of(one).state for one in before] == ["pending"] * 3
    assert [(entry.sequence, entry.checks) for entry in outbox.deliveries.overdue(9)] == [(newer.sequence, 1)]
    assert outbox.deliveries.awaiting("sent") == [(newer.source_id, NAME, 1)]


def test_entries_of_copies_with_the_same_number_are_all_carried_over(path: Path, tmp_path: Path) -> None:
    """Each keeps its state. Two of them have met in the file before."""
    outbox = Outbox(path)
    append_snapshots(outbox)
    outbox.close()
    shutil.copyfile(path, tmp_path / "copy.db")
    with Outbox(tmp_path / "copy.db") as copy:
        (foreign,) = append_snapshots(copy, after=3)
    (sent,) = append_snapshots(outbox, after=5)
    outbox.deliveries.mark_sent({entry.position: 100.0 for entry in outbox.deliveries.pending(2)})
    pending = replace(sent, nonce="f" * 16)
    columns = "recorder, recorded_at, event_id, type, summary, event"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            f"INSERT INTO entries (source_id, sequence, nonce, {columns})"
            f" SELECT source_id, sequence, ?, {columns} FROM entries WHERE sequence = 2",
            (pending.nonce,),
        )
    (tmp_path / "copy.db").replace(path)
    assert foreign.sequence == sent.sequence
    states = [status and status.state for status in outbox.statuses_of([foreign, sent, pending])]
    assert states == ["pending", "sent", "pending"]
    assert len(outbox.entries()) == 4


def test_a_name_that_the_file_at_the_path_does_not_use_any_more_keeps_its_source(path: Path) -> None:
    """Sources of other names, and those that were left, are no reason to leave it."""
    outbox = Outbox(path)
    before = append_snapshots(outbox, 2)
    with Outbox(path.with_name("new.db")) as other:
        (accepted,) = append_snapshots(other)
        other.header.replace_sources([accepted.source])
        other.append("other", [a_snapshot()])
    path.with_name("new.db").replace(path)
    (after,) = append_snapshots(outbox, after=9)
    assert (after.source, after.sequence) == (before[0].source, 3)


@_removals
def test_reading_marking_and_settling_also_carry_over_entries(path: Path, remove: Callable[[Path], None]) -> None:
    """A relay may be the first user of the outbox after the change."""
    for use in (
        lambda outbox, _: outbox.deliveries.pending(10),
        lambda outbox, _: outbox.deliveries.mark_sent({}),
        _settle,
        lambda outbox, _: outbox.status(),
    ):
        outbox = Outbox(path)
        accepted = append_snapshots(outbox, 2)
        remove(path)
        use(outbox, accepted[0])
        assert job_ids_of(accepted) == job_ids_at(path)[-2:]
        outbox.close()
        shutil.rmtree(path.parent)


@_removals
def test_closing_an_outbox_carries_over_the_entries_of_a_removed_file(
    path: Path, remove: Callable[[Path], None]
) -> None:
    """That is the last chance: the file disappears with its last connection."""
    outbox = Outbox(path)
    accepted = append_snapshots(outbox, 2)
    remove(path)
    outbox.close()
    assert job_ids_at(path)[-2:] == job_ids_of(accepted)


def test_closing_logs_an_error_if_entries_cannot_be_carried_over(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file is in the place of the folder."""
    outbox = Outbox(path)
    append_snapshots(outbox)
    shutil.rmtree(path.parent)
    path.parent.write_text("in the way", encoding="utf-8")
    outbox.close()

    (record,) = caplog.records
    assert f"outbox {path} was removed, and its entries could not be carried over: " in record.getMessage()


@pytest.mark.parametrize("remove", [_unlink, _replace_by_another])
def test_a_file_may_be_removed_several_times(path: Path, remove: Callable[[Path], None]) -> None:
    """SQLite's files of one file must not be used for the next file."""
    outbox = Outbox(path)
    accepted = append_snapshots(outbox)
    for n in range(1, 6):
        remove(path)
        accepted += append_snapshots(outbox, 2, after=10 * n)
        if n % 3 == 0:
            outbox.status()
    assert set(job_ids_of(accepted)) <= set(job_ids_at(path))
    assert len(job_ids_at(path)) == len(accepted) + (2 * 5 if remove is _replace_by_another else 0)
    assert outbox.generation == 5


def test_a_new_file_does_not_use_the_log_of_a_removed_file(path: Path, tmp_path: Path) -> None:
    """The process was killed, so that its log is still there, and only the file was removed."""
    with Outbox(path) as outbox:
        append_snapshots(outbox, 3)
        shutil.copytree(path.parent, tmp_path / "killed")
    path = tmp_path / "killed" / "outbox.db"
    assert path.with_name("outbox.db-wal").stat().st_size > 0
    path.unlink()
    accepted = append_snapshots(Outbox(path))
    assert job_ids_at(path) == job_ids_of(accepted)


def test_a_position_in_a_replaced_file_covers_all_entries_of_the_file_there_now(path: Path) -> None:
    """Entries have other positions there: carried-over entries come after the entries that the file had."""
    outbox = Outbox(path)
    append_snapshots(outbox, 1)
    until = outbox.last_position()
    append_snapshots(outbox, 1)
    assert (outbox.pending_count(until), outbox.unsettled_count(until=until)) == (1, 1)
    _replace_by_another(path)
    assert outbox.status().pending == 4
    assert (outbox.pending_count(until), outbox.unsettled_count(until=until)) == (4, 4)
    until = outbox.last_position()
    append_snapshots(outbox, 1)
    assert (outbox.pending_count(until), outbox.unsettled_count(until=until)) == (4, 4)


def test_entries_of_a_removed_file_are_carried_over_before_a_fork(path: Path) -> None:
    """Its connections are closed before the fork; parent and child continue with the new file."""
    outbox = Outbox(path)
    before = append_snapshots(outbox, 2)
    path.unlink()

    def append() -> None:
        assert [one.sequence for one in append_snapshots(outbox)] == [3]

    assert in_child(append) == 0
    assert [one.sequence for one in append_snapshots(outbox)] == [4]
    assert job_ids_at(path)[:2] == job_ids_of(before)
    assert len(job_ids_at(path)) == 4


def test_an_outbox_removed_while_it_is_closed_starts_as_a_new_file(path: Path) -> None:
    """After a fork or close() no connection can read the removed file, so nothing is carried over."""
    outbox = Outbox(path)
    append_snapshots(outbox)
    outbox.close()
    path.unlink()
    (accepted,) = append_snapshots(outbox)
    assert (accepted.sequence, len(job_ids_at(path))) == (1, 1)


def test_two_users_of_a_removed_file_carry_over_each_entry_once(path: Path) -> None:
    """The first one creates the new file; the second one adds the entries that it appended in between."""
    first, second = Outbox(path), Outbox(path)
    shared = [*append_snapshots(first, 2), *append_snapshots(second, 1, after=5)]
    path.unlink()
    one = append_snapshots(first, after=10)
    two = append_snapshots(second, after=11)
    three = append_snapshots(first, after=12)

    assert job_ids_at(path) == job_ids_of([*shared, *one, *two, *three])
    assert [entry.sequence for entry in first.entries()] == [1, 2, 3, 4, 5, 6]


def _use(path: Path, pipe: Any) -> None:
    with Outbox(path) as outbox:
        pipe.send(job_ids_of(append_snapshots(outbox, 2)))
        pipe.recv()
        pipe.send(job_ids_of(append_snapshots(outbox, 20)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_replaced_file_is_opened_without_the_log_of_the_earlier_file(path: Path) -> None:
    """Another process opens it before the process that has the earlier file open notices: each uses its own log."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_use, args=(path, theirs), daemon=True)
    process.start()
    expected = mine.recv()
    _replace_by_another(path)
    with Outbox(path, repair=True) as outbox:
        expected += job_ids_of(append_snapshots(outbox, 3, after=300))
        mine.send("continue")
        assert mine.poll(20)
        expected += mine.recv()
        expected += job_ids_of(append_snapshots(outbox, 3, after=400))
        assert [file.stat().st_size for file in outbox.quarantine.damaged_files()] == [0]  # beside the earlier log
    process.join(20)

    assert set(expected) <= set(job_ids_at(path))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_file_that_replaced_the_outbox_of_a_killed_process_does_not_use_its_log(path: Path, has_index: bool) -> None:
    """The entries in the log are salvaged; the new file is unchanged."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_use, args=(path, theirs), daemon=True)
    process.start()
    killed = mine.recv()
    process.kill()
    process.join(20)
    assert path.with_name("outbox.db-wal").stat().st_size > 0
    if not has_index:
        path.with_name("outbox.db-shm").unlink()
    _replace_by_another(path)
    with Outbox(path, repair=True) as outbox:
        assert len(outbox.entries()) == 2
        (log,) = outbox.quarantine.damaged_files()
        outbox.quarantine.salvage(log)
        assert set(killed) <= {entry.job_id for entry in outbox.entries()}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_processes_that_use_a_removed_file_lose_no_entry(path: Path) -> None:
    """Three processes notice the removal at the same time."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(3)]
    users = [context.Process(target=_use, args=(path, pipe), daemon=True) for _, pipe in pipes]
    for user in users:
        user.start()
    expected = [job_id for pipe, _ in pipes for job_id in pipe.recv()]
    shutil.rmtree(path.parent)
    for pipe, _ in pipes:
        pipe.send("continue")
    expected += [job_id for pipe, _ in pipes for job_id in pipe.recv()]
    for user in users:
        user.join(60)

    assert [user.exitcode for user in users] == [0] * 3
    assert sorted(job_ids_at(path)) == sorted(expected)
    assert len(set(expected)) == 66


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_new_file_opened_before_others_notice_the_removal_shares_no_log_with_the_removed_file(path: Path) -> None:
    """SQLite's files of the removed file are still there, and another process uses them."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    user = context.Process(target=_use, args=(path, theirs), daemon=True)
    user.start()
    expected = mine.recv()
    path.unlink()
    assert path.with_name("outbox.db-shm").exists()
    with Outbox(path) as outbox:
        expected += job_ids_of(append_snapshots(outbox, 3))
        mine.send("continue")
        expected += mine.recv()
        expected += job_ids_of(append_snapshots(outbox, 3))
    user.join(60)

    assert user.exitcode == 0
    assert sorted(job_ids_at(path)) == sorted(expected)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_an_append_during_which_the_file_is_removed_is_in_the_file_at_the_path(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit goes into a removed file, and `append` returns when the entry is in the file at the path."""
    outbox = Outbox(path)

    text = events.Draft.text

    def removed_meanwhile(*arguments: Any) -> str:
        path.unlink(missing_ok=True)
        return text(*arguments)

    monkeypatch.setattr(events.Draft, "text", removed_meanwhile)
    accepted = append_snapshots(outbox)
    monkeypatch.undo()
    assert job_ids_at(path) == job_ids_of(accepted)


def test_a_file_replaced_while_it_is_opened_is_opened_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the connection would use a file that is no longer at the path."""
    Outbox(path).close()
    connect = sqlite3.connect
    opened: list[sqlite3.Connection] = []

    def replaced_meanwhile(*arguments: Any, **named: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **named))
        if len(opened) == 1:
            opened[0].execute("SELECT count(*) FROM entries")  # makes SQLite open the file
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", replaced_meanwhile)
    outbox = Outbox(path)
    monkeypatch.undo()
    accepted = append_snapshots(outbox)
    assert len(opened) > 1
    assert job_ids_at(path) == job_ids_of(accepted)


def test_an_append_to_a_path_that_became_unusable_raises_an_error_and_loses_no_entry(path: Path) -> None:
    """A folder is in the place of the file. Appending works again when it is removed."""
    outbox = Outbox(path)
    before = append_snapshots(outbox)
    path.unlink()
    path.mkdir()
    for _ in range(2):
        with pytest.raises(OutboxError, match="outbox.db"):
            append_snapshots(outbox)
    path.rmdir()
    after = append_snapshots(outbox)
    assert job_ids_at(path) == job_ids_of([*before, *after])


def test_an_unreadable_file_that_replaced_an_open_one_is_quarantined(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For example an incomplete backup. The entries of the open file are not lost."""
    outbox = Outbox(path, repair=True)
    lock = outbox.relay_lock()
    assert lock.acquire()
    before = append_snapshots(outbox, 3)
    path.with_name("broken").write_bytes(b"no database" * 1000)
    path.with_name("broken").replace(path)
    after = append_snapshots(outbox)

    assert job_ids_at(path) == job_ids_of([*before, *after])
    (moved,) = outbox.quarantine.damaged_files()
    assert moved.read_bytes().startswith(b"no database")
    assert any("was moved to" in record.getMessage() for record in caplog.records)
    lock.release()


@pytest.mark.parametrize("replace", [_unlink, _replace_by_another])
def test_a_relay_marks_nothing_in_the_new_file_that_it_did_not_send(
    path: Path, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Path], None]
) -> None:
    """It read entries from the old file and changes states in the new file, where positions differ."""
    monkeypatch.setattr(entry_sender, "_check_interval", lambda checks: -1.0)
    outbox = Outbox(path)
    relay = Relay(outbox, redis, "history", keep_seconds=3600.0)
    append_snapshots(outbox, 2)
    send = relay._sender._send

    def replaced_meanwhile(entries: Any) -> None:
        monkeypatch.setattr(relay._sender, "_send", send)
        send(entries)
        replace(path)

    monkeypatch.setattr(relay._sender, "_send", replaced_meanwhile)
    for _ in range(5):
        relay.sweep()

    assert sorted(queue_of(redis).job_ids) == sorted(job_ids_at(path))
    assert outbox.status().sent == len(job_ids_at(path))
    relay.stop()


@_removals
def test_a_producer_whose_outbox_is_removed_while_redis_is_away_delivers_all_events(
    path: Path, server: fakeredis.FakeServer, redis: fakeredis.FakeRedis, remove: Callable[[Path], None]
) -> None:
    """Its relay runs in the background."""
    server.connected = False
    producer = HistoryProducer(redis, outbox=path)
    receipts = producer.record_many([a_snapshot(after=timedelta(n)) for n in range(3)])
    remove(path)
    receipts.append(producer.record(a_snapshot(after=timedelta(5))))
    server.connected = True
    assert producer.flush(10) == 0
    producer.close(timeout=0)

    assert set(job_ids_of([one._accepted for one in receipts])) <= set(queue_of(redis).job_ids)


def test_an_outbox_stays_where_it_is_if_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also stays after close()."""
    (tmp_path / "elsewhere").mkdir()
    outbox = Outbox("data/outbox.db")
    before = append_snapshots(outbox)
    monkeypatch.chdir(tmp_path / "elsewhere")
    outbox.close()
    after = append_snapshots(outbox)

    assert job_ids_at(tmp_path / "data" / "outbox.db") == job_ids_of([*before, *after])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert outbox.path == tmp_path / "data" / "outbox.db"


@pytest.mark.parametrize("link_to", ["file", "folder"])
def test_two_paths_to_one_file_are_one_outbox(path: Path, tmp_path: Path, link_to: str) -> None:
    """They have one relay, because its lock is beside the real file."""
    outbox = Outbox(path)
    second_path = tmp_path / "link.db" if link_to == "file" else tmp_path / "link" / "outbox.db"
    if link_to == "file":
        second_path.symlink_to(path)
    else:
        second_path.parent.symlink_to(path.parent, target_is_directory=True)
    second = Outbox(second_path)
    one, two = outbox.relay_lock(), second.relay_lock()
    assert (one.acquire(), two.acquire()) == (True, False)
    one.release()
    assert two.acquire()
    two.release()
    accepted = [*append_snapshots(outbox), *append_snapshots(second)]
    assert [one.sequence for one in accepted] == [1, 2]
    assert job_ids_at(path) == job_ids_at(second_path) == job_ids_of(accepted)


def test_an_outbox_behind_a_link_follows_the_link_when_it_changes(path: Path, tmp_path: Path) -> None:
    """For example, a deployment makes `current` point to a new folder."""
    outbox = Outbox(path)
    outbox.close()
    current = tmp_path / "current"
    current.symlink_to(path.parent, target_is_directory=True)
    outbox = Outbox(current / "outbox.db")
    before = append_snapshots(outbox)
    (tmp_path / "next").mkdir()
    current.unlink()
    current.symlink_to(tmp_path / "next", target_is_directory=True)
    after = append_snapshots(outbox)

    assert job_ids_at(tmp_path / "next" / "outbox.db") == job_ids_of([*before, *after])


def test_a_relay_lock_is_lost_when_its_file_is_removed(path: Path) -> None:
    """Another relay may lock a new file."""
    outbox = Outbox(path)
    lock, other = outbox.relay_lock(), Outbox(path).relay_lock()
    assert lock.acquire()
    assert lock.held
    path.with_name("outbox.db-relay").unlink()
    assert not lock.held
    assert (other.acquire(), lock.acquire()) == (True, False)
    other.release()


def test_a_fork_releases_the_relay_lock(path: Path) -> None:
    """A lock that the child had too would be lost when the child closes its connection."""
    outbox = Outbox(path)
    lock, other = outbox.relay_lock(), Outbox(path).relay_lock()
    assert lock.acquire()
    assert in_child(lambda: None) == 0
    assert not lock.held
    assert other.acquire()
    other.release()


@pytest.mark.parametrize("content", [b"noise" * 1000, b"SQLite format 3\0" + b"\xff" * 8000], ids=["noise", "torn"])
def test_a_damaged_relay_lock_is_replaced(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Its content is of no value; one relay at a time has the new lock."""
    with Outbox(path, repair=True) as outbox:
        path.with_name(f"{path.name}-relay").write_bytes(content)
        first, second = outbox.relay_lock(), outbox.relay_lock()
        assert first.acquire()
        assert first.held
        assert not second.acquire()
        assert "outbox.db-relay was damaged and was replaced" in caplog.text
        first.release()
        assert second.acquire()
        second.release()


def test_a_relay_continues_after_all_files_were_removed(path: Path, redis: fakeredis.FakeRedis) -> None:
    """It takes the lock beside the new file, so that no other relay relays it."""
    outbox, other = Outbox(path), Outbox(path)
    relay = Relay(outbox, redis, "history", keep_seconds=3600.0)
    second = Relay(other, redis, "history", keep_seconds=3600.0)
    append_snapshots(outbox)
    assert (relay.sweep(), second.sweep()) == (True, False)
    _remove_folder(path)
    append_snapshots(other)
    assert (relay.sweep(), second.sweep()) == (True, False)
    assert len(queue_of(redis).job_ids) == 2
    relay.stop()
    second.stop()


def test_a_quick_check_ends_in_time_as_unfinished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An intact file has no fault. A check that takes too long is stopped."""
    outbox = Outbox(path)
    append_snapshots(outbox, 20)
    assert outbox.quick_check(60) is None
    monkeypatch.setattr(outbox_check, "_CHECK_STEPS", 1)
    assert outbox.quick_check(-1) == "unfinished"
    assert [one.sequence for one in append_snapshots(outbox)] == [21]
    assert outbox.status().pending == 21


def test_a_check_takes_at_most_the_given_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its parts together. Here each instruction of SQLite takes a millisecond."""
    outbox = Outbox(path)
    append_snapshots(outbox, 50)
    moments = (n / 1000 for n in itertools.count())
    monkeypatch.setattr(outbox_check, "_CHECK_STEPS", 1)
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    assert outbox.quick_check(0.3) == "unfinished"
    assert 0.29 < next(moments) < 0.31


def test_an_error_of_a_check_is_not_taken_for_the_end_of_its_time(path: Path) -> None:
    """For example, somebody has removed an index."""
    outbox = Outbox(path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP INDEX outcomes_by_age")
    with pytest.raises(OutboxError, match="no such index: outcomes_by_age"):
        outbox.quick_check(60)


def test_the_size_limit_is_valid_for_a_file_that_replaced_another_one(path: Path) -> None:
    """The limit belongs to the connection, and the connection is new."""
    outbox = Outbox(path, max_bytes=2**18)
    path.unlink()
    with pytest.raises(OutboxError, match="is full"):
        outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(1000)])
    with closing(sqlite3.connect(path)) as db:
        pages, page_bytes = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    assert pages * page_bytes <= 2**18
    assert os.path.getsize(path) <= 2**18


def _link_all(folder: Path, to: Path) -> None:
    """Copy by hard links, like `cp -al`."""
    to.mkdir()
    for one in folder.iterdir():
        os.link(one, to / one.name)


@pytest.mark.parametrize("was_killed", [False, True], ids=["closed", "with its log"])
def test_two_names_of_one_file_become_two_outboxes(
    path: Path, caplog: pytest.LogCaptureFixture, was_killed: bool
) -> None:
    """A folder was copied by hard links. SQLite would otherwise use one file with two logs."""
    with Outbox(path, repair=True) as outbox:
        lock = outbox.relay_lock()
        assert lock.acquire()
        lock.release()
        before = append_snapshots(outbox, 3)
        if was_killed:
            shutil.copytree(path.parent, path.parent.with_name("killed"))
    if was_killed:
        shutil.rmtree(path.parent)
        path.parent.with_name("killed").rename(path.parent)
    other_path = path.parent.with_name("copy") / path.name
    _link_all(path.parent, other_path.parent)

    with Outbox(path, repair=True) as outbox, Outbox(other_path, repair=True) as other:
        locks = [one.relay_lock() for one in (outbox, other)]
        assert [lock.acquire() for lock in locks] == [True, True]
        here, there = [], []
        for n in range(20):
            here += append_snapshots(outbox, 20, after=100 * n)
            there += append_snapshots(other, 20, after=100 * n)
        for lock in locks:
            lock.release()

    assert job_ids_at(path) == job_ids_of([*before, *here])
    assert job_ids_at(other_path) == job_ids_of([*before, *there])
    assert "had a second name" in caplog.text
    for one in [*path.parent.iterdir(), *other_path.parent.iterdir()]:
        assert one.stat().st_nlink == 1
        assert not one.name.endswith(".copy")


def test_an_open_file_that_gets_a_second_name_keeps_its_entries(path: Path) -> None:
    """A running producer is backed up by hard links and continues; then another process opens the file."""
    with Outbox(path, repair=True) as outbox:
        accepted = append_snapshots(outbox, 3)
        _link_all(path.parent, path.parent.with_name("backup"))
        with Outbox(path, repair=True) as other:
            accepted += append_snapshots(outbox, 3, after=10)
            accepted += append_snapshots(other, 3, after=20)
            accepted += append_snapshots(outbox, 3, after=30)
    assert job_ids_at(path) == job_ids_of(accepted)


@pytest.mark.parametrize("grows", ["-wal", ""], ids=["log", "file"])
def test_a_file_with_two_names_is_copied_although_its_log_grows_but_not_while_it_is_written_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch, grows: str
) -> None:
    """SQLite ignores an incomplete transaction in a log. A file that was written meanwhile could be torn."""
    times = itertools.count(1_000_000_000)

    def copied_meanwhile(file: Path, copy: Path) -> None:
        copy_file(file, copy)
        moment = next(times)
        os.utime(path.with_name(path.name + grows), (moment, moment))

    monkeypatch.setattr("producers.outbox_place.copy_file", copied_meanwhile)
    with Outbox(path, repair=True) as outbox:
        accepted = append_snapshots(outbox, 3)
        _link_all(path.parent, path.parent.with_name("backup"))
        if grows:
            with Outbox(path, repair=True) as other:
                assert [entry.job_id for entry in other.entries()] == job_ids_of(accepted)
            assert next(times) >= 1_000_000_000 + 3 * 2  # it was tried again
        else:
            with pytest.raises(OutboxError, match="another process keeps writing to it under that name"):
                Outbox(path, repair=True)
    assert job_ids_at(path) == job_ids_of(accepted)


def test_opening_a_file_with_two_names_for_reading_keeps_both_names(path: Path) -> None:
    Outbox(path).close()
    path.with_name("linked.db").hardlink_to(path)
    Outbox(path).close()
    assert path.stat().st_nlink == 2


@pytest.mark.parametrize("table", ["batches", "retries", "outcomes"])
def test_entries_whose_state_is_lost_are_reported_and_sent_again(
    path: Path,
    redis: fakeredis.FakeRedis,
    table: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A power failure may lose the write of one page, with the rows of several entries. They were sent, and are known
    to no table then. The relay sends them again."""
    monkeypatch.setattr(outbox_check, "_CHECK_STEPS", 1)  # a check of this small file would end before its deadline
    with Outbox(path) as outbox:
        accepted = append_snapshots(outbox, 4)
        outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(3)})
        if table == "outcomes":
            _settle(outbox, accepted[0])
        if table != "batches":
            assert len(outbox.deliveries.overdue(3)) == (2 if table == "outcomes" else 3)
        with outbox._file.transaction() as db:
            db.execute(f"DELETE FROM {table}")  # from the parameters above
    lost = 1 if table == "outcomes" else 3
    with Outbox(path) as outbox:
        assert (
            outbox.quick_check(60) == f"{lost} entries have no state: a controller or relay repairs that when it starts"
        )
    assert not caplog.records
    with Outbox(path, repair=True) as outbox:
        assert outbox.quick_check(60) is None
        assert (outbox.status().pending, outbox.status().sent) == (1, 3)
        assert len(outbox.deliveries.overdue(10)) == 3
        assert outbox.quick_check(60) is None
        Relay(outbox, redis, "history", keep_seconds=60).sweep()
    assert sorted(queue_of(redis).job_ids) == sorted(job_ids_of(accepted))
    assert [one.levelname for one in caplog.records] == ["ERROR"]


def test_entries_between_two_batches_that_have_no_state_are_found(path: Path) -> None:
    """Only the row of the batch in the middle is lost."""
    with Outbox(path, repair=True) as outbox:
        append_snapshots(outbox, 6)
        for _ in range(3):
            outbox.deliveries.mark_sent({entry.position: 100.0 for entry in outbox.deliveries.pending(2)})
        assert outbox.quick_check(60) is None
        with outbox._file.transaction() as db:
            db.execute("DELETE FROM batches WHERE first = 3")
        assert (outbox.quick_check(60), outbox.status().sent) == (None, 6)
        assert [(entry.sequence, entry.checks) for entry in outbox.deliveries.overdue(9)] == [(3, 1), (4, 1)]


def test_an_entry_that_is_settled_during_the_check_of_states_stays_settled(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process settles it, or deletes it, between the search and the repair."""
    with Outbox(path, repair=True) as outbox, Outbox(path) as other:
        accepted = append_snapshots(outbox, 2)
        outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(2)})
        with outbox._file.transaction() as db:
            db.execute("DELETE FROM batches")
        give_state = outbox_check._give_state

        def settled_meanwhile(*arguments: Any) -> None:
            _settle(other, accepted[0])
            with other._file.transaction() as db:
                db.execute("DELETE FROM entries WHERE position = 2")
            give_state(*arguments)

        monkeypatch.setattr(outbox_check, "_give_state", settled_meanwhile)
        assert outbox.quick_check(60) is None
        assert (outbox.status().depth, outbox.status().stored) == (0, 1)


@pytest.mark.parametrize("index", outbox_check.INDEXES)
def test_a_stale_index_is_reported_and_rebuilt(
    path: Path, index: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure may lose a write. SQLite's quick check does not compare indexes with their table."""
    monkeypatch.setattr(outbox_check, "_CHECK_STEPS", 1)  # a check of this small file would end before its deadline
    with Outbox(path) as outbox:
        accepted = outbox.append(NAME, [a_snapshot() for _ in range(3)])
        outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(2)})
        found = Acknowledgement(accepted[0].source_id, 1, accepted[0].nonce, None, Outcome("rejected", reason="no"), 0)
        outbox.deliveries.settle(accepted[0].source_id, 0, {1: found})
        assert len(outbox.deliveries.overdue(3)) == 1
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (index,)).fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * 4096 : page * 4096] = bytes.fromhex("0a00000000100000").ljust(4096, b"\0")  # an empty index
    path.write_bytes(content)

    with Outbox(path) as outbox:
        assert outbox.quick_check(60) == f"index {index} is stale: a controller or relay repairs that when it starts"
        assert outbox.quick_check(60) is not None
    assert not caplog.records
    with Outbox(path, repair=True) as outbox:
        assert outbox.quick_check(60) is None
    assert [one.levelname for one in caplog.records] == ["ERROR"]
    assert index in caplog.text
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_folder_is_unlocked_though_its_descriptor_is_closed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with gevent's `os.close`: its event loop closes a folder, and would never run if the next lock waited."""
    left_open: list[int] = []
    with monkeypatch.context() as gevent:
        gevent.setattr(os, "close", left_open.append)
        with folder_lock(tmp_path):
            pass
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the folder is locked
    finally:
        for descriptor in (*left_open, other):
            os.close(descriptor)
