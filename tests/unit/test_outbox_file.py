"""The file of an outbox is removed or replaced while it is open: what was accepted is in the file at the path."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from producers import entry_sender, events, outbox_check
from producers.acknowledgements import Acknowledgement, Outcome
from producers.entries import Accepted
from producers.errors import OutboxError
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redis_keys import job_id_of
from producers.relay import Relay
from tests.factories import a_snapshot
from tests.forking import in_child
from tests.unit.conftest import queue_of

NAME = "trading-controller"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "outbox.db"


def _append(outbox: Outbox, count: int = 1, after: int = 0) -> list[Accepted]:
    return outbox.append(NAME, [a_snapshot(after=timedelta(after + n)) for n in range(count)])


def _job_ids(accepted: list[Accepted]) -> list[str]:
    return [job_id_of(one.source_id, one.sequence, one.nonce) for one in accepted]


def _at_path(path: Path) -> list[str]:
    """The job ids of what is kept in the file that the path leads to, by a connection of its own."""
    with Outbox(path) as found:
        return [entry.job_id for entry in found.entries()]


def _settle(outbox: Outbox, one: Accepted) -> None:
    told = Acknowledgement(one.source_id, one.sequence, one.nonce, None, Outcome("stored", row_id=1), at=0)
    assert outbox.deliveries.settle(one.source_id, 0, {"key": told}).changed == ["key"]


def _unlink(path: Path) -> None:
    path.unlink()


def _remove_all_files(path: Path) -> None:
    for one in path.parent.iterdir():
        one.unlink()


def _remove_folder(path: Path) -> None:
    # In one step: a producer in use would make it anew while its files are removed one by one.
    away = path.parent.with_name("away")
    path.parent.rename(away)
    shutil.rmtree(away)


def _move_away(path: Path) -> None:
    path.rename(path.with_name("moved.db"))


def _replace_by_another(path: Path) -> None:
    with Outbox(path.with_name("new.db")) as other:
        _append(other, 2, after=50)
    path.with_name("new.db").replace(path)


_removals = pytest.mark.parametrize(
    "remove", [_unlink, _remove_all_files, _remove_folder, _move_away, _replace_by_another]
)


@_removals
def test_entries_appended_after_the_file_was_removed_are_in_the_file_at_the_path(
    path: Path, caplog: pytest.LogCaptureFixture, remove: Callable[[Path], None]
) -> None:
    """What was not settled is carried over, once and with its job ids; a line in the log says so."""
    outbox = Outbox(path)
    stored, *before = _append(outbox, 4)
    _settle(outbox, stored)
    outbox.deliveries.mark_sent({outbox.deliveries.pending(1)[0].position: 100.0})
    remove(path)
    after = _append(outbox, 2, after=10)

    found = _at_path(path)
    there = 2 if remove is _replace_by_another else 0
    assert found[there:] == _job_ids([*before, *after])
    assert [outbox.status_of(one).state for one in (*before, *after)] == [
        "sent",
        "pending",
        "pending",
        "pending",
        "pending",
    ]
    assert outbox.generation == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"outbox {path} was removed or replaced while it was in use. Continuing")
    assert record.getMessage().endswith("with 3 entries carried over")
    _append(outbox, after=20)
    assert len(_at_path(path)) == len(found) + 1


@pytest.mark.parametrize("remove", [_unlink, _remove_all_files, _remove_folder, _move_away])
def test_numbers_go_on_in_a_new_file(path: Path, remove: Callable[[Path], None]) -> None:
    """With the source, its count of resends and the token: it is the same outbox."""
    outbox = Outbox(path)
    (before,) = _append(outbox)
    outbox.resend(since=0)
    token = outbox.header.read().token
    outbox.header.set_destination("database 0 on here", "history")
    remove(path)
    (after,) = _append(outbox)

    assert (after.source, after.sequence) == (before.source, before.sequence + 1)
    assert outbox.sources()[0].current
    outbox.deliveries.mark_sent({entry.position: 1.0 for entry in outbox.deliveries.pending(2)})
    assert outbox.deliveries.awaiting("sent") == [(before.source_id, NAME, 1)]
    identity = outbox.header.read()
    assert (identity.token, identity.redis, identity.queue) == (token, "database 0 on here", "history")


def test_in_another_outbox_that_is_there_now_its_own_source_goes_on(path: Path) -> None:
    """Entries that were carried over keep theirs."""
    outbox = Outbox(path)
    (before,) = _append(outbox)
    with Outbox(path.with_name("other.db")) as other:
        (there,) = _append(other)
        token = other.header.read().token
    path.with_name("other.db").replace(path)
    (after,) = _append(outbox)

    assert (after.source, after.sequence) == (there.source, 2)
    assert [(one.full_name, one.current) for one in outbox.sources()] == [(there.source, True), (before.source, False)]
    assert [entry.source for entry in outbox.deliveries.pending(5)] == [there.source, before.source, there.source]
    assert outbox.header.read().token == token


def test_an_older_copy_of_itself_gets_what_is_newer(path: Path, tmp_path: Path) -> None:
    """And no number is used again. What it has as not settled stays so: that costs a delivery, a duplicate."""
    outbox = Outbox(path)
    first = _append(outbox)
    outbox.close()
    shutil.copyfile(path, tmp_path / "older.db")
    second = _append(outbox, 2, after=5)
    _settle(outbox, first[0])
    _settle(outbox, second[0])
    (tmp_path / "older.db").replace(path)
    (third,) = _append(outbox, after=9)

    assert (third.source, third.sequence) == (first[0].source, 4)
    assert [entry.job_id for entry in outbox.entries()] == _job_ids([*first, second[1], third])
    assert outbox.status().pending == 3


@_removals
def test_reading_marking_and_settling_notice_it_too(path: Path, remove: Callable[[Path], None]) -> None:
    """A relay may be the first that uses the outbox then."""
    for use in (
        lambda outbox, _: outbox.deliveries.pending(10),
        lambda outbox, _: outbox.deliveries.mark_sent({}),
        _settle,
        lambda outbox, _: outbox.status(),
    ):
        outbox = Outbox(path)
        accepted = _append(outbox, 2)
        remove(path)
        use(outbox, accepted[0])
        assert _job_ids(accepted) == _at_path(path)[-2:]
        outbox.close()
        shutil.rmtree(path.parent)


@_removals
def test_entries_of_a_removed_file_are_carried_over_when_the_outbox_is_closed(
    path: Path, remove: Callable[[Path], None]
) -> None:
    """The last chance: the file is gone with its last connection."""
    outbox = Outbox(path)
    accepted = _append(outbox, 2)
    remove(path)
    outbox.close()
    assert _at_path(path)[-2:] == _job_ids(accepted)


def test_closing_where_nothing_can_be_written_says_what_is_lost_and_ends(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where the folder was."""
    outbox = Outbox(path)
    _append(outbox)
    shutil.rmtree(path.parent)
    path.parent.write_text("in the way", encoding="utf-8")
    outbox.close()

    (record,) = caplog.records
    assert f"outbox {path} was removed, and its entries could not be carried over: " in record.getMessage()


