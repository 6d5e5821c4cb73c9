"""The outbox: accepted events are on disk, numbered without gaps, and end in one state."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from producers import outbox as outbox_module
from producers import outbox_clock, outbox_deliveries
from producers.acknowledgements import Acknowledgement, Outcome
from producers.entries import Accepted, Entry, EntryStatus, SettledKeys
from producers.errors import InvalidEvent, OutboxDamaged, OutboxError
from producers.events import MAX_EVENT_BYTES, PortfolioSnapshotEvent, decode
from producers.outbox import Outbox, Position
from producers.outbox_schema import VERSION
from producers.sqlite_connections import use_wal
from tests.factories import a_signal, a_snapshot, an_archive
from tests.forking import in_child

NAME = "trading-controller"
STORED = Outcome("stored", row_id=7)
REJECTED = Outcome("rejected", reason="no")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "down" / "outbox.db"


def _settle(outbox: Outbox, *outcomes: tuple[Accepted, Outcome], resends: int = 0) -> SettledKeys:
    """Settle entries like a relay that has read these acknowledgements; the keys are the numbers."""
    found = {
        one.sequence: Acknowledgement(one.source_id, one.sequence, one.nonce, str(one.event_id), outcome, at=0)
        for one, outcome in outcomes
    }
    return outbox.deliveries.settle(outcomes[0][0].source_id, resends, found)


def _send_next(outbox: Outbox, *, check_after: float) -> Entry:
    """Mark the oldest pending entry as sent."""
    (entry,) = outbox.deliveries.pending(1)
    outbox.deliveries.mark_sent({entry.position: check_after})
    return entry


def test_entries_are_numbered_from_one_and_carry_their_number(path: Path) -> None:
    """Entry, job and event have the same sequence; the source names the outbox."""
    outbox = Outbox(path)
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(2)])
    accepted += outbox.append(NAME, [an_archive()])

    entries = outbox.deliveries.pending(10)
    assert [one.sequence for one in accepted] == [entry.sequence for entry in entries] == [1, 2, 3]
    assert {one.source for one in accepted} == {f"{NAME}/{accepted[0].source_id}"}
    event = decode(entries[1].event, PortfolioSnapshotEvent)
    assert (event.source, event.sequence, event.id) == (accepted[1].source, 2, accepted[1].event_id)
    assert entries[1].job_id == f"{accepted[0].source_id}-2-{accepted[1].nonce}"


def test_each_entry_has_a_different_nonce(path: Path) -> None:
    """It has 64 random bits, because a copy of this file may give the same number to another event."""
    outbox = Outbox(path)
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(20)])
    accepted += [outbox.append(NAME, [a_snapshot()])[0] for _ in range(20)]

    assert len({one.nonce for one in accepted}) == 40
    assert all(re.fullmatch("[0-9a-f]{16}", one.nonce) for one in accepted)
    assert [entry.nonce for entry in outbox.deliveries.pending(50)] == [one.nonce for one in accepted]


def test_each_name_on_one_file_has_its_own_source_and_numbers(path: Path) -> None:
    """Two controllers may share a file: neither has a gap, and no two jobs have the same id."""
    outbox = Outbox(path)
    accepted = [outbox.append(name, [a_snapshot()])[0] for name in ("a", "b", "a")]

    entries = outbox.deliveries.pending(10)
    assert [entry.source for entry in entries] == [one.source for one in accepted]
    assert [one.source.partition("/")[0] for one in accepted] == ["a", "b", "a"]
    assert [entry.sequence for entry in entries] == [1, 1, 2]
    assert len({entry.job_id for entry in entries}) == 3


def test_a_copied_outbox_gives_its_current_sources_up(path: Path) -> None:
    """Those that were left earlier keep their reason."""
    outbox = Outbox(path)
    accepted = [outbox.append(name, [a_snapshot()])[0] for name in ("a", "b")]
    assert outbox.header.replace_sources([one.source for one in accepted]) == [one.source for one in accepted]
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE sources SET left_because = 'damaged' WHERE name = 'b'")
    (last,) = outbox.append("a", [a_snapshot()])
    assert [(one.full_name, one.current, one.left_because) for one in outbox.sources()] == [
        (accepted[0].source, False, "copied"),
        (accepted[1].source, False, "damaged"),
        (last.source, True, None),
    ]
    assert outbox.header.replace_sources([accepted[1].source, last.source]) == [last.source]
    assert outbox.sources()[1].left_because == "damaged"


def test_numbers_continue_after_reopening_and_source_ids_differ_between_files(path: Path, tmp_path: Path) -> None:
    """No sequence is used twice."""
    first = Outbox(path)
    (before,) = first.append(NAME, [a_snapshot()])
    first.close()
    (after,) = Outbox(path).append(NAME, [a_snapshot()])
    (elsewhere,) = Outbox(tmp_path / "other.db").append(NAME, [a_snapshot()])

    assert (after.source, after.sequence) == (before.source, 2)
    assert elsewhere.source != before.source


def test_appending_many_events_appends_all_or_none(path: Path) -> None:
    """One event that is too large prevents all of them, and no number is used."""
    outbox = Outbox(path)
    too_large = an_archive(signals=[a_signal(reason="x" * MAX_EVENT_BYTES)])
    with pytest.raises(InvalidEvent, match="event: is larger than 8 MiB"):
        outbox.append(NAME, [a_snapshot(), too_large])

    assert outbox.deliveries.pending(10) == []
    assert [one.sequence for one in outbox.append(NAME, [a_snapshot()])] == [1]


def test_an_entry_goes_from_pending_to_sent_to_stored(path: Path) -> None:
    """`status` counts the entries in each state and returns the age of the oldest unsettled entry."""
    outbox = Outbox(path)
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    (entry,) = outbox.deliveries.pending(10)
    states, statuses = [outbox.status()], [outbox.status_of(accepted)]
    outbox.deliveries.mark_sent({entry.position: 5.0})
    states.append(outbox.status())
    statuses.append(outbox.status_of(accepted))
    _settle(outbox, (accepted, Outcome("duplicate", row_id=7)))
    states.append(outbox.status())
    statuses.append(outbox.status_of(accepted))

    assert [(state.pending, state.sent, state.stored, state.rejected) for state in states] == [
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
    ]
    assert [state.oldest_unsettled_seconds is None for state in states] == [False, False, True]
    assert statuses == [
        EntryStatus("pending", None, None),
        EntryStatus("sent", None, None),
        EntryStatus("stored", 7, None),
    ]


def test_a_late_acknowledgement_does_not_undo_an_earlier_one(path: Path) -> None:
    """A settled entry keeps its state; the key of an unknown entry is not returned."""
    outbox = Outbox(path)
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    assert _settle(outbox, (accepted, STORED)) == SettledKeys([1], [])
    unknown = replace(accepted, sequence=99)
    again = _settle(outbox, (accepted, REJECTED), (unknown, STORED))

    assert again == SettledKeys([], [1])
    assert _settle(outbox, (accepted, Outcome("duplicate", row_id=8))) == SettledKeys([], [1])
    assert outbox.status_of(accepted) == EntryStatus("stored", 7, None)
    assert outbox.status().stored == 1


@pytest.mark.parametrize("other", ["nonce", "event_id", "source_id"])
def test_an_acknowledgement_of_another_delivery_settles_nothing(path: Path, other: str) -> None:
    """A copy of this outbox gave the same number to another event, or the event's id differs."""
    outbox = Outbox(path)
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    found = Acknowledgement(accepted.source_id, 1, accepted.nonce, str(accepted.event_id), STORED, at=0)
    foreign = {
        "nonce": found._replace(nonce="0" * 16),
        "event_id": found._replace(event_id=str(uuid4())),
        "source_id": found._replace(source_id="ab"),
    }
    settled = outbox.deliveries.settle(accepted.source_id, 0, {"key": foreign[other]})

    # The outbox has an entry with that job id, whatever event the acknowledgement names.
    assert settled == SettledKeys([], ["key"] if other == "event_id" else [])
    assert outbox.status_of(accepted).state == "pending"
    assert outbox.deliveries.settle(accepted.source_id, 0, {"key": found._replace(event_id=None)}) == SettledKeys(
        ["key"], []
    )


