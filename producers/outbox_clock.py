"""The outbox's own clock, which does not jump when the wall clock is set.

It adds the seconds that the machine has run to the time at which the outbox was made. Only the wall clock measures how
long the machine was off: it is trusted for at most one day, and only forward.
"""

from __future__ import annotations

import math
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_LONGEST_STOP_SECONDS = 86400.0
_KEEP_SECONDS = 60.0  # interval between two kept readings; the clock continues from the last one after a restart
# On Linux and Android, CLOCK_BOOTTIME includes suspended time. Other systems lack it.
_RUNNING_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@cache
def boot_id() -> str:
    """Return an id that all processes share until the machine restarts; an id of this process if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"process {secrets.token_hex(8)}"


def running_seconds() -> float:
    """Return the seconds since the machine was started; setting the wall clock does not change them."""
    return time.clock_gettime(_RUNNING_CLOCK)


@dataclass(frozen=True)
class ClockReading:
    """Reading of the clock, with the boot id, running seconds and wall clock of the machine at that moment."""

    shown: float
    boot: str
    running: float
    wall: float

    @classmethod
    def first(cls) -> ClockReading:
        wall = time.time()
        return cls(wall, boot_id(), running_seconds(), wall)

    def now(self) -> ClockReading:
        """Return a reading of this moment, computed from this earlier one."""
        running, wall = running_seconds(), time.time()
        if boot_id() == self.boot and running >= self.running:
            passed = running - self.running
        else:
            passed = min(max(wall - self.wall, 0.0), _LONGEST_STOP_SECONDS)
        return ClockReading(self.shown + passed, boot_id(), running, wall)


class OutboxClock:
    """Clock of one outbox. A reading of it is kept in the file, and other processes continue from it.

    `generation` returns a number that changes when the file at the path is replaced: a new file may have another clock.
    """

    def __init__(self, generation: Callable[[], int]) -> None:
        self._generation = generation
        self._read_in: int | None = None
        self._kept_at = -math.inf

    def now(self, db: sqlite3.Connection) -> float:
        """Return the seconds since the epoch by this clock."""
        if self._read_in != self._generation():
            self._read(db)
        return self._reading.now().shown

    def is_of_this_boot(self, db: sqlite3.Connection) -> bool:
        """Return whether a reading was kept since the machine was started."""
        return _kept(db).boot == boot_id()

    def _read(self, db: sqlite3.Connection) -> None:
        self._reading, self._read_in = _kept(db).now(), self._generation()

    def keep(self, db: sqlite3.Connection) -> None:
        """Keep a reading if one is due; call this in transactions that write anyway."""
        if time.monotonic() - self._kept_at < _KEEP_SECONDS:
            return
        self._kept_at = time.monotonic()
        self._read(db)
        reading = self._reading
        db.execute(
            "UPDATE outbox SET clock_shown = ?, clock_boot = ?, clock_running = ?, clock_wall = ?",
            (reading.shown, reading.boot, reading.running, reading.wall),
        )


def _kept(db: sqlite3.Connection) -> ClockReading:
    query = "SELECT clock_shown, clock_boot, clock_running, clock_wall FROM outbox"
    return ClockReading(*db.execute(query).fetchone())
