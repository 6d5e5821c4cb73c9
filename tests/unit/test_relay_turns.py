"""The turn of relaying an outbox, among producers and relay processes, some of which are stopped or dead."""

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
    """Return a function that makes a producer's relay, or with a name that of a relay process."""
    opened: list[Outbox] = []

    def new(name: str | None = None, queue: str = "history") -> Relay:
        opened.append(Outbox(path))
        return Relay(opened[-1], redis, queue, keep_seconds=60, process_name=name)

    yield new
    for outbox in opened:
        outbox.close()


def _relays(relay: Relay, path: Path) -> bool:
    """Return whether the relay's next sweep sends a new event."""
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
        before = outbox.status().pending
        relay.sweep()
        return outbox.status().pending < before


def _name_of_heartbeat(path: Path) -> str | None:
    with Outbox(path) as outbox:
        return outbox.header.read().relay


def _expire_heartbeat(path: Path) -> None:
    """Make the last heartbeat too old to count."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE outbox SET relay_at = relay_at - 11")
        db.commit()


def test_a_producer_leaves_relaying_to_a_relay_process(new: New, path: Path) -> None:
    """It does so in its next sweep, and relays again as soon as the process has ended normally."""
    producer, process = new(), new("one")
    assert _relays(producer, path)
    assert not _relays(process, path)
    assert not process.turn.is_standby  # it has waited for less than a second
    assert not _relays(producer, path)
    assert _relays(process, path)
    process.stop()
    assert _name_of_heartbeat(path) is None
    assert _relays(producer, path)


def test_the_second_of_two_relay_processes_waits(new: New, path: Path) -> None:
    """It takes over at once when the first one is killed, because its lock is free."""
    first, second = new("first"), new("second")
    assert _relays(first, path)
    assert not _relays(second, path)
    assert _name_of_heartbeat(path) == "first"
    first._outbox.close()
    first.turn._lock.release()  # as the kernel does when the process is killed
    assert _relays(second, path)
    assert _name_of_heartbeat(path) == "second"


def test_a_stopped_relay_process_that_keeps_its_lock_is_replaced(
    new: New, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Producers and another relay process relay when its heartbeat is old; when it continues, it releases the lock."""
    stopped, producer, other = new("stopped"), new(), new("other")
    assert _relays(stopped, path)
    assert not _relays(producer, path)
    _expire_heartbeat(path)
    assert _relays(producer, path)
    assert not _relays(other, path)  # a producer may have the lock and not have seen its heartbeat yet
    assert not _relays(producer, path)
    monkeypatch.setattr("producers.relay_turn.RELAY_ALIVE_SECONDS", 0.0)
    assert _relays(other, path)
    assert not _relays(stopped, path)
    assert _name_of_heartbeat(path) == "other"
    assert _relays(other, path)
    assert other.turn.is_exclusive


def test_a_producer_that_takes_over_clears_the_heartbeat_of_a_killed_process(new: New, path: Path) -> None:
    """Otherwise all producers would relay from then on, each without the lock."""
    killed, producer, another = new("killed"), new(), new()
    assert _relays(killed, path)
    killed.turn._lock.release()  # as the kernel does
    assert not _relays(producer, path)
    _expire_heartbeat(path)
    assert _relays(producer, path)
    assert _name_of_heartbeat(path) is None
    assert not _relays(another, path)


def test_a_relay_process_for_another_queue_sends_no_heartbeat(new: New, path: Path) -> None:
    """It stops sending heartbeats when the outbox gets another destination."""
    producer, process = new(), new("one")
    assert _relays(process, path)
    producer._outbox.header.set_destination(producer.turn._destination[0], "evening")
    with pytest.raises(RelayRefused, match="queue evening, and not to .*, queue history"):
        process.sweep()
    assert _name_of_heartbeat(path) is None
    assert _relays(new(queue="evening"), path)


def test_an_entry_stored_while_a_relay_was_stopped_stays_stored(path: Path) -> None:
    """The relay continues and marks its entry as sent, which must not change the state."""
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
        (entry,) = outbox.deliveries.pending(10)
        with closing(sqlite3.connect(path)) as db:
            db.execute("INSERT INTO outcomes VALUES (1, 0, 1, NULL)")
            db.commit()
        outbox.deliveries.mark_sent({entry.position: 5.0})
        assert (outbox.status().stored, outbox.status().sent) == (1, 0)


def test_only_a_relay_process_that_has_the_turn_sends_heartbeats(new: New, path: Path) -> None:
    """Otherwise producers would leave relaying to a process that does not relay."""
    producer, process = new(), new("one")
    for relay in (producer, process):
        relay.turn.heartbeat()
    assert _relays(producer, path)
    producer.turn.heartbeat()
    assert _name_of_heartbeat(path) is None
    producer.stop()
    assert _relays(process, path)
    _expire_heartbeat(path)
    process.turn._heartbeat_at = 0.0  # it is due
    process.turn.heartbeat()
    assert process._outbox.header.relay_is_alive()


def test_a_producers_relay_names_the_destination_of_a_new_file(new: New, redis: fakeredis.FakeRedis) -> None:
    """A relay process does not: it may be configured for another queue."""
    process = new("one")
    process.sweep()
    assert process._outbox.header.read().queue is None
    process.stop()
    producer = new(queue="evening")
    producer.sweep()
    header = producer._outbox.header.read()
    host = redis.get_connection_kwargs()["host"]  # each test has its own
    assert (header.redis, header.queue) == (f"database 0 on {host}, port 6379", "evening")