def test_a_rejected_entry_that_is_requeued_and_stored_becomes_stored(path: Path) -> None:
    """Its source still awaits an acknowledgement, so that the relay reads it."""
    outbox = Outbox(path)
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    _settle(outbox, (accepted, REJECTED))
    assert outbox.status_of(accepted) == EntryStatus("rejected", None, "no")
    assert (outbox.status().stored, outbox.status().rejected) == (0, 1)
    assert (outbox.deliveries.awaiting("sent"), outbox.deliveries.awaiting("rejected")) == (
        [],
        [(accepted.source_id, NAME, 0)],
    )
    _settle(outbox, (accepted, STORED))

    assert outbox.status_of(accepted) == EntryStatus("stored", 7, None)
    assert (outbox.deliveries.awaiting("sent"), outbox.deliveries.awaiting("rejected")) == ([], [])


def test_sent_entries_are_overdue_when_their_check_is_due(path: Path) -> None:
    """Postponing the check ends that."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    first = _send_next(outbox, check_after=-1.0)
    _send_next(outbox, check_after=100.0)

    assert [entry.sequence for entry in outbox.deliveries.overdue(10)] == [1]
    outbox.deliveries.postpone({first.position: 100.0})
    assert outbox.deliveries.overdue(10) == []


def test_a_check_later_than_the_longest_interval_is_due_now(path: Path) -> None:
    """A clock that was ahead wrote it. The limit is for both kinds; the checks whose time has come are first."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(4)])
    far, *_ = (_send_next(outbox, check_after=seconds) for seconds in (2 * 86400.0, -1.0, 330.0, 400.0))

    assert sorted(entry.sequence for entry in outbox.deliveries.overdue(10)) == [1, 2, 4]
    assert [entry.sequence for entry in outbox.deliveries.overdue(1)] == [2]
    outbox.deliveries.postpone({far.position: 300.0})
    assert sorted(entry.sequence for entry in outbox.deliveries.overdue(10)) == [2, 4]


