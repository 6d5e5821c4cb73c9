"""Digests of the entries that an outbox has deleted stay in it, and follow it into a new file."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from producers import outbox_segments
from producers.acknowledgements import Acknowledgement, Outcome
from producers.digests import digest_of_text
from producers.entries import Accepted, Entry
from producers.errors import OutboxError
from producers.outbox import Outbox
from producers.segments import (
    CHAIN_START,
    SEGMENT_EVENTS,
    Segment,
    SettledEvent,
    continued,
    next_head,
    ranges_of,
)
from tests.factories import a_signal, a_snapshot, an_archive

NAME = "trading-controller"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "outbox.db"


def _append(outbox: Outbox, count: int, *, name: str = NAME, rejected: Sequence[int] = ()) -> list[Entry]:
    """Append entries, settle them, and return them; those at the positions in `rejected` are rejected."""
    after = outbox.last_position().number
    accepted = outbox.append(name, [a_snapshot(after=timedelta(minutes=after + n)) for n in range(count)])
    _send(outbox)
    for n, one in enumerate(accepted):
        _settle(outbox, one, Outcome("rejected", reason="invalid") if n in rejected else Outcome("stored", row_id=n))
    keys = {(one.source_id, one.sequence) for one in accepted}
    return [entry for entry in outbox.entries() if (entry.source_id, entry.sequence) in keys]


def _send(outbox: Outbox) -> None:
    while entries := outbox.deliveries.pending(1000):
        outbox.deliveries.mark_sent({entry.position: 0.0 for entry in entries})


def _settle(outbox: Outbox, one: Accepted, outcome: Outcome) -> None:
    known = {0: Acknowledgement(one.source_id, one.sequence, one.nonce, str(one.event_id), outcome, at=0)}
    outbox.deliveries.settle(one.source_id, 0, known)


def _prune(outbox: Outbox) -> int:
    return outbox.deliveries.prune(keep_seconds=-1)


def _content(outbox: Outbox) -> list[Segment]:
    return [segment for source in outbox.sources() for segment in outbox.digest_chain(source.id)]


def _rows(path: Path) -> list[tuple[Any, ...]]:
    """Return the rows of the table with all columns, checksums included."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT * FROM segments ORDER BY id").fetchall()


def _digest(entry: Entry) -> bytes:
    digest = digest_of_text(entry.type, entry.event)
    assert digest is not None
    return digest


def _head(entries: Sequence[Entry], rejected: Sequence[int] = (), before: bytes = CHAIN_START) -> bytes:
    for n, entry in enumerate(entries):
        before = next_head(before, entry.sequence, n in rejected, _digest(entry))
    return before


def test_the_digests_of_deleted_entries_stay_in_the_outbox(path: Path) -> None:
    with Outbox(path) as outbox:
        entries = _append(outbox, 5, rejected=[2])
        whole = _content(outbox)
        assert _prune(outbox) == 5
        assert outbox.entries() == []
        assert _content(outbox) == whole
    (segment,) = whole
    assert (segment.previous_head, segment.head) == (CHAIN_START, _head(entries, [2]))
    assert (segment.sequences, [*segment.rejected]) == ([1, 2, 3, 4, 5], [2])
    assert segment.prefixes == b"".join(_digest(one)[:8] for one in entries)
    assert [segment.prefix(n) for n in range(5)] == [_digest(one)[:8] for one in entries]


def test_kept_entries_continue_the_chain_of_deleted_ones(path: Path) -> None:
    with Outbox(path) as outbox:
        deleted = _append(outbox, 2)
        _prune(outbox)
        kept = _append(outbox, 2)
        first, second = _content(outbox)
    assert second.previous_head == first.head == _head(deleted)
    assert second.head == _head(kept, before=first.head)
    assert (first.sequences, second.sequences) == ([1, 2], [3, 4])


def test_entries_that_are_not_settled_are_in_no_chain(path: Path) -> None:
    with Outbox(path) as outbox:
        _append(outbox, 1)
        outbox.append(NAME, [a_snapshot(after=timedelta(days=1))])
        assert [segment.sequences for segment in _content(outbox)] == [[1]]


def test_a_segment_grows_to_a_thousand_events(path: Path) -> None:
    """Then the next one begins. The head is the same however the entries were deleted."""
    with Outbox(path) as outbox:
        entries = []
        for _ in range(4):
            entries += _append(outbox, 400)
            _prune(outbox)
        segments = _content(outbox)
    assert [len(segment.sequences) for segment in segments] == [SEGMENT_EVENTS, 1600 - SEGMENT_EVENTS]
    assert segments[-1].head == _head(entries)


def test_entries_that_are_deleted_together_are_chained_in_the_order_of_their_numbers(path: Path) -> None:
    """In whatever order they were settled: the numbers fill few ranges."""
    with Outbox(path) as outbox:
        accepted = outbox.append(NAME, [a_snapshot(after=timedelta(minutes=n)) for n in range(9)])
        _send(outbox)
        for one in reversed(accepted):
            _settle(outbox, one, Outcome("stored", row_id=1))
        assert _prune(outbox) == 9
        assert [segment.sequences for segment in _content(outbox)] == [list(range(1, 10))]


