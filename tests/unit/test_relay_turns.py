"""Whose turn it is to relay an outbox: of producers, and of relay processes, some of which are stopped or dead."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import fakeredis
import pytest

from producers.errors import RelayRefused
from producers.outbox import Outbox
from producers.relay import Relay
from tests.factories import a_snapshot

New = Callable[..., Relay]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def new(redis: fakeredis.FakeRedis, path: Path) -> Iterator[New]:
    """A relay with a connection of its own: of a producer, or with a name of a relay process."""
    opened: list[Outbox] = []

    def new(name: str | None = None, queue: str = "history") -> Relay:
        opened.append(Outbox(path))
        return Relay(opened[-1], redis, queue, keep_seconds=60, process_name=name)

    yield new
    for outbox in opened:
        outbox.close()


def _relays(relay: Relay, path: Path) -> bool:
    """Whether a new event is sent by its next sweep."""
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
        before = outbox.status().pending
        relay.sweep()
        return outbox.status().pending < before


def _announced(path: Path) -> str | None:
    with Outbox(path) as outbox:
        return outbox.header.read().relay


def _pass_heartbeat(path: Path) -> None:
    """Nobody has had a heartbeat for so long that it counts as gone."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE outbox SET relay_at = relay_at - 11")
        db.commit()


def test_a_producer_makes_room_for_a_relay_process(new: New, path: Path) -> None:
    """In its next sweep; it relays again as soon as the process has ended in order."""
    producer, process = new(), new("one")
    assert _relays(producer, path)
    assert not _relays(process, path)
    assert not process.turn.is_standby  # so soon nobody can know
    assert not _relays(producer, path)
    assert _relays(process, path)
    process.stop()
    assert _announced(path) is None
    assert _relays(producer, path)


def test_of_two_processes_the_second_waits_without_a_word(new: New, path: Path) -> None:
    """And takes over at once when the first is gone, whose lock is free."""
    first, second = new("first"), new("second")
    assert _relays(first, path)
    assert not _relays(second, path)
    assert _announced(path) == "first"
    first._outbox.close()
    first.turn._lock.release()  # as the kernel does when it is killed
    assert _relays(second, path)
    assert _announced(path) == "second"


def test_a_stopped_process_that_keeps_its_lock_is_overruled_and_stands_back(
    new: New, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process as by producers, once its heartbeat is old; then the other one gets the lock."""
    stopped, producer, other = new("stopped"), new(), new("other")
    assert _relays(stopped, path)
    assert not _relays(producer, path)
    _pass_heartbeat(path)
    assert _relays(producer, path)
    assert not _relays(other, path)  # a producer may have the lock, which has not seen its announcement yet
    assert not _relays(producer, path)
    monkeypatch.setattr("producers.relay_turn.RELAY_ALIVE_SECONDS", 0.0)
    assert _relays(other, path)
    assert not _relays(stopped, path)
    assert _announced(path) == "other"
    assert _relays(other, path)
    assert other.turn.is_exclusive


def test_a_process_that_was_killed_is_forgotten_by_the_producer_that_takes_over(new: New, path: Path) -> None:
    """Or all producers would relay from then on, each without the lock."""
    killed, producer, another = new("killed"), new(), new()
    assert _relays(killed, path)
    killed.turn._lock.release()  # by the kernel
    assert not _relays(producer, path)
    _pass_heartbeat(path)
    assert _relays(producer, path)
    assert _announced(path) is None
    assert not _relays(another, path)


def test_a_process_for_another_queue_is_refused_and_is_in_nobodys_way(new: New, path: Path) -> None:
    """It announces nothing, and no longer when the outbox gets another destination under it."""
    producer, process = new(), new("one")
    assert _relays(process, path)
    producer._outbox.header.set_destination(producer.turn._destination[0], "evening")
    with pytest.raises(RelayRefused, match="queue evening, and not to .*, queue history"):
        process.sweep()
    assert _announced(path) is None
    assert _relays(new(queue="evening"), path)


def test_an_entry_stored_while_a_relay_was_stopped_stays_stored(path: Path) -> None:
    """It goes on with what it had in hand, and marks it as sent."""
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
        (entry,) = outbox.deliveries.pending(10)
        with closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE entries SET state = 'stored', row_id = 1")
            db.commit()
        outbox.deliveries.mark_sent({entry.position: 5.0})
        assert (outbox.status().stored, outbox.status().sent) == (1, 0)