def test_check_now_makes_sent_entries_up_to_a_position_overdue(path: Path) -> None:
    """`outbox flush` does not wait for the next check."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(2)])
    outbox.deliveries.mark_sent({entry.position: 100.0 for entry in outbox.deliveries.pending(2)})
    until = outbox.last_position()
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    outbox.deliveries.mark_sent({entry.position: 100.0 for entry in outbox.deliveries.pending(2)})
    outbox.check_now(until)

    assert sorted(entry.sequence for entry in outbox.deliveries.overdue(10)) == [1, 2]
    assert (outbox.pending_count(until), outbox.pending_count()) == (0, 1)
    assert (outbox.unsettled_count(until=until), outbox.unsettled_count()) == (2, 5)


def test_the_last_position_of_an_empty_outbox_is_before_its_first_entry(path: Path) -> None:
    outbox = Outbox(path)
    until = outbox.last_position()
    outbox.append(NAME, [a_snapshot()])
    assert (outbox.pending_count(until), outbox.unsettled_count(until=until)) == (0, 0)


def test_a_check_that_is_asked_for_changes_neither_intervals_nor_pending_entries(path: Path) -> None:
    """The number of checks decides the next interval. An entry that is to be sent again stays pending."""
    outbox = Outbox(path)
    first, settled = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(2)])
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(2)})
    _settle(outbox, (settled, STORED))
    for checks in (1, 2):
        assert [(entry.sequence, entry.checks) for entry in outbox.deliveries.overdue(2)] == [(first.sequence, checks)]
        outbox.deliveries.postpone({1: 0.0})
    outbox.deliveries.postpone({1: 100.0})
    outbox.resend(since=0)
    outbox.check_now(outbox.last_position())

    assert [(entry.sequence, entry.checks) for entry in outbox.deliveries.overdue(2)] == [(first.sequence, 3)]
    assert outbox.pending_count() == 1


def test_a_check_that_is_asked_for_again_and_again_is_never_counted(path: Path) -> None:
    """Neither the first check of an entry nor a later one; entries behind the position are not checked."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(2)])
    for _ in range(2):
        _send_next(outbox, check_after=100.0)
    until = Position(1, outbox.generation)
    for _ in range(3):
        outbox.check_now(until)
        assert [(entry.sequence, entry.checks) for entry in outbox.deliveries.overdue(2)] == [(1, 0)]
    outbox.deliveries.postpone({1: 100.0})
    outbox.check_now(until)
    assert [(entry.sequence, entry.checks) for entry in outbox.deliveries.overdue(2)] == [(1, 0)]


@pytest.mark.parametrize("seconds", [-1.0, 400.0], ids=["due", "too late"])
def test_the_checks_that_are_furthest_from_their_time_come_first(path: Path, seconds: float) -> None:
    """The others follow in the next portion: no entry waits for ever."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    for n in (1, 3, 2):
        _send_next(outbox, check_after=n * seconds)
    for sequence in (2, 3, 1):
        (entry,) = outbox.deliveries.overdue(1)
        assert entry.sequence == sequence
        outbox.deliveries.postpone({entry.position: 100.0})


def test_a_relay_that_has_nothing_to_do_does_not_wait_for_other_processes(path: Path) -> None:
    """It looks for pending and overdue entries at each sweep, also while a process records."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot()])
    _send_next(outbox, check_after=100.0)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert outbox.deliveries.pending(1) == []
        assert outbox.deliveries.overdue(1) == []


def test_an_entry_of_a_copy_with_the_same_number_has_no_state_here(path: Path, tmp_path: Path) -> None:
    """Only the nonce differs."""
    with Outbox(path) as outbox:
        outbox.append(NAME, [a_snapshot()])
    shutil.copy(path, tmp_path / "copy.db")
    one, other = Outbox(path), Outbox(tmp_path / "copy.db")
    (own,) = one.append(NAME, [a_snapshot(after=timedelta(1))])
    (foreign,) = other.append(NAME, [a_snapshot(after=timedelta(2))])

    assert (own.source, own.sequence) == (foreign.source, foreign.sequence)
    assert [status and status.state for status in one.statuses_of([own, foreign])] == ["pending", None]


def test_an_unchanged_destination_is_set_while_another_process_writes(path: Path) -> None:
    """Each producer sets it when it starts, and does not wait for those that record."""
    outbox = Outbox(path)
    outbox.set_destination("database 0 on here", "history")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        outbox.set_destination("database 0 on here", "history")
    identity = outbox.header.read()
    assert (identity.redis, identity.queue) == ("database 0 on here", "history")


def test_only_optional_columns_may_be_null(path: Path) -> None:
    """Each other value is known when its row is written."""
    Outbox(path).close()
    columns = """
        SELECT tables.name, info.name FROM sqlite_master AS tables CROSS JOIN pragma_table_info(tables.name) AS info
        WHERE tables.type = 'table' AND NOT "notnull" AND NOT pk AND tables.name NOT LIKE 'sqlite%' ORDER BY 1, 2
    """
    with closing(sqlite3.connect(path)) as db:
        assert db.execute(columns).fetchall() == [
            ("outbox", "queue"),
            ("outbox", "redis"),
            ("outbox", "relay"),
            ("outbox", "relay_at"),
            ("outcomes", "reason"),
            ("outcomes", "row_id"),
            ("retries", "check_at"),
            ("sources", "left_because"),
        ]


