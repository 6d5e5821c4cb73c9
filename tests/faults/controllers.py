"""Controllers of a storm and their outboxes: long-running ones, copies of them, and one like a cron job.

Each controller has a folder with its outbox. A relay process, while it runs, serves some of the outboxes.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.faults.accepted import Accepted, accepted_by_controller, read_accepted
from tests.faults.supervisor import Supervisor
from tests.faults.verdict import KeptEntry, kept_entries

_CONTROLLERS = 3
_MOST_PAUSED = 2
_MOST_COPIES = 2  # running at the same time
_RELAYED = ("controller 1", "one-event 0")
_RELAY = "relay 0"
_SETTLE_SECONDS = 150.0  # a job whose stock worker died takes 90 s
_PAUSE_SECONDS = 1.0  # by then a running call of `record` has returned
_LOG = "-wal"
_PROGRAMS = "tests.faults.programs"

PutBack = Literal["without its log", "with its log", "beside a newer log", "moved over the open one"]
_PUT_BACKS: tuple[PutBack, ...] = ("without its log", "with its log", "beside a newer log", "moved over the open one")


@dataclass(frozen=True)
class _Paused:
    """A controller that records nothing until its entries are settled, so that an older copy can replace its outbox."""

    controller: Controller
    file: Path | None  # of the run that was paused; a later run records again
    paused_at: float


@dataclass
class Controller:
    """One controller. `seed` and `first` choose the events of its next run, `variant` their content."""

    name: str
    folder: Path
    source_name: str
    variant: int = 0
    seed: int = 0  # 0: a new seed
    seed_running: int = 0
    first: int = 0
    file: Path | None = None  # events accepted by the latest run
    backup: Path | None = None

    @property
    def outbox(self) -> Path:
        return self.folder / "outbox.db"


class Controllers:
    """All controllers of a storm. Methods that cause a fault return its name, which the storm counts."""

    def __init__(self, home: Path, programs: Supervisor, dice: random.Random) -> None:
        self.replaced: list[KeptEntry] = []  # entries of outboxes that older copies have replaced
        self._home, self._programs, self._dice = home, programs, dice
        self._numbers = itertools.count(1)
        self._all: dict[str, Controller] = {}
        self._copies: list[Controller] = []
        self._paused: dict[str, _Paused] = {}
        self._resume_relay_at: float | None = None
        for folder in ("bots", "backups", "accepted"):
            (home / folder).mkdir()

    def start(self) -> None:
        for number in range(_CONTROLLERS):
            self._start(self._new(f"controller {number}", source_name=f"bot-{number}"))
        self._start(self._new("one-event 0", source_name="cron"), program="one-event")
        while not all(_has_accepted(controller) for controller in self._all.values()):
            self._programs.restart_what_ended()
            time.sleep(0.1)

    def outboxes(self) -> list[Path]:
        return sorted(self._home.glob("bots/*/outbox.db"))

    def damaged_files(self) -> list[Path]:
        """Return the quarantined files that are not salvaged yet."""
        return [file for file in self._home.glob("bots/*/*.damaged-*") if not file.name.endswith(_LOG)]

    def salvaged_files(self) -> list[Path]:
        return [file for file in self._home.glob("bots/*/*.salvaged-*") if not file.name.endswith(_LOG)]

    def accepted(self) -> dict[str, Accepted]:
        """Return the accepted events of all runs, by controller."""
        return accepted_by_controller(self._home / "accepted")

    def _new(self, name: str, *, source_name: str) -> Controller:
        folder = self._home / "bots" / name.replace(" ", "-")
        self._all[name] = Controller(name, folder, source_name)
        return self._all[name]

    def _start(self, controller: Controller, program: str = "producer") -> None:
        def arguments() -> Sequence[str]:
            number = next(self._numbers)
            controller.file = self._home / "accepted" / f"{controller.folder.name}.{number}.jsonl"
            controller.seed_running = controller.seed or number
            events = ["--seed", str(controller.seed_running), "--variant", str(controller.variant)]
            events += ["--first", str(controller.first), "--pause", "0.02"]
            controller.seed, controller.first = 0, 0  # after a restart it records new events
            files = ["--outbox", str(controller.outbox), "--accepted", str(controller.file)]
            return [_PROGRAMS, program, *files, "--name", controller.source_name, *events]

        self._programs.start(controller.name, arguments)

    def kill_one(self) -> None:
        self._programs.restart(self._dice.choice(self._programs.names("controller", "copy", "one-event")))

    def copy_one(self) -> str:
        """Copy the folder of a controller and run both; the copy records the same events, some with other content.

        If there are too many copies, kill the oldest one. Its outbox keeps its entries.
        """
        original = self._any_running()
        stopped = self._dice.random() < 0.3
        if stopped:
            self._programs.kill(original.name)
        number = next(self._numbers)
        copy = self._new(f"copy {number}", source_name=original.source_name)
        copy.variant, copy.seed = number, original.seed_running
        copy.first = len(read_accepted(original.file).deliveries) if original.file else 0
        _copy_files(original.folder, copy.folder)
        if stopped:
            self._start(original)
        self._start(copy)
        self._copies.append(copy)
        if len(self._copies) > _MOST_COPIES:
            self._programs.kill(self._copies.pop(0).name)
        return f"outbox of a {'stopped' if stopped else 'live'} controller copied"

    def _any_running(self) -> Controller:
        return self._all[self._dice.choice(self._programs.names("controller", "copy"))]

    def back_up_or_pause(self) -> str:
        """Copy the outbox of a controller for later, or pause a controller so that its copy can be put back."""
        running = [self._all[name] for name in self._programs.names("controller", "copy")]
        ready = [
            one for one in running if one.backup is not None and _has_accepted(one) and one.name not in self._paused
        ]
        if not ready or len(self._paused) == _MOST_PAUSED or self._dice.random() < 0.3:
            controller = self._dice.choice(running)
            controller.backup = self._home / "backups" / f"{controller.folder.name}.{next(self._numbers)}"
            _copy_files(controller.folder, controller.backup)
            return "outbox backed up"
        controller = self._dice.choice(ready)
        self._programs.send(controller.name, signal.SIGUSR1)
        self._paused[controller.name] = _Paused(controller, controller.file, time.monotonic())
        return "controller paused"

    def continue_faults(self) -> list[str]:
        """Put back the older copies that may be put back now, resume a stopped relay that is due, return what was done.

        An older copy may be put back once each entry of the current file is settled: no unsettled entry may be lost.
        """
        if self._resume_relay_at is not None and time.monotonic() >= self._resume_relay_at:
            self._resume_relay_at = None
            self._programs.send(_RELAY, signal.SIGCONT)
        done = {name: self._continue(paused) for name, paused in list(self._paused.items())}
        for name, fault in done.items():
            if fault:
                del self._paused[name]
        return [fault for fault in done.values() if fault]

    def _continue(self, paused: _Paused) -> str | None:
        controller, seconds = paused.controller, time.monotonic() - paused.paused_at
        if controller.name not in self._programs.names("controller", "copy") or controller.file != paused.file:
            return "older copy not put back: controller was killed first"
        if seconds < _PAUSE_SECONDS:
            return None
        if not _unsettled_count(controller.outbox):
            done = self._put_back(controller)
        elif seconds < _SETTLE_SECONDS:
            return None
        else:
            done = "older copy not put back: not settled in time"
        if controller.file == paused.file:  # the signal would kill a new run that has no handler yet
            self._programs.send(controller.name, signal.SIGUSR2)
        return done

    def _put_back(self, controller: Controller) -> str:
        assert controller.backup is not None
        how = self._dice.choice(_PUT_BACKS)
        if how == "moved over the open one":
            self.replaced += kept_entries(controller.outbox)
            _move_over(controller.backup, controller.outbox)
            return f"older copy {how}"
        relayed = controller.name in _RELAYED and self._programs.is_running(_RELAY)
        if relayed:
            self._programs.kill(_RELAY)
        self._programs.kill(controller.name)
        before = self._home / "backups" / f"before.{next(self._numbers)}"
        _copy_files(controller.folder, before)  # opening the outbox itself would checkpoint its log
        settled = not _unsettled_count(before / "outbox.db")
        if settled:
            self.replaced += kept_entries(before / "outbox.db")
            _put_back(controller.backup, controller.outbox, how)
        self._start(controller)
        if relayed:
            self._start_relay()
        return f"older copy put back {how}" if settled else "older copy not put back: not settled in time"

    def steer_relay(self) -> str:
        """Start the relay process if there is none; otherwise kill, terminate or stop it for a while."""
        if not self._programs.is_running(_RELAY):
            self._programs.kill(_RELAY)
            self._start_relay()
            return "relay process started beside producers"
        action = self._dice.choice(["killed", "terminated", "stopped by SIGSTOP"])
        if action == "killed":
            self._programs.kill(_RELAY)
        elif action == "terminated":
            self._programs.send(_RELAY, signal.SIGTERM)
        else:
            self._programs.send(_RELAY, signal.SIGSTOP)
            # Producers take over after 10 s.
            self._resume_relay_at = time.monotonic() + self._dice.choice([3.0, 15.0])
        return f"relay process {action}"

    def _start_relay(self) -> None:
        outboxes = [str(self._all[name].outbox) for name in _RELAYED]
        arguments = [_PROGRAMS, "relay", *(part for path in outboxes for part in ("--outbox", path))]
        self._programs.start(_RELAY, lambda: arguments, restarts=False)

    def stop(self) -> None:
        self._programs.kill_all("controller", "copy", "one-event", "relay")


def _copy_files(folder: Path, to: Path) -> None:
    """Copy a folder like `cp -r`: one file after the other, while programs write to them."""
    to.mkdir()
    for file in sorted(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(file, to / file.name)


def _put_back(backup: Path, outbox: Path, how: PutBack) -> None:
    """Copy the backup over the outbox like `cp`: into the existing file."""
    shutil.copyfile(backup / outbox.name, outbox)
    log, log_then = outbox.with_name(outbox.name + _LOG), backup / (outbox.name + _LOG)
    if how != "beside a newer log":
        log.unlink(missing_ok=True)
    if how == "with its log" and log_then.exists():
        shutil.copyfile(log_then, log)


def _move_over(backup: Path, outbox: Path) -> None:
    """Replace the outbox like `rsync --delete`, while the controller runs: write a new file and rename it."""
    arriving = outbox.with_name("arriving.db")
    shutil.copyfile(backup / outbox.name, arriving)
    for end in (_LOG, "-shm"):
        outbox.with_name(outbox.name + end).unlink(missing_ok=True)
    arriving.replace(outbox)


def _has_accepted(controller: Controller) -> bool:
    """Return whether the latest run has accepted an event."""
    return controller.file is not None and controller.file.exists() and controller.file.stat().st_size > 0


def _unsettled_count(outbox: Path) -> int:
    query = "SELECT (SELECT count(*) FROM pending) + (SELECT count(*) FROM sent)"
    try:
        with closing(sqlite3.connect(outbox, timeout=10)) as db:
            return int(db.execute(query).fetchone()[0])
    except sqlite3.DatabaseError:  # damaged, and its producer has not noticed yet
        return 1