def test_each_source_has_its_own_chain(path: Path) -> None:
    with Outbox(path) as outbox:
        for name in ("a", "b"):
            _append(outbox, 2, name=name)
        assert _prune(outbox) == 4
        assert [segment.sequences for segment in _content(outbox)] == [[1, 2], [1, 2]]
        assert [segment.previous_head for segment in _content(outbox)] == [CHAIN_START] * 2


def test_an_entry_that_is_sent_again_meanwhile_is_not_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resend may begin after the entries were read and before they are deleted."""
    with Outbox(path) as outbox:
        _append(outbox, 3)

        def resend_first(event_type: str, text: str) -> bytes | None:
            monkeypatch.undo()
            with closing(sqlite3.connect(path)) as other, other:
                other.execute("INSERT INTO retries (position, why, checks) VALUES (2, 'resend', 0)")
                other.execute("DELETE FROM outcomes WHERE position = 2")
            return digest_of_text(event_type, text)

        monkeypatch.setattr("producers.outbox_segments.digest_of_text", resend_first)
        assert _prune(outbox) == 2
        assert [entry.sequence for entry in outbox.entries()] == [2]
        assert [segment.sequences for segment in _content(outbox)] == [[1, 3]]


def test_the_oldest_segments_are_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of an outbox is limited. However many small batches were deleted, segments are counted, not batches."""
    monkeypatch.setattr(outbox_segments, "_MOST_SEGMENTS", 2)
    with Outbox(path) as outbox:
        for name in ("a", "b"):
            for _ in range(4):
                _append(outbox, 300, name=name)
                _prune(outbox)
        assert [len(segment.sequences) for segment in _content(outbox)] == [1000, 200]


def test_entries_of_different_sources_share_one_batch(path: Path) -> None:
    with Outbox(path) as outbox:
        for _ in range(3):
            for name in ("a", "b"):
                _append(outbox, 2, name=name)
            _prune(outbox)
        assert [segment.sequences for segment in _content(outbox)] == [[1, 2, 3, 4, 5, 6]] * 2


def test_nothing_is_deleted_if_the_file_is_replaced_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the new file, the positions that were read belong to other entries."""
    with Outbox(path) as outbox:
        _append(outbox, 2)

        def replace_file(event_type: str, text: str) -> bytes | None:
            monkeypatch.undo()
            path.unlink()
            _append(outbox, 2)
            return digest_of_text(event_type, text)

        monkeypatch.setattr("producers.outbox_segments.digest_of_text", replace_file)
        assert _prune(outbox) == 0
        assert [entry.sequence for entry in outbox.entries()] == [3, 4]


def test_entries_of_an_unknown_kind_are_deleted_without_a_digest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer version of the program may have recorded them. A digest of their text would fit no row."""
    with Outbox(path) as outbox:
        _append(outbox, 2)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE entries SET type = 'trading.trade.v1' WHERE sequence = 1")
        assert [segment.sequences for segment in _content(outbox)] == [[2]]
        assert _prune(outbox) == 2
        assert [segment.sequences for segment in _content(outbox)] == [[2]]
        _append(outbox, 1)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE entries SET type = 'trading.trade.v1'")
        assert _prune(outbox) == 1
        assert [segment.sequences for segment in _content(outbox)] == [[2]]


def test_a_batch_of_large_events_is_read_in_parts(path: Path) -> None:
    """An event may have 8 MiB. One transaction deletes at most 4 MiB of events, but at least one event."""
    with Outbox(path) as outbox:
        for n in range(3):
            large = an_archive(after=timedelta(n), signals=[a_signal(reason="x" * (2 * 2**20 + 1))])
            (one,) = outbox.append(NAME, [large])
            _send(outbox)
            _settle(outbox, one, Outcome("stored", row_id=1))
        whole = _content(outbox)
        assert [_prune(outbox) for _ in range(4)] == [1, 1, 1, 0]
        assert _content(outbox) == whole


def test_the_digests_of_a_removed_file_are_carried_over(path: Path) -> None:
    with Outbox(path) as outbox:
        entries = _append(outbox, 3)
        _prune(outbox)
        before, rows = _content(outbox), _rows(path)
        path.unlink()
        outbox.append(NAME, [a_snapshot(after=timedelta(days=1))])
        assert (_content(outbox), _rows(path)) == (before, rows)
        _append(outbox, 1)
        _prune(outbox)
        assert _content(outbox)[-1].sequences == [1, 2, 3, 5]
    assert before[0].head == _head(entries)


def test_equal_chains_of_two_sources_are_both_carried_over(path: Path) -> None:
    """They have recorded the same events under the same numbers."""
    with Outbox(path) as outbox:
        for name in ("a", "b"):
            (one,) = outbox.append(name, [a_snapshot()])
            _send(outbox)
            _settle(outbox, one, Outcome("stored", row_id=1))
        _prune(outbox)
        before = _content(outbox)
        path.unlink()
        outbox.status()
        assert _content(outbox) == before
    assert before[0] == before[1]


