"""The outbox's clock: setting the wall clock by days, in either direction, changes no age and no check."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import fakeredis
import pytest

from producers import outbox_clock
from producers.acknowledgements import Acknowledgement, Outcome
from producers.entries import Accepted
from producers.outbox import Outbox
from producers.outbox_deliveries import LAST_CHECK_SECONDS
from producers.relay import Relay
from tests.factories import a_snapshot
from tests.unit.conftest import queue_of

NAME = "trading-controller"
HOUR, DAY = 3600.0, 86400.0
_jumps = pytest.mark.parametrize("jump", [-40 * 365 * DAY, -2 * DAY, 0.0, 2 * DAY, 400 * DAY])


class Machine:
    """Machine with a wall clock, running seconds and a boot id."""

    def __init__(self) -> None:
        self.wall = 1_800_000_000.0
        self.running = 5000.0
        self.boot = "boot 1"

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.running += seconds

    def set_clock(self, by: float) -> None:
        self.wall += by

    def restart(self, after: float = 60.0) -> None:
        """Restart after `after` seconds without power."""
        self.wall += after
        self.running = 10.0
        self.boot = f"boot {int(self.boot.split()[1]) + 1}"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(time, "time", lambda: machine.wall)
    monkeypatch.setattr(outbox_clock, "running_seconds", lambda: machine.running)
    monkeypatch.setattr(outbox_clock, "boot_id", lambda: machine.boot)
    monkeypatch.setattr(outbox_clock, "_KEEP_SECONDS", 0.0)  # measured in real seconds, which hardly pass in a test
    return machine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def _append(outbox: Outbox, count: int = 1) -> list[Accepted]:
    return outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(count)])


def _settle(outbox: Outbox, one: Accepted) -> None:
    found = Acknowledgement(one.source_id, one.sequence, one.nonce, None, Outcome("stored", row_id=1), at=0)
    assert outbox.deliveries.settle(one.source_id, 0, {"key": found}).changed == ["key"]


def _again(outbox: Outbox, path: Path, *, is_new_run: bool) -> Outbox:
    if not is_new_run:
        return outbox
    outbox.close()
    return Outbox(path, repair=True)


_runs = pytest.mark.parametrize("is_new_run", [False, True], ids=["within a run", "between runs"])


@_jumps
@_runs
def test_an_entry_is_overdue_when_its_interval_has_passed(
    path: Path, machine: Machine, jump: float, is_new_run: bool
) -> None:
    """It is overdue neither earlier nor days later."""
    outbox = Outbox(path, repair=True)
    _append(outbox)
    outbox.deliveries.mark_sent({outbox.deliveries.pending(1)[0].position: 100.0})
    machine.wait(50)
    machine.set_clock(jump)
    outbox = _again(outbox, path, is_new_run=is_new_run)
    machine.wait(49)
    assert outbox.deliveries.overdue(1) == []
    machine.wait(2)
    assert len(outbox.deliveries.overdue(1)) == 1


def test_a_check_is_due_at_its_time_and_if_it_is_later_than_any_interval_ends(path: Path, machine: Machine) -> None:
    """The longest interval is five minutes, and its random part may add a fifth."""
    with Outbox(path) as outbox:
        _append(outbox)
        outbox.deliveries.mark_sent({outbox.deliveries.pending(1)[0].position: 360.0})
        assert outbox.deliveries.overdue(1) == []
        machine.wait(360)
        assert len(outbox.deliveries.overdue(1)) == 1
        outbox.deliveries.postpone({1: 360.0})
        assert outbox.deliveries.overdue(1) == []
        outbox.deliveries.postpone({1: 361.0})
        assert len(outbox.deliveries.overdue(1)) == 1


def test_the_clock_of_a_new_file_continues_when_it_is_opened_again(path: Path, machine: Machine) -> None:
    """It begins with the wall clock. Nothing was recorded before the file was opened again."""
    Outbox(path).close()
    with closing(sqlite3.connect(path)) as db:
        first = db.execute("SELECT clock_shown, clock_boot, clock_running, clock_wall FROM outbox").fetchone()
    assert first == (machine.wall, machine.boot, machine.running, machine.wall)
    machine.wait(50)
    outbox = Outbox(path)
    _append(outbox)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT recorded_at FROM entries").fetchall() == [(machine.wall,)]


@_jumps
@_runs
def test_ages_are_the_seconds_that_have_passed(path: Path, machine: Machine, jump: float, is_new_run: bool) -> None:
    """They are never negative, and never days too long."""
    outbox = Outbox(path, repair=True)
    assert (outbox.status().oldest_unsettled_seconds, outbox.oldest_pending_seconds()) == (None, None)
    _append(outbox)
    machine.wait(20)
    machine.set_clock(jump)
    outbox = _again(outbox, path, is_new_run=is_new_run)
    machine.wait(10)

    assert outbox.status().oldest_unsettled_seconds == pytest.approx(30)
    assert outbox.oldest_pending_seconds() == pytest.approx(30)
    outbox.deliveries.mark_sent({outbox.deliveries.pending(1)[0].position: 100.0})
    assert [age for _, age in outbox.deliveries.sent(0, 5)] == [pytest.approx(30)]
    _append(outbox)
    outbox.deliveries.mark_sent({outbox.deliveries.pending(1)[0].position: 100.0})
    assert [age for _, age in outbox.deliveries.sent(1, 5)] == [0.0]


@_jumps
@_runs
def test_settled_entries_are_kept_for_the_set_time(path: Path, machine: Machine, jump: float, is_new_run: bool) -> None:
    """Otherwise a clock that was set ahead would delete entries that a restored database still needs."""
    outbox = Outbox(path, repair=True)
    (accepted,) = _append(outbox)
    _settle(outbox, accepted)
    machine.wait(DAY)
    machine.set_clock(jump)
    outbox = _again(outbox, path, is_new_run=is_new_run)
    machine.wait(6 * DAY)
    assert outbox.deliveries.prune(keep_seconds=7 * DAY) == 0
    machine.wait(1)
    assert outbox.deliveries.prune(keep_seconds=7 * DAY) == 1


@_jumps
@_runs
def test_a_resend_sends_the_events_recorded_since_the_given_time(
    path: Path, machine: Machine, jump: float, is_new_run: bool
) -> None:
    """The time is given by the present wall clock."""
    outbox = Outbox(path, repair=True)
    for _ in range(3):
        _settle(outbox, _append(outbox)[0])
        machine.wait(HOUR)
    machine.set_clock(jump)
    outbox = _again(outbox, path, is_new_run=is_new_run)

    assert outbox.resend(machine.wall - 2 * HOUR) == 2
    assert [entry.sequence for entry in outbox.deliveries.pending(5)] == [2, 3]
    assert outbox.status().stored == 1


@_jumps
def test_a_heartbeat_of_a_relay_process_is_valid_for_ten_seconds(path: Path, machine: Machine, jump: float) -> None:
    """It is valid for this process and for one that opens the outbox later."""
    relaying, producing = Outbox(path, repair=True), Outbox(path, repair=True)
    assert not producing.header.relay_is_alive()
    relaying.header.heartbeat("relay")
    machine.set_clock(jump)
    machine.wait(9)
    later = Outbox(path, repair=True)
    assert [one.header.relay_is_alive() for one in (relaying, producing, later)] == [True] * 3
    machine.wait(1)
    assert [one.header.relay_is_alive() for one in (relaying, producing, later)] == [True] * 3
    machine.wait(1)
    assert [one.header.relay_is_alive() for one in (relaying, producing, later)] == [False] * 3
    relaying.header.heartbeat("relay")
    assert later.header.relay_is_alive()
    relaying.header.clear_heartbeat("relay")
    assert not later.header.relay_is_alive()


@_jumps
def test_jobs_that_redis_lost_are_sent_again_after_their_interval(
    path: Path, machine: Machine, redis: fakeredis.FakeRedis, jump: float
) -> None:
    """They were recorded while the clock was wrong, and the clock is corrected afterwards."""
    outbox = Outbox(path, repair=True)
    relay = Relay(outbox, redis, "history", keep_seconds=7 * DAY)
    _append(outbox)
    relay.sweep()
    redis.flushall()
    machine.set_clock(jump)
    relay.sweep()
    assert queue_of(redis).count == 0
    machine.wait(6)
    relay.sweep()
    assert queue_of(redis).count == 1
    relay.stop()


@_jumps
def test_no_check_is_later_than_its_interval_after_a_restart_of_the_machine(
    path: Path, machine: Machine, jump: float
) -> None:
    """Only the wall clock measures the time without power, and it may be wrong."""
    outbox = Outbox(path, repair=True)
    _append(outbox, 2)
    for check_after in (5.0, 1.1 * LAST_CHECK_SECONDS):
        (entry,) = outbox.deliveries.pending(1)
        outbox.deliveries.mark_sent({entry.position: check_after})
    outbox.close()
    machine.restart()
    machine.set_clock(jump)
    outbox = Outbox(path, repair=True)
    machine.wait(5)
    assert 1 in [entry.sequence for entry in outbox.deliveries.overdue(5)]
    machine.wait(1.1 * LAST_CHECK_SECONDS)
    assert len(outbox.deliveries.overdue(5)) == 2


@pytest.mark.parametrize(
    ("jump", "passed"), [(-DAY, 0.0), (0.0, HOUR), (400 * DAY, DAY)], ids=["behind", "right", "far ahead"]
)
def test_the_wall_clock_is_trusted_over_a_restart_forward_and_for_at_most_a_day(
    path: Path, machine: Machine, jump: float, passed: float
) -> None:
    """A machine without a clock battery, or with a wrong clock, must not delete entries early."""
    outbox = Outbox(path, repair=True)
    (accepted,) = _append(outbox)
    _settle(outbox, accepted)
    _append(outbox)
    outbox.close()
    machine.restart(after=HOUR)
    machine.set_clock(jump)
    outbox = Outbox(path, repair=True)

    assert outbox.status().oldest_unsettled_seconds == pytest.approx(passed)
    assert outbox.deliveries.prune(keep_seconds=passed + 1) == 0
    machine.wait(5)
    assert outbox.status().oldest_unsettled_seconds == pytest.approx(passed + 5)


def test_processes_that_open_an_outbox_after_a_restart_agree_on_the_time(path: Path, machine: Machine) -> None:
    """The network sets the clock after the first process has started."""
    outbox = Outbox(path, repair=True)
    outbox.close()
    machine.restart()
    relaying = Outbox(path, repair=True)
    machine.set_clock(2 * HOUR)
    producing = Outbox(path, repair=True)
    relaying.header.heartbeat("relay")
    assert producing.header.relay_is_alive()
    machine.wait(9)
    assert (producing.header.relay_is_alive(), relaying.header.relay_is_alive()) == (True, True)
    machine.wait(2)
    assert (producing.header.relay_is_alive(), relaying.header.relay_is_alive()) == (False, False)


def test_the_clock_of_a_file_that_replaced_another_one_is_used(path: Path, machine: Machine) -> None:
    """Another outbox, made while the clock was wrong, replaces the one that is open."""
    outbox = Outbox(path, repair=True)
    _append(outbox)
    machine.set_clock(-2 * DAY)
    with Outbox(path.with_name("other.db"), repair=True) as other:
        _append(other)
    machine.set_clock(2 * DAY)
    path.with_name("other.db").replace(path)
    outbox.header.heartbeat("relay")
    machine.wait(3)

    assert Outbox(path, repair=True).header.relay_is_alive()
    assert outbox.header.relay_is_alive()


def test_the_clock_counts_the_time_of_a_suspended_machine(path: Path, machine: Machine) -> None:
    """The running seconds include suspended time."""
    outbox = Outbox(path, repair=True)
    _append(outbox)
    machine.wait(8 * HOUR)
    assert outbox.status().oldest_unsettled_seconds == pytest.approx(8 * HOUR)


def test_a_reading_is_kept_every_minute_and_not_with_every_write(
    path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While entries are written, a restart loses at most one minute of the clock."""
    monkeypatch.setattr(outbox_clock, "_KEEP_SECONDS", 60.0)
    monotonic = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: monotonic)
    outbox = Outbox(path, repair=True)
    kept = []
    for seconds in (0.0, 30.0, 31.0):
        monotonic += seconds
        machine.wait(seconds)
        _append(outbox)
        with outbox._file.reading() as db:
            kept.append(db.execute("SELECT clock_running FROM outbox").fetchone()[0])
    assert kept == [5000.0, 5000.0, 5061.0]


def test_each_process_has_its_own_boot_id_if_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a process, setting the wall clock has no effect."""

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    boots: list[Callable[[], str]] = [outbox_clock.boot_id.__wrapped__ for _ in range(2)]
    first, second = (boot() for boot in boots)
    assert first.startswith("process ")
    assert first != second


def test_the_real_boot_id_and_running_seconds_are_usable() -> None:
    """The boot id is constant, and the running seconds grow."""
    assert len(outbox_clock.boot_id()) > 10
    assert outbox_clock.boot_id() == outbox_clock.boot_id()
    before = outbox_clock.running_seconds()
    assert 0 < before <= outbox_clock.running_seconds()
