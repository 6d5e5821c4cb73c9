"""Growth of an outbox: how it is measured, and when nothing can be said."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from consumers.ops.outbox_capacity import GROWTH_SECONDS, outbox_capacity
from producers import outbox_counts
from producers.entries import OutboxGrowth
from producers.outbox import MAX_BYTES, Outbox
from tests.factories import a_signal, a_snapshot, an_archive
from tests.relaying import make_older

_MIB = 2**20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    with Outbox(path) as opened:
        yield opened


def _record(outbox: Outbox, count: int) -> None:
    """Record snapshots and mark them as sent."""
    outbox.append("bot", [a_snapshot() for _ in range(count)])
    outbox.deliveries.mark_sent({entry.position: 1000.0 for entry in outbox.deliveries.pending(count)})


def _execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)


def _settle(path: Path, first: int, last: int, seconds_ago: float) -> None:
    """Mark entries as stored some seconds before the newest entry was recorded."""
    _execute(
        path,
        f"INSERT INTO outcomes SELECT position, (SELECT max(recorded_at) FROM entries) - {seconds_ago}, 1, NULL"
        f" FROM entries WHERE position BETWEEN {first} AND {last}",
    )  # fmt: skip


def _grown(outbox: Outbox) -> tuple[int, int] | None:
    growth = outbox.growth(GROWTH_SECONDS)
    return None if growth is None else (growth.entries, growth.kept)


def test_empty_outbox_does_not_grow(outbox: Outbox) -> None:
    assert outbox.growth(GROWTH_SECONDS) == OutboxGrowth(0, 0, GROWTH_SECONDS)


def test_growth_is_recorded_minus_settled_of_the_last_minutes(outbox: Outbox, path: Path) -> None:
    """Older entries do not count. While a backlog is worked off, it is negative."""
    _record(outbox, 10)
    make_older(path, 1000)
    _record(outbox, 7)
    assert _grown(outbox) == (7, 17)
    _settle(path, 1, 3, 900)
    assert _grown(outbox) == (7, 17)
    _settle(path, 4, 9, 1)
    assert _grown(outbox) == (1, 17)
    _settle(path, 10, 12, 1)
    assert _grown(outbox) == (-2, 17)


def test_growth_is_not_known_if_recently_settled_entries_may_have_been_deleted(outbox: Outbox, path: Path) -> None:
    """Otherwise a backlog that is worked off would look as if it grew."""
    _record(outbox, 10)
    _settle(path, 1, 5, 1)
    assert _grown(outbox) == (5, 10)
    _execute(path, "DELETE FROM entries WHERE position <= 2", "DELETE FROM outcomes WHERE position <= 2")
    assert _grown(outbox) is None
    _execute(path, "UPDATE outcomes SET settled_at = settled_at - 1000 WHERE position = 3")
    assert _grown(outbox) == (8 - 2, 8)
    _execute(path, "UPDATE outcomes SET row_id = NULL, reason = 'no'")
    assert _grown(outbox) == (8 - 2, 8)
    _execute(path, "DELETE FROM outcomes")
    assert _grown(outbox) is None


def test_growth_excludes_the_start_of_its_period_and_includes_the_end(outbox: Outbox, path: Path) -> None:
    """Entries are deleted in the order in which they were settled."""
    _record(outbox, 4)
    _execute(path, "UPDATE entries SET recorded_at = 1000.0 + position")
    _settle(path, 1, 2, 3.0)  # at 1001
    _execute(path, "DELETE FROM entries WHERE position = 1", "DELETE FROM outcomes WHERE position = 1")
    with outbox._file.snapshot() as db:
        growth = outbox_counts.growth(db, 1004.0, 3.0)
    assert growth is not None
    assert (growth.entries, growth.kept, growth.seconds) == (3, 3, 3.0)


def test_the_growth_of_one_entry_counts_from_this_entry(outbox: Outbox, path: Path) -> None:
    _record(outbox, 1)
    make_older(path, 20)
    growth = outbox.growth(GROWTH_SECONDS)
    assert growth is not None
    assert 20 <= growth.seconds < 50


def test_entries_of_a_clock_that_was_ahead_are_not_counted(outbox: Outbox, path: Path) -> None:
    _record(outbox, 3)
    make_older(path, -86400)
    _record(outbox, 2)
    assert _grown(outbox) == (2, 5)


def test_many_entries_are_measured_over_a_shorter_time(
    outbox: Outbox, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no call reads more than 20,000 of them."""
    monkeypatch.setattr(outbox_counts, "PAGE_ENTRIES", 5)
    monkeypatch.setattr(outbox_counts, "MOST_PAGES", 2)
    _record(outbox, 20)
    make_older(path, 100)
    _record(outbox, 10)
    make_older(path, 10)
    growth = outbox.growth(GROWTH_SECONDS)
    assert growth is not None
    assert growth.entries == 10
    assert 10 <= growth.seconds < 40


