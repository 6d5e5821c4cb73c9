"""The wall clock jumps by days in either direction: while a bot runs, between two runs, and over a machine restart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from redis import Redis

from consumers.ops.outbox_health import outbox_of_settings
from producers import outbox_clock
from tests.controllers import Controller, Line, assert_sound, doctored, some_events, worker_process
from tests.rq_programs import until

pytestmark = pytest.mark.usefixtures("database_url")

DAY = DAYS = 24 * 3600.0
_SOON_SECONDS = 20.0  # the first check of an entry that was sent comes after 5 s


class Machine:
    """Clocks of this machine, as this process reads them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._right = time.time

    def set_clock(self, ahead: float) -> None:
        """Set the wall clock `ahead` seconds ahead of the right time; the machine continues to run."""
        self._patch.setattr(time, "time", lambda: self._right() + ahead)

    def restart(self) -> None:
        """Simulate a restart of the machine for outboxes that are opened from now on."""
        began = time.monotonic()
        self._patch.setattr(outbox_clock, "boot_id", lambda: "another")
        self._patch.setattr(outbox_clock, "running_seconds", lambda: time.monotonic() - began)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def _unsettled_seconds(bot: Controller) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTORY_OUTBOX", str(bot.path))
        health = outbox_of_settings()
    assert health is not None
    return health.oldest_unacknowledged_seconds or 0.0


@pytest.mark.parametrize("then", ["at once", "after a restart of the bot", "after a restart of the machine"])
@pytest.mark.parametrize("ahead", [2 * DAYS, -2 * DAYS])
@pytest.mark.usefixtures("line")
def test_jobs_that_redis_loses_are_sent_again_within_seconds(
    redis: Redis, tmp_path: Path, machine: Machine, ahead: float, then: str
) -> None:
    """They are recorded while the clock is wrong by days; then it is corrected. No check reports old entries."""
    machine.set_clock(ahead)
    with Controller(tmp_path / "bot" / "outbox.db") as bot:
        bot.record(*some_events(81, 0, 3))
        assert bot.producer.flush(10) == 0
        if then != "at once":
            bot.stop()
        redis.flushall()
        machine.set_clock(0)
        if then == "after a restart of the machine":
            machine.restart()
        if then != "at once":
            bot.restart()
        if ahead < 0 and then == "after a restart of the machine":
            assert 0 <= _unsettled_seconds(bot) < DAY + 60  # the clock trusts at most one day without power
        else:
            assert 0 <= _unsettled_seconds(bot) < 60
            assert doctored(bot.path, "outbox")[0] == "ok"
        with worker_process(tmp_path):
            until(lambda: bot.producer.status().depth == 0, _SOON_SECONDS)
        assert_sound(bot.account(), outboxes=[bot.path])


@pytest.mark.parametrize("to", [2 * DAYS, -2 * DAYS])
def test_sent_entries_are_delivered_although_the_clock_jumps(
    redis: Redis, line: Line, tmp_path: Path, machine: Machine, to: float
) -> None:
    """Redis lost their jobs: they are sent again after the usual interval. Stored entries are kept."""
    with Controller(tmp_path / "bot" / "outbox.db") as bot:
        bot.record(*some_events(81, 0, 3))
        with worker_process(tmp_path):
            until(lambda: bot.producer.status().depth == 0)
        bot.record(*some_events(81, 10, 3))
        assert bot.producer.flush(10) == 0
        redis.flushall()
        machine.set_clock(to)
        assert 0 <= _unsettled_seconds(bot) < 60
        assert doctored(bot.path, "outbox")[0] == "ok"
        with worker_process(tmp_path):
            until(lambda: bot.producer.status().depth == 0, _SOON_SECONDS)
        assert bot.producer.status().stored == 8
        assert_sound(bot.account(), outboxes=[bot.path])