@pytest.mark.parametrize("remove", [_unlink, _replace_by_another])
def test_a_file_may_be_removed_again_and_again(path: Path, remove: Callable[[Path], None]) -> None:
    """Each new one has SQLite's files beside it, which must not be taken for those of the next."""
    outbox = Outbox(path)
    accepted = _append(outbox)
    for n in range(1, 6):
        remove(path)
        accepted += _append(outbox, 2, after=10 * n)
        if n % 3 == 0:
            outbox.status()
    assert set(_job_ids(accepted)) <= set(_at_path(path))
    assert len(_at_path(path)) == len(accepted) + (2 * 5 if remove is _replace_by_another else 0)
    assert outbox.generation == 5


def test_the_log_of_a_removed_file_is_not_taken_for_its_successors(path: Path, tmp_path: Path) -> None:
    """It was killed, so that its log stayed; somebody has removed the file alone."""
    with Outbox(path) as outbox:
        _append(outbox, 3)
        shutil.copytree(path.parent, tmp_path / "killed")
    path = tmp_path / "killed" / "outbox.db"
    assert path.with_name("outbox.db-wal").stat().st_size > 0
    path.unlink()
    accepted = _append(Outbox(path))
    assert _at_path(path) == _job_ids(accepted)


def test_a_position_in_a_file_that_was_replaced_covers_all_in_the_one_that_is_there_now(path: Path) -> None:
    """Entries have other positions there: those that were carried over are behind those that it had."""
    outbox = Outbox(path)
    _append(outbox, 1)
    until = outbox.last_position()
    _append(outbox, 1)
    assert (outbox.pending_count(until), outbox.unsettled_count(until=until)) == (1, 1)
    _replace_by_another(path)
    assert outbox.status().pending == 4
    assert (outbox.pending_count(until), outbox.unsettled_count(until=until)) == (4, 4)
    until = outbox.last_position()
    _append(outbox, 1)
    assert (outbox.pending_count(until), outbox.unsettled_count(until=until)) == (4, 4)