def test_both_chains_stay_if_a_copy_of_the_outbox_replaces_it(path: Path, tmp_path: Path) -> None:
    """Both continue the chain that they share, each with its own events."""
    copy = tmp_path / "copy.db"
    with Outbox(path) as outbox:
        _append(outbox, 1)
        _prune(outbox)
        outbox.close()
        shutil.copy(path, copy)
        with Outbox(copy) as other:
            other.append(NAME, [a_snapshot(after=timedelta(days=9))])
            _append(other, 1)
            _prune(other)
        _append(outbox, 2)
        _prune(outbox)
        copy.replace(path)
        outbox.append(NAME, [a_snapshot(after=timedelta(days=1))])
        assert sorted(segment.sequences for segment in _content(outbox)) == [[1, 2, 3], [1, 3]]


def test_an_outbox_without_room_for_digests_accepts_events(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A removed file had digests that do not fit into the full file that is there now. The log says so."""
    size = 2**20
    with Outbox(path, max_bytes=size) as outbox:
        _append(outbox, 1)
        _prune(outbox)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE segments SET prefixes = ?", (bytes(size // 2),))
        outbox.close()
        shutil.copy(path, tmp_path / "full.db")
        with closing(sqlite3.connect(tmp_path / "full.db", isolation_level=None)) as db:
            db.execute("UPDATE segments SET head = x'00'")
            db.execute("VACUUM")  # otherwise the digests fit into free pages
        with Outbox(path, max_bytes=size) as user:
            user.status()
            (tmp_path / "full.db").replace(path)
            with caplog.at_level(logging.ERROR):
                (accepted,) = user.append(NAME, [a_snapshot(after=timedelta(days=1))])
        assert accepted.sequence == 2
    assert "the digests of deleted events could not be carried over" in caplog.text


def test_digests_that_could_not_be_carried_over_because_of_an_error_are_carried_over_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a full file does without them."""
    with Outbox(path) as outbox:
        _append(outbox, 3)
        _prune(outbox)
        before = _content(outbox)
        path.unlink()

        def fail(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patch:
            patch.setattr("producers.outbox_carry_over.insert_missing", fail)
            with pytest.raises(OutboxError, match="disk I/O error"):
                outbox.status()
        assert _content(outbox) == before


def test_the_digests_of_a_damaged_file_are_salvaged(path: Path) -> None:
    """Except those that are damaged themselves: their checksum does not match."""
    with Outbox(path, repair=True) as outbox:
        for _ in range(3):
            _append(outbox, SEGMENT_EVENTS)
            _prune(outbox)
        before = _content(outbox)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE segments SET ranges = '[[7,1006]]' WHERE id = 2")
            # Records of other tables may have as many columns.
            db.execute("CREATE TABLE other (a, b, c, d, e, f, g, h)")
            db.execute(
                "INSERT INTO other VALUES (1, 'a', 3, 4, 'b', 'c', 7, 8), (1, 2, x'03', x'04', 5, 6, x'07', x'08')"
            )
        outbox.close()
        with path.open("r+b") as file:
            file.write(bytes(100))  # the header of the file
        outbox.append(NAME, [a_snapshot(after=timedelta(days=1))])
        (damaged,) = outbox.quarantine.damaged_files()
        outbox.quarantine.salvage(damaged)
        assert sorted(_content(outbox), key=lambda one: one.sequences) == [before[0], before[2]]
        outbox.quarantine.salvage(outbox.quarantine.salvaged_files()[0])  # nothing is inserted twice
        assert len(_content(outbox)) == 2


@pytest.mark.parametrize(
    ("numbers", "ranges"), [([], ()), ([4, 5, 6, 2], ((4, 6), (2, 2))), ([1, 1, 2], ((1, 1), (1, 2)))]
)
def test_numbers_are_kept_as_ranges_in_their_order(numbers: list[int], ranges: tuple[tuple[int, int], ...]) -> None:
    assert ranges_of(numbers) == ranges
    assert Segment(ranges=ranges).sequences == numbers


def test_the_segments_of_a_chain_do_not_depend_on_batches() -> None:
    events = [SettledEvent(n, n % 7 == 0, bytes([n % 256] * 32)) for n in range(2500)]
    whole = continued(None, events)
    parts: list[Segment] = []
    for n in range(0, 2500, 300):
        changed = continued(parts[-1] if parts else None, events[n : n + 300])
        parts = [*(parts[:-1] if parts and parts[-1].free_places else parts), *changed]
    assert parts == whole
    assert [len(one.sequences) for one in whole] == [1000, 1000, 500]
    assert [one for segment in whole for one in segment.sequences] == [*range(2500)]
    assert continued(whole[-1], []) == []


def test_a_segment_that_was_written_earlier_is_recognized_by_its_checksum() -> None:
    """The checksum is part of the outbox's format."""
    row = ("ab" * 16, b"\0" * 32, b"\1" * 32, "[[1, 2]]", "[2]", bytes.fromhex("3cd31aecea7eef69"), b"\2" * 16)
    assert outbox_segments.segment_row_of((7, *row)) == row
    assert outbox_segments.segment_row_of((7, *row[:-1], b"\3" * 16)) is None