def test_a_batch_ends_before_it_is_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is the bytes of its events. A larger event is a batch alone, and no entry is skipped."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(5)])
    size = len(outbox.deliveries.pending(1)[0].event)
    monkeypatch.setattr(outbox_deliveries, "_BATCH_BYTES", 3 * size)
    assert [entry.sequence for entry in outbox.deliveries.pending(10)] == [1, 2, 3]
    assert [entry.sequence for entry in outbox.deliveries.pending(2)] == [1, 2]
    monkeypatch.setattr(outbox_deliveries, "_BATCH_BYTES", size - 1)
    batch = outbox.deliveries.pending(10)
    outbox.deliveries.mark_sent({batch[0].position: 100.0})
    assert [[entry.sequence for entry in found] for found in (batch, outbox.deliveries.pending(10))] == [[1], [2]]


def test_threads_share_an_outbox(path: Path) -> None:
    """400 appends from 8 threads use each number once."""
    outbox = Outbox(path)
    threads = [
        threading.Thread(target=lambda: [outbox.append(NAME, [a_snapshot()]) for _ in range(50)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [entry.sequence for entry in outbox.deliveries.pending(1000)] == list(range(1, 401))


def _append(path: Path, count: int) -> None:
    outbox = Outbox(path, repair=True)
    for _ in range(count):
        outbox.append(NAME, [a_snapshot()])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_processes_share_an_outbox(path: Path) -> None:
    """4 processes open a new file at the same time: it has one source, and each number is used once."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(path, 50), daemon=True) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    assert [writer.exitcode for writer in writers] == [0] * 4
    entries = Outbox(path).deliveries.pending(1000)
    assert sorted(entry.sequence for entry in entries) == list(range(1, 201))
    assert len({entry.source_id for entry in entries}) == 1


def test_opening_waits_for_another_process_that_creates_the_file(tmp_path: Path) -> None:
    """Until the new file has a write-ahead log, SQLite reports "locked" without waiting."""
    path = tmp_path / "outbox.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE created_first (one)")
        other.execute("BEGIN IMMEDIATE")
        with pytest.MonkeyPatch.context() as patch:
            ended = threading.Event()

            def end(_: float) -> None:  # instead of the pause
                if not ended.is_set():
                    other.execute("COMMIT")
                    ended.set()

            patch.setattr("producers.sqlite_connections.time.sleep", end)
            assert Outbox(path).append(NAME, [a_snapshot()])[0].sequence == 1
        assert ended.is_set()


def test_an_accepted_event_survives_the_end_of_the_process(path: Path) -> None:
    """The process kills itself right after `append` returned."""
    script = f"""
import os, signal
from pathlib import Path
from producers.outbox import Outbox
from tests.factories import a_snapshot
Outbox(Path({str(path)!r})).append("x", [a_snapshot()])
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", script], cwd=root, check=False)

    assert died.returncode == -9
    assert [json.loads(entry.event)["type"] for entry in Outbox(path).deliveries.pending(10)] == [
        "trading.portfolio-snapshot.v1"
    ]


def test_appending_waits_for_the_disk_and_changing_a_state_does_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection that appends syncs each commit. A lost change of state only costs a re-send."""
    opened: list[tuple[sqlite3.Connection, list[str]]] = []
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        opened.append((connect(*args, **kwargs), []))
        opened[-1][0].set_trace_callback(opened[-1][1].append)
        return opened[-1][0]

    monkeypatch.setattr(sqlite3, "connect", traced)
    outbox = Outbox(path)
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(1)})
    _settle(outbox, (accepted, STORED))

    def modes_of(statement: str) -> list[tuple[str, int]]:
        having = [db for db, statements in opened if any(one.strip().startswith(statement) for one in statements)]
        return [
            tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))
            for db in having
        ]

    assert modes_of("INSERT INTO entries") == [("wal", 2)]
    assert modes_of("UPDATE outbox SET sent_through") == [("wal", 1)]
    assert modes_of("INSERT OR REPLACE INTO outcomes") == [("wal", 1)]


def test_only_appends_and_exchanges_of_tokens_wait_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the relay's work nor the start after the machine was started. The exchange of a token waits."""
    opened: list[list[str]] = []
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **kwargs)
        opened.append([])
        connection.set_trace_callback(opened[-1].append)
        return connection

    def written_durably() -> list[str]:
        synced = [one for statements in opened if "PRAGMA synchronous = FULL" in statements for one in statements]
        return [one for one in synced if one.split()[0] in ("INSERT", "UPDATE", "DELETE")]

    monkeypatch.setattr(sqlite3, "connect", traced)
    outbox = Outbox(path)
    skipped, sent, stored, last = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(4)])
    appended = written_durably()
    _settle(outbox, (skipped, STORED))
    outbox.deliveries.mark_sent({entry.position: -1.0 for entry in outbox.deliveries.pending(2)})
    outbox.deliveries.postpone({entry.position: 9.0 for entry in outbox.deliveries.overdue(2)})
    outbox.check_now(outbox.last_position())
    _settle(outbox, (stored, STORED))
    assert outbox.deliveries.prune(keep_seconds=-1) == 2
    _settle(outbox, (sent, STORED), (last, STORED))
    assert outbox.deliveries.pending(2) == []
    outbox.header.heartbeat("relay")
    outbox.header.clear_heartbeat("relay")
    monkeypatch.setattr(outbox_clock, "boot_id", lambda: "after the start of the machine")
    Outbox(path, repair=True).close()
    assert written_durably() == appended
    outbox.header.begin_exchange((), "next")
    outbox.header.end_exchange("next")
    assert [one.partition(" =")[0] for one in written_durably()[len(appended) :]] == ["UPDATE outbox SET token"]