def test_entries_of_a_removed_file_are_carried_over_before_a_fork(path: Path) -> None:
    """Its connections are closed there; parent and child go on in the new file."""
    outbox = Outbox(path)
    before = _append(outbox, 2)
    path.unlink()

    def append() -> None:
        assert [one.sequence for one in _append(outbox)] == [3]

    assert in_child(append) == 0
    assert [one.sequence for one in _append(outbox)] == [4]
    assert _at_path(path)[:2] == _job_ids(before)
    assert len(_at_path(path)) == 4


def test_a_file_that_was_removed_while_nothing_was_open_is_new(path: Path) -> None:
    """After a fork or close() there is nothing to carry over: an outbox that was removed is gone."""
    outbox = Outbox(path)
    _append(outbox)
    outbox.close()
    path.unlink()
    (accepted,) = _append(outbox)
    assert (accepted.sequence, len(_at_path(path))) == (1, 1)


def test_several_users_of_a_removed_file_carry_over_each_entry_once(path: Path) -> None:
    """The first one makes the new file; the second one adds what it has appended in between."""
    first, second = Outbox(path), Outbox(path)
    shared = [*_append(first, 2), *_append(second, 1, after=5)]
    path.unlink()
    one, two, three = _append(first, after=10), _append(second, after=11), _append(first, after=12)

    assert _at_path(path) == _job_ids([*shared, *one, *two, *three])
    assert [entry.sequence for entry in first.entries()] == [1, 2, 3, 4, 5, 6]


