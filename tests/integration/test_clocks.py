"""The wall clock jumps by days, either way: within a run of a bot, between two, and over a restart of the machine."""

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
    """This one, to this process."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._right = time.time

    def set_clock(self, ahead: float) -> None:
        """The wall clock is so many seconds ahead of the right time; the machine goes on running."""
        self._patch.setattr(time, "time", lambda: self._right() + ahead)

    def restart(self) -> None:
        """Another run of the machine begins, to outboxes that are opened from now on."""
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
    """Recorded while the clock is days off, before time is synchronised; then it is set right. No reader alarms."""
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
            assert 0 <= _unsettled_seconds(bot) < DAY + 60  # it may have been off for a day, and longer is not believed
        else:
            assert 0 <= _unsettled_seconds(bot) < 60
            assert doctored(bot.path, "outbox")[0] == "ok"
        with worker_process(tmp_path):
            until(lambda: bot.producer.status().depth == 0, _SOON_SECONDS)
        assert_sound(bot.account(), outboxes=[bot.path])


@pytest.mark.parametrize("to", [2 * DAYS, -2 * DAYS])
def test_the_clock_jumps_while_entries_are_under_way(
    redis: Redis, line: Line, tmp_path: Path, machine: Machine, to: float
) -> None:
    """Redis has lost them: they are sent again when they would have been. What is kept stays kept."""
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