@pytest.mark.parametrize("content", [b"this is no database" * 100, None])
def test_opening_another_file_or_a_folder_raises_an_error_that_names_it(path: Path, content: bytes | None) -> None:
    """The path leads to a file of another program, or to a folder."""
    path.parent.mkdir(parents=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(OutboxError, match=f"^outbox {path}(: | is a folder: )"):
        Outbox(path)


def test_text_that_is_not_utf_8_raises_an_error_that_names_the_file(path: Path) -> None:
    """A damaged disk may return such text. SQLite has no error code for it."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot()])
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE entries SET event = CAST(x'ff' AS TEXT)")
    with pytest.raises(OutboxDamaged, match=re.escape(str(path))):
        outbox.deliveries.pending(1)


def test_a_full_disk_raises_an_error_and_records_nothing(path: Path) -> None:
    """SQLite's page limit simulates the full disk."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot()])
    pages = outbox._file._connections["FULL"].execute("PRAGMA page_count").fetchone()[0]
    outbox._file._connections["FULL"].execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutboxError, match="full"):
        outbox.append(NAME, [an_archive(signals=[a_signal(reason="x" * 100_000)])])
    outbox._file._connections["FULL"].execute("PRAGMA max_page_count = 1000000")

    assert [one.sequence for one in outbox.append(NAME, [a_snapshot()])] == [2]


def test_a_full_outbox_raises_an_error_and_can_still_settle_entries(path: Path) -> None:
    """Appending stops at the limit. Marking and settling still work, and pruning makes room again."""
    outbox = Outbox(path, max_bytes=2**20)
    accepted: list[Accepted] = []

    def fill() -> None:
        for n in range(1000):
            accepted.extend(outbox.append(NAME, [a_snapshot(after=timedelta(seconds=20 * n + m)) for m in range(20)]))

    with pytest.raises(OutboxError, match=r"is full: its disk, or its limit of 1 MiB. Entries leave it when"):
        fill()
    full = outbox.status().pending
    entries = outbox.deliveries.pending(full)
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in entries})
    _settle(outbox, *((one, STORED) for one in accepted))

    assert outbox.deliveries.prune(keep_seconds=1e9) > 0
    assert [one.sequence for one in outbox.append(NAME, [a_snapshot()])] == [full + 1]


def test_old_settled_entries_are_deleted_and_others_never(path: Path) -> None:
    """Pending and sent entries stay at any age. The database keeps the record of a rejected event."""
    outbox = Outbox(path)
    rejected, stored, *_ = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(4)])
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(3)})
    _settle(outbox, (rejected, REJECTED), (stored, STORED))

    assert outbox.deliveries.prune(keep_seconds=60) == 0
    assert outbox.deliveries.prune(keep_seconds=0) == 2
    status = outbox.status()
    assert (status.pending, status.sent, status.rejected, status.stored) == (1, 1, 0, 0)
    with pytest.raises(OutboxError, match="entry 2 is no longer kept"):
        outbox.status_of(stored)


def test_entries_that_were_settled_first_are_deleted_first(path: Path) -> None:
    """At most a thousand at once: appends wait meanwhile."""
    outbox = Outbox(path)
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(1001)])
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(1001)})
    _settle(outbox, (accepted[1000], STORED))
    _settle(outbox, *((one, STORED) for one in accepted[:1000]))
    assert outbox.deliveries.prune(keep_seconds=-1) == 1000
    assert outbox.statuses_of(accepted[1000:]) == [None]
    assert outbox.deliveries.prune(keep_seconds=-1) == 1


def test_a_size_limit_that_is_reached_when_the_file_is_created_raises_an_error(path: Path) -> None:
    """As soon as there is room, the same file can be used."""
    with pytest.raises(OutboxError, match="is full: its disk, or its limit"):
        Outbox(path, max_bytes=2**13).append(NAME, [a_snapshot()])
    assert [one.sequence for one in Outbox(path).append(NAME, [a_snapshot()])] == [1]


def test_a_path_that_the_system_does_not_accept_raises_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OutboxError, match="File name too long"):
        Outbox(tmp_path / ("x" * 300)).append(NAME, [a_snapshot()])


def test_settled_entries_are_deleted_early_while_the_file_is_half_full(path: Path) -> None:
    """Entries that wait stay. When the file has room again, settled entries are kept for the set time."""
    outbox = Outbox(path, max_bytes=2**20)
    settled = outbox.append(NAME, [a_snapshot(after=timedelta(seconds=n)) for n in range(20)])
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(20)})
    _settle(outbox, *((one, STORED) for one in settled[:10]))
    assert outbox.deliveries.prune(keep_seconds=60) == 0

    large = outbox.append(NAME, [an_archive(signals=[a_signal(reason="x" * 350_000)])])
    assert outbox.deliveries.prune(keep_seconds=60) == 0
    large += outbox.append(NAME, [an_archive(after=timedelta(1), signals=[a_signal(reason="x" * 250_000)])])
    assert outbox.deliveries.prune(keep_seconds=60) == 10
    status = outbox.status()
    assert (status.pending, status.sent, status.stored) == (2, 10, 0)

    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(2)})
    _settle(outbox, *((one, STORED) for one in large))
    assert outbox.deliveries.prune(keep_seconds=60) == 2
    _settle(outbox, (settled[10], STORED))
    assert outbox.deliveries.prune(keep_seconds=60) == 0