def _use(path: Path, pipe: Any) -> None:
    with Outbox(path) as outbox:
        pipe.send(_job_ids(_append(outbox, 2)))
        pipe.recv()
        pipe.send(_job_ids(_append(outbox, 20)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_file_that_is_replaced_is_opened_without_the_log_of_the_one_before(path: Path) -> None:
    """By a process that comes before the one that has the earlier file open notices: each has its own log."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_use, args=(path, theirs), daemon=True)
    process.start()
    expected = mine.recv()
    _replace_by_another(path)
    with Outbox(path, repair=True) as outbox:
        expected += _job_ids(_append(outbox, 3, after=300))
        mine.send("go on")
        assert mine.poll(20)
        expected += mine.recv()
        expected += _job_ids(_append(outbox, 3, after=400))
    process.join(20)

    assert set(expected) <= set(_at_path(path))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_log_of_a_killed_process_is_not_taken_for_that_of_a_file_put_in_its_place(path: Path) -> None:
    """What stood in it is carried over; the file in its place is as it was."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_use, args=(path, theirs), daemon=True)
    process.start()
    killed = mine.recv()
    process.kill()
    process.join(20)
    assert path.with_name("outbox.db-wal").stat().st_size > 0
    _replace_by_another(path)
    with Outbox(path, repair=True) as outbox:
        assert len(outbox.entries()) == 2
        (log,) = outbox.quarantine.damaged_files()
        outbox.quarantine.salvage(log)
        assert set(killed) <= {entry.job_id for entry in outbox.entries()}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_processes_on_a_removed_file_lose_nothing(path: Path) -> None:
    """Three of them, which notice it at the same time."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(3)]
    users = [context.Process(target=_use, args=(path, pipe), daemon=True) for _, pipe in pipes]
    for user in users:
        user.start()
    expected = [job_id for pipe, _ in pipes for job_id in pipe.recv()]
    shutil.rmtree(path.parent)
    for pipe, _ in pipes:
        pipe.send("go on")
    expected += [job_id for pipe, _ in pipes for job_id in pipe.recv()]
    for user in users:
        user.join(60)

    assert [user.exitcode for user in users] == [0] * 3
    assert sorted(_at_path(path)) == sorted(expected)
    assert len(set(expected)) == 66


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_one_that_opens_a_new_file_before_others_notice_shares_nothing_with_the_removed_one(path: Path) -> None:
    """SQLite's files beside the removed one are still there, and another process has them in use."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    user = context.Process(target=_use, args=(path, theirs), daemon=True)
    user.start()
    expected = mine.recv()
    path.unlink()
    assert path.with_name("outbox.db-shm").exists()
    with Outbox(path) as outbox:
        expected += _job_ids(_append(outbox, 3))
        mine.send("go on")
        expected += mine.recv()
        expected += _job_ids(_append(outbox, 3))
    user.join(60)

    assert user.exitcode == 0
    assert sorted(_at_path(path)) == sorted(expected)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_file_that_is_removed_in_the_middle_of_an_append_holds_nothing_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit went into a file that no path leads to: append returns when the entry is in the one at the path."""
    outbox = Outbox(path)

    def removed_meanwhile(*arguments: Any, **named: Any) -> Any:
        path.unlink(missing_ok=True)
        return events.event_of(*arguments, **named)

    monkeypatch.setattr("producers.outbox.event_of", removed_meanwhile)
    accepted = _append(outbox)
    monkeypatch.undo()
    assert _at_path(path) == _job_ids(accepted)


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a deployment in that moment: the connection would be to a file that no path leads to."""
    Outbox(path).close()
    connect = sqlite3.connect
    opened: list[sqlite3.Connection] = []

    def replaced_meanwhile(*arguments: Any, **named: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **named))
        if len(opened) == 1:
            opened[0].execute("SELECT count(*) FROM entries")  # SQLite opens the file now
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", replaced_meanwhile)
    outbox = Outbox(path)
    monkeypatch.undo()
    accepted = _append(outbox)
    assert len(opened) > 1
    assert _at_path(path) == _job_ids(accepted)


def test_a_path_that_cannot_be_used_any_more_refuses_and_loses_nothing(path: Path) -> None:
    """A folder stands there; as soon as it is gone, all goes on."""
    outbox = Outbox(path)
    before = _append(outbox)
    path.unlink()
    path.mkdir()
    for _ in range(2):
        with pytest.raises(OutboxError, match="outbox.db"):
            _append(outbox)
    path.rmdir()
    after = _append(outbox)
    assert _at_path(path) == _job_ids([*before, *after])


def test_a_file_that_cannot_be_read_in_the_place_of_an_open_one_is_quarantine(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as half of a backup. What the open one holds is not lost."""
    outbox = Outbox(path, repair=True)
    lock = outbox.relay_lock()
    assert lock.acquire()
    before = _append(outbox, 3)
    path.with_name("broken").write_bytes(b"no database" * 1000)
    path.with_name("broken").replace(path)
    after = _append(outbox)

    assert _at_path(path) == _job_ids([*before, *after])
    (moved,) = outbox.quarantine.damaged_files()
    assert moved.read_bytes().startswith(b"no database")
    assert any("was moved to" in record.getMessage() for record in caplog.records)
    lock.release()


@pytest.mark.parametrize("replace", [_unlink, _replace_by_another])
def test_a_relay_marks_nothing_in_the_new_file_that_it_did_not_send(
    path: Path, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Path], None]
) -> None:
    """It has read entries from the one and writes its marks into the other, where positions are others."""
    monkeypatch.setattr(entry_sender, "_check_interval", lambda checks: -1.0)
    outbox = Outbox(path)
    relay = Relay(outbox, redis, "history", keep_seconds=3600.0)
    _append(outbox, 2)
    send = relay._sender._send

    def replaced_meanwhile(entries: Any) -> None:
        monkeypatch.setattr(relay._sender, "_send", send)
        send(entries)
        replace(path)

    monkeypatch.setattr(relay._sender, "_send", replaced_meanwhile)
    for _ in range(5):
        relay.sweep()

    assert sorted(queue_of(redis).job_ids) == sorted(_at_path(path))
    assert outbox.status().sent == len(_at_path(path))
    relay.stop()


@_removals
def test_a_producer_whose_outbox_is_removed_while_redis_is_away_delivers_all(
    path: Path, server: fakeredis.FakeServer, redis: fakeredis.FakeRedis, remove: Callable[[Path], None]
) -> None:
    """With its relay running in the background."""
    server.connected = False
    producer = HistoryProducer(redis, outbox=path)
    receipts = producer.record_many([a_snapshot(after=timedelta(n)) for n in range(3)])
    remove(path)
    receipts.append(producer.record(a_snapshot(after=timedelta(5))))
    server.connected = True
    assert producer.flush(10) == 0
    producer.close(timeout=0)

    assert set(_job_ids([one._accepted for one in receipts])) <= set(queue_of(redis).job_ids)


def test_a_program_may_change_its_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outbox stays where it was when it was opened, also after a fork or close()."""
    (tmp_path / "elsewhere").mkdir()
    outbox = Outbox("data/outbox.db")
    before = _append(outbox)
    monkeypatch.chdir(tmp_path / "elsewhere")
    outbox.close()
    after = _append(outbox)

    assert _at_path(tmp_path / "data" / "outbox.db") == _job_ids([*before, *after])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert outbox.path == tmp_path / "data" / "outbox.db"


@pytest.mark.parametrize("link_to", ["file", "folder"])
def test_two_paths_to_one_file_are_one_outbox(path: Path, tmp_path: Path, link_to: str) -> None:
    """With one relay: its lock is beside the file itself."""
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
    accepted = [*_append(outbox), *_append(second)]
    assert [one.sequence for one in accepted] == [1, 2]
    assert _at_path(path) == _at_path(second_path) == _job_ids(accepted)


def test_an_outbox_behind_a_link_that_leads_elsewhere_now_goes_on_there(path: Path, tmp_path: Path) -> None:
    """Such as a deployment that makes `current` lead to the new folder."""
    outbox = Outbox(path)
    outbox.close()
    current = tmp_path / "current"
    current.symlink_to(path.parent, target_is_directory=True)
    outbox = Outbox(current / "outbox.db")
    before = _append(outbox)
    (tmp_path / "next").mkdir()
    current.unlink()
    current.symlink_to(tmp_path / "next", target_is_directory=True)
    after = _append(outbox)

    assert _at_path(tmp_path / "next" / "outbox.db") == _job_ids([*before, *after])


def test_a_relay_lock_whose_file_was_removed_is_no_longer_held(path: Path) -> None:
    """Another relay may have the lock of the new one."""
    outbox = Outbox(path)
    lock, other = outbox.relay_lock(), Outbox(path).relay_lock()
    assert lock.acquire()
    assert lock.held
    path.with_name("outbox.db-relay").unlink()
    assert not lock.held
    assert (other.acquire(), lock.acquire()) == (True, False)
    other.release()


@pytest.mark.parametrize("content", [b"noise" * 1000, b"SQLite format 3\0" + b"\xff" * 8000], ids=["noise", "torn"])
def test_a_damaged_relay_lock_is_replaced(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It has no content that anybody needs; one relay at a time has the new one."""
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


def test_a_relay_goes_on_after_all_files_were_removed(path: Path, redis: fakeredis.FakeRedis) -> None:
    """It takes the lock beside the new file, and no other relay works on it meanwhile."""
    outbox, other = Outbox(path), Outbox(path)
    relay = Relay(outbox, redis, "history", keep_seconds=3600.0)
    second = Relay(other, redis, "history", keep_seconds=3600.0)
    _append(outbox)
    assert (relay.sweep(), second.sweep()) == (True, False)
    _remove_folder(path)
    _append(other)
    assert (relay.sweep(), second.sweep()) == (True, False)
    assert len(queue_of(redis).job_ids) == 2
    relay.stop()
    second.stop()


def test_a_quick_check_ends_in_time_and_knows_nothing_then(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An intact file has no fault; one that takes too long is not waited for."""
    outbox = Outbox(path)
    _append(outbox, 20)
    assert outbox.quick_check(60) is None
    monkeypatch.setattr(outbox_check, "_CHECK_STEPS", 1)
    assert outbox.quick_check(-1) == "unfinished"
    assert [one.sequence for one in _append(outbox)] == [21]


def test_the_limit_of_size_holds_in_the_file_that_is_there_now(path: Path) -> None:
    """It is a property of the connection, and the connection is a new one."""
    outbox = Outbox(path, max_bytes=2**18)
    path.unlink()
    with pytest.raises(OutboxError, match="is full"):
        outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(1000)])
    with closing(sqlite3.connect(path)) as db:
        pages, page_bytes = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    assert pages * page_bytes <= 2**18
    assert os.path.getsize(path) <= 2**18


def _link_all(folder: Path, to: Path) -> None:
    """As `cp -al` does."""
    to.mkdir()
    for one in folder.iterdir():
        os.link(one, to / one.name)


@pytest.mark.parametrize("was_killed", [False, True], ids=["closed", "with its log"])
def test_two_names_of_one_file_become_two_outboxes(
    path: Path, caplog: pytest.LogCaptureFixture, was_killed: bool
) -> None:
    """A folder was copied by hard links; SQLite would use one file with two logs."""
    with Outbox(path, repair=True) as outbox:
        lock = outbox.relay_lock()
        assert lock.acquire()
        lock.release()
        before = _append(outbox, 3)
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
            here += _append(outbox, 20, after=100 * n)
            there += _append(other, 20, after=100 * n)
        for lock in locks:
            lock.release()

    assert _at_path(path) == _job_ids([*before, *here])
    assert _at_path(other_path) == _job_ids([*before, *there])
    assert "had a second name" in caplog.text
    for one in [*path.parent.iterdir(), *other_path.parent.iterdir()]:
        assert one.stat().st_nlink == 1
        assert not one.name.endswith(".copy")


def test_a_file_that_gets_a_second_name_while_it_is_open_keeps_its_entries(path: Path) -> None:
    """A backup by hard links was made of a running producer, which goes on; another process opens the file then."""
    with Outbox(path, repair=True) as outbox:
        accepted = _append(outbox, 3)
        _link_all(path.parent, path.parent.with_name("backup"))
        with Outbox(path, repair=True) as other:
            accepted += _append(outbox, 3, after=10)
            accepted += _append(other, 3, after=20)
            accepted += _append(outbox, 3, after=30)
    assert _at_path(path) == _job_ids(accepted)


def test_those_that_only_look_leave_both_names_of_a_file(path: Path) -> None:
    Outbox(path).close()
    path.with_name("linked.db").hardlink_to(path)
    Outbox(path).close()
    assert path.stat().st_nlink == 2


@pytest.mark.parametrize("index", outbox_check.INDEXES)
def test_an_index_that_has_an_older_content_is_reported_and_rebuilt(
    path: Path, index: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a write that was lost with the power. SQLite's quick check does not compare indexes with their table."""
    with Outbox(path) as outbox:
        accepted = outbox.append(NAME, [a_snapshot() for _ in range(3)])
        outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(2)})
        told = Acknowledgement(accepted[0].source_id, 1, accepted[0].nonce, None, Outcome("rejected", reason="no"), 0)
        outbox.deliveries.settle(accepted[0].source_id, 0, {1: told})
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (index,)).fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * 4096 : page * 4096] = bytes.fromhex("0a00000000100000").ljust(4096, b"\0")  # as it began
    path.write_bytes(content)

    with Outbox(path) as outbox:
        assert outbox.quick_check(60) == (f"index {index} is stale: a controller or relay rebuilds it when it starts")
        assert outbox.quick_check(60) is not None
    assert not caplog.records
    with Outbox(path, repair=True) as outbox:
        assert outbox.quick_check(60) is None
    assert [one.levelname for one in caplog.records] == ["ERROR"]
    assert index in caplog.text
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
