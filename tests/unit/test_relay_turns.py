"""The turn of relaying an outbox, among producers and relay processes, some of which are stopped or dead."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import fakeredis
import pytest

from producers.errors import RelayRefused
from producers.outbox import Outbox
from producers.outbox_place import LOCK
from producers.relay import Relay
from tests.factories import a_snapshot
from tests.unit.conftest import queue_of

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of the relays' clock, which the test sets."""
    seconds = [1000.0]
    monkeypatch.setattr("producers.relay_turn.time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def test_a_relay_process_sends_a_heartbeat_every_two_seconds(new: New, path: Path, clock: list[float]) -> None:
    """More often would only write to the outbox."""
    process = new("one")
    assert _relays(process, path)
    for begin in (1000.0, 1002.0):
        for moment, is_due in ((begin + 0.1, False), (begin + 1.9, False), (begin + 2.0, True)):
            _expire_heartbeat(path)
            clock[0] = moment
            process.turn.heartbeat()
            assert process._outbox.header.relay_is_alive() == is_due


def test_a_relay_process_is_standby_when_another_one_has_had_the_turn_for_a_second(
    new: New, path: Path, clock: list[float]
) -> None:
    """It logs that, and again when it has the turn itself."""
    first, second = new("first"), new("second")
    assert not second.turn.is_standby
    assert _relays(first, path)
    for moment, is_standby in ((1000.0, False), (1000.9, False), (1001.0, True), (1005.0, True)):
        clock[0] = moment
        assert not second.sweep()
        assert second.turn.is_standby == is_standby
    first.stop()
    assert _relays(second, path)
    assert not second.turn.is_standby


def test_a_relay_without_the_lock_begins_its_turn_anew_when_it_gets_the_lock(new: New, path: Path) -> None:
    """The stopped relay process may have continued meanwhile."""
    stopped, producer = new("stopped"), new()
    assert _relays(stopped, path)
    _expire_heartbeat(path)
    assert _relays(producer, path)
    assert (producer.turn.started, producer.turn.is_exclusive) == (True, False)
    with Outbox(path) as outbox:
        token = outbox.header.read().token
        stopped.turn._lock.release()  # as the kernel does when the process is killed
        assert _relays(producer, path)
        assert producer.turn.is_exclusive
        assert outbox.header.read().token != token


def test_a_turn_begins_anew_if_a_backup_is_put_at_the_path(
    new: New, path: Path, tmp_path: Path, redis: fakeredis.FakeRedis
) -> None:
    """Redis has jobs of entries that are pending there: they are not enqueued again."""
    relay = new()
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
    with closing(sqlite3.connect(path)) as db, closing(sqlite3.connect(tmp_path / "backup")) as backup:
        db.backup(backup)
    relay.sweep()
    token = relay._outbox.header.read().token
    (tmp_path / "backup").replace(path)
    tokens = []
    for _ in range(3):
        relay.sweep()
        tokens.append(relay._outbox.header.read().token)
    assert tokens == [tokens[0]] * 3 != [token] * 3  # it begins once, not at each sweep
    assert (queue_of(redis).count, relay._outbox.status().sent) == (1, 1)


def test_a_relay_process_that_reaches_redis_again_relays_for_another_ten_seconds(
    new: New, path: Path, clock: list[float]
) -> None:
    """It ends its turn only if it fails for that long again."""
    process = new("one")
    assert _relays(process, path)
    process.turn.failing_since = clock[0]
    clock[0] += 11
    assert _relays(process, path)
    assert process.turn.failing_since is None


def test_a_relay_that_has_lost_its_turn_begins_the_next_one_anew(new: New, path: Path) -> None:
    """It checks the file and replaces the token: another relay may have relayed a copy meanwhile."""
    one, other = new(), new()
    assert not one.turn.started
    assert _relays(one, path)
    assert one.turn.started
    path.with_name(f"{path.name}{LOCK}").unlink()  # the lock is lost with its file
    assert _relays(other, path)
    assert not _relays(one, path)
    assert not one.turn.started
    other.stop()
    assert not other.turn.started
    with Outbox(path) as outbox:
        token = outbox.header.read().token
        assert _relays(one, path)
        assert outbox.header.read().token != token


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