def test_a_resend_makes_settled_entries_since_a_time_pending_again(path: Path) -> None:
    """Stored and rejected entries keep their number and bytes. Older and unsettled entries do not change."""
    outbox = Outbox(path)
    assert outbox.resend(since=0) == 0
    stored, rejected, _ = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    before = outbox.deliveries.pending(10)
    assert outbox.entries() == before
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in before})
    _settle(outbox, (stored, STORED), (rejected, REJECTED))

    assert outbox.resend(since=time.time() + 1) == 0
    assert outbox.resend(since=time.time() - 60) == 2
    # Like new entries, they have no checks: a relay that asked Redis first would find the earlier acknowledgements.
    assert outbox.deliveries.pending(10) == before[:2] == outbox.entries()[:2]
    assert outbox.deliveries.pending(1) == before[:1]
    assert {entry.checks for entry in before} == {0}


def test_an_acknowledgement_from_before_a_resend_settles_nothing(path: Path) -> None:
    """It is valid for the replaced database only."""
    outbox = Outbox(path)
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(10)})
    ((_, _, resends),) = outbox.deliveries.awaiting("sent")
    assert outbox.resend(since=0) == 0
    assert _settle(outbox, (accepted, STORED), resends=resends) == SettledKeys([], [])
    assert outbox.status_of(accepted).state == "sent"

    assert _settle(outbox, (accepted, STORED), resends=resends + 1) == SettledKeys([1], [])
    assert outbox.status_of(accepted) == EntryStatus("stored", 7, None)


def test_a_retry_that_another_relay_sent_does_not_mark_later_entries(path: Path) -> None:
    """Two relays read the same resent entry, which was settled before it was sent. The entry before it is pending."""
    outbox, other = Outbox(path), Outbox(path)
    pending, settled = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(2)])
    _settle(outbox, (settled, STORED))
    outbox.resend(since=0)
    (entry,) = outbox.deliveries.pending(1)
    assert other.deliveries.pending(1) == [entry]
    other.deliveries.mark_sent({entry.position: 100.0})
    outbox.deliveries.mark_sent({entry.position: 100.0})
    assert [outbox.status_of(one).state for one in (pending, settled)] == ["pending", "sent"]
    assert [one.sequence for one in outbox.deliveries.pending(10)] == [pending.sequence]


def test_entries_that_were_settled_before_they_were_sent_are_skipped(path: Path) -> None:
    """A salvage may bring many of them. Then no query may read them again and again."""
    outbox = Outbox(path)
    settled = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(5)])
    _settle(outbox, *((one, STORED) for one in settled[:4]))
    resent = _settle(outbox, (settled[4], STORED))
    assert (resent.changed, outbox.resend(since=time.time() - 1e6)) == ([5], 5)
    _settle(outbox, *((one, STORED) for one in settled[:4]), resends=1)
    (later,) = outbox.append(NAME, [an_archive()])
    assert [one.sequence for one in outbox.deliveries.pending(9)] == [5]
    outbox.deliveries.mark_sent({outbox.deliveries.pending(1)[0].position: 9.0})
    assert [one.sequence for one in outbox.deliveries.pending(9)] == [later.sequence]
    outbox.deliveries.mark_sent({outbox.deliveries.pending(1)[0].position: 9.0})
    with outbox._file.reading() as db:
        assert db.execute("SELECT first, last FROM batches").fetchall() == [(6, 6)]
        assert db.execute("SELECT sent_through FROM outbox").fetchone() == (6,)
    outbox.append(NAME, [a_snapshot()])
    _settle(outbox, (settled[4], STORED), (later, STORED), resends=1)
    with outbox._file.reading() as db:
        assert db.execute("SELECT first, last FROM batches").fetchall() == []
    assert (outbox.status().depth, outbox.deliveries.prune(-1)) == (1, 6)


def test_a_look_for_pending_entries_skips_settled_ones_once(path: Path) -> None:
    outbox = Outbox(path)
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(5)])
    _send_next(outbox, check_after=100.0)
    _settle(outbox, *((one, STORED) for one in accepted[1:]))
    assert outbox.deliveries.pending(9) == []
    with outbox._file.reading() as db:
        assert db.execute("SELECT sent_through FROM outbox").fetchone() == (5,)