def test_the_growth_of_a_new_outbox_counts_from_its_first_entry(outbox: Outbox, path: Path) -> None:
    """Otherwise a fast start would count as slow for five minutes."""
    _record(outbox, 10)
    make_older(path, 20)
    _record(outbox, 10)
    growth = outbox.growth(GROWTH_SECONDS)
    assert growth is not None
    assert (growth.entries, growth.kept) == (20, 20)
    assert 20 <= growth.seconds < 50


def test_newest_events_that_are_larger_fill_the_outbox_sooner(outbox: Outbox, path: Path) -> None:
    _record(outbox, 1000)
    make_older(path, 1000)
    outbox.append("bot", [an_archive(signals=[a_signal(reason="x" * 100_000)]) for _ in range(100)])
    growth = outbox.growth(GROWTH_SECONDS)
    assert growth is not None
    capacity = outbox_capacity(outbox.used_bytes(), growth, MAX_BYTES)
    assert capacity.growth_bytes_per_second == pytest.approx(100 * 100_000 / GROWTH_SECONDS, rel=0.1)


def test_the_size_of_an_event_is_the_mean_of_the_newest_hundred(outbox: Outbox) -> None:
    """In bytes: a character may have several."""
    outbox.append("bot", [an_archive(signals=[a_signal(reason="é" * n)]) for n in range(5000, 0, -50)] * 2)
    outbox.append("bot", [an_archive(signals=[a_signal(reason="é" * n)]) for n in range(101)])
    growth = outbox.growth(GROWTH_SECONDS)
    assert growth is not None
    sizes = [len(entry.event.encode()) for entry in outbox.entries()]
    assert growth.event_bytes == pytest.approx(sum(sizes[-100:]) / 100)


@pytest.mark.parametrize("at", [700.0, 1000.0])
def test_an_entry_that_was_settled_when_it_was_recorded_is_no_growth(outbox: Outbox, path: Path, at: float) -> None:
    """At the first and at the last moment of the measured time too."""
    _record(outbox, 1)
    _settle(path, 1, 1, 0)
    _execute(path, f"UPDATE entries SET recorded_at = {at}", f"UPDATE outcomes SET settled_at = {at}")
    with outbox._file.reading() as db:
        growth = outbox_counts.growth(db, 1000.0, 300.0)
    assert growth is not None
    assert growth.entries == 0


_FULL = 10 * _MIB / 1000  # bytes of an entry, see below


@pytest.mark.parametrize(
    ("used", "entries", "free", "growth", "full"),
    [
        (10 * _MIB, 300, 10 * MAX_BYTES, _FULL, (MAX_BYTES - 10 * _MIB) / _FULL),
        (10 * _MIB, 300, 5 * _MIB, _FULL, 5 * _MIB / _FULL),  # the disk is full first
        (10 * _MIB, 0, MAX_BYTES, 0.0, None),
        (10 * _MIB, -300, MAX_BYTES, -_FULL, None),
        (MAX_BYTES + 1, 300, MAX_BYTES, (MAX_BYTES + 1) / 1000, 0.0),
        (_MIB - 1, 300, MAX_BYTES, None, None),  # too small for an estimate
    ],
)
def test_time_until_full_follows_from_growth_and_room(
    used: int, entries: int, free: int, growth: float | None, full: float | None
) -> None:
    """A thousand entries, which have grown in 300 s."""
    capacity = outbox_capacity(used, OutboxGrowth(entries, 1000, 300.0), free)
    assert capacity.used_bytes == used
    assert (capacity.growth_bytes_per_second, capacity.full_in_seconds) == (_near(growth), _near(full))


def _near(number: float | None) -> Any:
    return None if number is None else pytest.approx(number)


def test_unknown_growth_gives_no_time() -> None:
    capacity = outbox_capacity(10 * _MIB, None, MAX_BYTES)
    assert (capacity.growth_bytes_per_second, capacity.full_in_seconds) == (None, None)