def test_two_acknowledgements_of_one_entry_settle_it_once(path: Path) -> None:
    """A stored event stays stored, whichever of them is read first. The later one is known."""
    for first, then in ((STORED, REJECTED), (REJECTED, REJECTED)):
        outbox = Outbox(path.with_name(f"{first.kind}.db"))
        (accepted,) = outbox.append(NAME, [a_snapshot()])
        found = {
            key: Acknowledgement(accepted.source_id, 1, accepted.nonce, str(accepted.event_id), outcome, at=0)
            for key, outcome in (("a", first), ("b", then))
        }
        assert outbox.deliveries.settle(accepted.source_id, 0, found) == SettledKeys(["a"], ["b"])
        status = outbox.status_of(accepted)
        assert (status.state, status.row_id, status.reason) == (first.kind, first.row_id, first.reason)


def test_other_processes_can_append_during_a_resend(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resend works page by page. From the first page on, earlier acknowledgements settle nothing."""
    outbox, other = Outbox(path), Outbox(path)
    accepted = _stored(outbox, 5)
    monkeypatch.setattr(outbox_module, "_RESENT_ENTRIES", 2)
    pending = []

    def meanwhile(_: float) -> None:
        pending.append(other.pending_count())
        other.append(NAME, [a_snapshot()])
        assert _settle(other, (accepted[0], STORED)) == SettledKeys([], [])

    monkeypatch.setattr(time, "sleep", meanwhile)
    assert outbox.resend(since=0) == 5
    assert pending == [2, 5]
    assert outbox.pending_count() == 7


def test_a_resend_continues_in_a_file_that_replaces_the_outbox(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its positions begin again. The pages that follow have all settled entries of this file."""
    outbox = Outbox(path)
    _stored(outbox, 5)
    with Outbox(path.with_name("other.db")) as other:
        there = _stored(other, 3)
    monkeypatch.setattr(outbox_module, "_RESENT_ENTRIES", 2)

    def replaced(_: float) -> None:
        if other.path.exists():
            other.path.replace(path)
            outbox.status()

    monkeypatch.setattr(time, "sleep", replaced)
    assert outbox.resend(since=0) == 2 + 3
    assert {outbox.status_of(one).state for one in there} == {"pending"}


def test_an_interrupted_resend_can_be_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that were sent and settled again by then are sent once more, as duplicates. No entry is left out."""
    outbox = Outbox(path)
    first, *_ = _stored(outbox, 5)
    monkeypatch.setattr(outbox_module, "_RESENT_ENTRIES", 2)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            outbox.resend(since=0)
    assert outbox.pending_count() == 2
    assert _settle(outbox, (first, STORED), resends=1) == SettledKeys([1], [])
    assert outbox.resend(since=0) == 4
    assert outbox.pending_count() == 5
    assert _settle(outbox, (first, STORED), resends=1) == SettledKeys([], [])


def _stored(outbox: Outbox, count: int) -> list[Accepted]:
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(count)])
    outbox.deliveries.settle(
        accepted[0].source_id,
        0,
        {one: Acknowledgement(one.source_id, one.sequence, one.nonce, None, STORED, at=0) for one in accepted},
    )
    return accepted


def _interrupt(_: float) -> None:
    raise KeyboardInterrupt


def test_recording_in_a_signal_handler_while_its_thread_records_raises_an_error(path: Path) -> None:
    """It would otherwise wait for itself for ever."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot()])
    before = signal.signal(signal.SIGUSR1, lambda *_: outbox.append(NAME, [a_snapshot()]))
    try:
        with pytest.raises(OutboxError, match="by a signal handler"), outbox._file.transaction():
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)  # allowed, because the thread is not recording
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [entry.sequence for entry in outbox.entries()] == [1, 2]


@pytest.mark.parametrize(
    ("version", "age", "remedy"),
    [
        (VERSION - 1, "an earlier", "run `trading-history outbox flush` of that version"),
        (VERSION + 1, "a newer", "upgrade this program"),
    ],
)
def test_an_outbox_of_another_version_is_left_unchanged(path: Path, version: int, age: str, remedy: str) -> None:
    """Its tables may have another meaning. The error says what to do."""
    with Outbox(path) as outbox:
        outbox.append(NAME, [a_snapshot()])
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA user_version = {version}")
        for repair in (False, True):
            with pytest.raises(
                OutboxError, match=rf"by {age} version .*format {version}; .* {VERSION}.. Nothing was changed: {remedy}"
            ):
                Outbox(path, repair=repair)
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
        assert db.execute("SELECT count(*) FROM entries").fetchone() == (1,)


def test_only_one_relay_has_the_lock(path: Path) -> None:
    """The lock excludes threads and processes; the kernel releases it when the process dies."""
    outbox = Outbox(path)
    first, second = outbox.relay_lock(), Outbox(path).relay_lock()
    assert (first.acquire(), first.acquire(), second.acquire()) == (True, True, False)
    first.release()
    assert second.acquire()
    second.release()

    script = f"""
import sys
from pathlib import Path
from producers.outbox import Outbox
lock = Outbox(Path({str(path)!r})).relay_lock()
print(lock.acquire(), flush=True)
sys.stdin.read()
"""
    root = Path(__file__).parents[2]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, cwd=root) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"True\n"
            assert not first.acquire()
        finally:
            owner.kill()
    assert first.acquire()
    first.release()


def test_a_forked_child_opens_the_file_again(path: Path) -> None:
    """The child can append without preparation, and the parent continues undisturbed."""
    outbox = Outbox(path)
    outbox.append(NAME, [a_snapshot()])

    def append() -> None:
        assert [one.sequence for one in outbox.append(NAME, [a_snapshot()])] == [2]

    assert in_child(append) == 0
    assert [one.sequence for one in outbox.append(NAME, [a_snapshot()])] == [3]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_counting_does_not_read_events(path: Path) -> None:
    """Reading a week of stored entries would take seconds each time the status is shown."""
    outbox = Outbox(path)
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(300)])
    outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(200)})
    _settle(outbox, *((one, STORED) for one in accepted[:200]))
    steps = 0

    def count_steps() -> None:
        nonlocal steps
        steps += 1

    outbox._file._connections["NORMAL"].set_progress_handler(count_steps, 10)
    status = outbox.status()
    assert (status.pending, status.sent, status.stored) == (100, 0, 200)
    assert steps < 100


def test_the_audit_reads_all_entries_of_a_source_in_the_order_of_their_numbers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page. An entry of a copy with the same number is read too."""
    outbox = Outbox(path)
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(5)])
    outbox.append("other", [a_snapshot()])
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TEMP TABLE one AS SELECT * FROM entries WHERE position = 2")
        db.execute("UPDATE one SET position = NULL, nonce = 'a copy'")
        db.execute("INSERT INTO entries SELECT * FROM one")
    _settle(outbox, (accepted[0], STORED), (accepted[4], REJECTED))
    for page_entries in (1, 2, 6, 7):
        monkeypatch.setattr(outbox_module, "_AUDITED_ENTRIES", page_entries)
        pages = list(outbox.audit_pages(accepted[0].source_id))
        assert max(map(len, pages)) <= page_entries
        found = [entry for page in pages for entry in page]
        assert [(entry.sequence, entry.state) for entry in found] == [
            (1, "stored"), (2, "pending"), (2, "pending"), (3, "pending"), (4, "pending"), (5, "rejected"),
        ]  # fmt: skip
        assert {entry.event_id for entry in found} == {one.event_id for one in accepted}
    assert list(outbox.audit_pages("0" * 32)) == []


def test_the_numbers_of_unsettled_entries_are_those_of_pending_and_sent_ones(path: Path) -> None:
    outbox = Outbox(path)
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(4)])
    outbox.append("other", [a_snapshot(after=timedelta(n)) for n in range(6)])
    outbox.deliveries.mark_sent({entry.position: 9.0 for entry in outbox.deliveries.pending(2)})
    _settle(outbox, (accepted[0], STORED), (accepted[3], REJECTED))
    assert outbox.unsettled(accepted[0].source_id) == {2, 3}


def test_an_outbox_says_which_deliveries_it_has_and_which_are_settled(path: Path) -> None:
    """A delivery is identified by source, number and nonce; other fields of Redis name none."""
    outbox = Outbox(path)
    pending, stored, rejected = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    _settle(outbox, (stored, STORED), (rejected, REJECTED))
    own = [(one.source_id, one.sequence, one.nonce) for one in (pending, stored, rejected)]
    foreign = [("0" * 32, 1, pending.nonce), (pending.source_id, 9, pending.nonce), (pending.source_id, 1, "0" * 16)]
    assert [outbox.deliveries.has(one) for one in (*own, *foreign, None)] == [True] * 3 + [False] * 4
    assert [outbox.deliveries.is_settled(one) for one in (*own, *foreign, None)] == [False, True, True] + [False] * 4


def _hold_write_lock(path: Path) -> sqlite3.Connection:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE created_first (one)")
    other.execute("BEGIN IMMEDIATE")
    return other


@pytest.mark.parametrize("is_locked", [True, False], ids=["locked too long", "read-only"])
def test_opening_ends_with_sqlites_error_if_the_file_gets_no_log(tmp_path: Path, is_locked: bool) -> None:
    """Another program has the file locked for longer than the time limit, or the file cannot be written at all."""
    path = tmp_path / "outbox.db"
    with closing(_hold_write_lock(path)) as other:
        if not is_locked:
            other.execute("COMMIT")
        with (
            closing(sqlite3.connect(f"file:{path}{'' if is_locked else '?mode=ro'}", uri=True, timeout=0)) as db,
            pytest.raises(sqlite3.OperationalError, match="locked" if is_locked else "readonly"),
        ):
            use_wal(db, 0.01 if is_locked else 60.0)


def test_a_resend_sends_an_entry_once_although_a_relay_settles_it_between_two_pages(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would have two states, and never be settled."""
    outbox = Outbox(path)
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(4)])

    def send() -> None:
        outbox.deliveries.mark_sent({entry.position: 0.0 for entry in outbox.deliveries.pending(9)})

    def settle_first_page(_: float) -> None:
        send()
        _settle(outbox, (accepted[0], STORED), (accepted[1], STORED), resends=1)

    send()
    _settle(outbox, *((one, STORED) for one in accepted))
    monkeypatch.setattr(outbox_module, "_RESENT_ENTRIES", 2)
    monkeypatch.setattr(time, "sleep", settle_first_page)
    assert outbox.resend(since=0) == 4
    monkeypatch.undo()
    send()
    _settle(outbox, (accepted[2], STORED), (accepted[3], STORED), resends=1)
    assert (outbox.unsettled_count(), outbox.status().sent, outbox.status().stored) == (0, 0, 4)
