"""The controllers of a storm and their outboxes: long-running ones, copies of them, and one that cron starts.

Each has a folder with its outbox. A relay process looks after some of the outboxes, when it runs.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import sqlite3
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.faults.accepted import Accepted, read_accepted
from tests.faults.supervisor import Supervisor
from tests.faults.verdict import KeptEntry, kept_entries

_CONTROLLERS = 3
_MOST_PAUSED = 2
_MOST_COPIES = 2  # that run at the same time
_RELAYED = ("controller 1", "one-event 0")
_RELAY = "relay 0"
_SETTLE_SECONDS = 150.0  # a job whose stock worker has died takes one and a half minutes
_PAUSE_SECONDS = 1.0  # until the call to `record` that was running has returned
_LOG = "-wal"
_PROGRAMS = "tests.faults.programs"

PutBack = Literal["without its log", "with its log", "beside a newer log", "moved over the open one"]
_PUT_BACKS: tuple[PutBack, ...] = ("without its log", "with its log", "beside a newer log", "moved over the open one")


@dataclass(frozen=True)
class _Paused:
    """A controller that records nothing, so that a copy can be put back once all that it has recorded is settled."""

    controller: Controller
    file: Path | None  # of the run that was asked to pause; another one records again
    asked_at: float


@dataclass
class Controller:
    """`seed` and `first` say which events its next run records, `variant` with which content."""

    name: str
    folder: Path
    source_name: str
    variant: int = 0
    seed: int = 0  # 0: a new one
    seed_running: int = 0
    first: int = 0
    file: Path | None = None  # for what the run that was started last accepts
    backup: Path | None = None

    @property
    def outbox(self) -> Path:
        return self.folder / "outbox.db"


class Controllers:
    """All controllers of a storm. Methods that are faults return what they have done, for the count of faults."""

    def __init__(self, home: Path, programs: Supervisor, dice: random.Random) -> None:
        self.replaced: list[KeptEntry] = []  # of files that were overwritten
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
        """Quarantined files that are not salvaged yet."""
        return [file for file in self._home.glob("bots/*/*.damaged-*") if not file.name.endswith(_LOG)]

    def salvaged_files(self) -> list[Path]:
        return [file for file in self._home.glob("bots/*/*.salvaged-*") if not file.name.endswith(_LOG)]

    def accepted(self) -> dict[str, Accepted]:
        """By controller, over all of its runs."""
        found: defaultdict[str, Accepted] = defaultdict(Accepted)
        for file in sorted(self._home.glob("accepted/*.jsonl")):
            one = read_accepted(file)
            found[file.name.split(".")[0]].deliveries.extend(one.deliveries)
            found[file.name.split(".")[0]].answers.extend(one.answers)
        return dict(found)

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
            controller.seed, controller.first = 0, 0  # after a restart it records new facts
            files = ["--outbox", str(controller.outbox), "--accepted", str(controller.file)]
            return [_PROGRAMS, program, *files, "--name", controller.source_name, *events]

        self._programs.start(controller.name, arguments)

    def kill_one(self) -> None:
        self._programs.restart(self._dice.choice(self._programs.names("controller", "copy", "one-event")))

    def copy_one(self) -> str:
        """Copy the folder of a controller, and run both; the copy records the same facts, in part with other content.

        The oldest copy ends when there are too many. Its outbox is left with what it holds.
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
        """Copy the outbox of a controller for later, or ask a controller to pause, so that its copy can be put back."""
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

    def go_on(self) -> list[str]:
        """Between two faults: put older copies back where that is fair now, and resume a relay process if that is due.

        It is fair when each entry of the file that is overwritten is settled: what is not would be gone.
        """
        if self._resume_relay_at is not None and time.monotonic() >= self._resume_relay_at:
            self._resume_relay_at = None
            self._programs.send(_RELAY, signal.SIGCONT)
        done = {name: self._went_on(paused) for name, paused in list(self._paused.items())}
        for name, what in done.items():
            if what:
                del self._paused[name]
        return [what for what in done.values() if what]

    def _went_on(self, paused: _Paused) -> str | None:
        controller, seconds = paused.controller, time.monotonic() - paused.asked_at
        if controller.name not in self._programs.names("controller", "copy") or controller.file != paused.file:
            return "older copy not put back: controller killed meanwhile"
        if seconds < _PAUSE_SECONDS:
            return None
        if not _unsettled_count(controller.outbox):
            done = self._put_back(controller)
        elif seconds < _SETTLE_SECONDS:
            return None
        else:
            done = "older copy not put back: not settled in time"
        if controller.file == paused.file:  # before a new run listens, the signal would end it
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
        _copy_files(controller.folder, before)  # to look at the outbox itself would write its log into it
        settled = not _unsettled_count(before / "outbox.db")
        if settled:
            self.replaced += kept_entries(before / "outbox.db")
            _put_back(controller.backup, controller.outbox, how)
        self._start(controller)
        if relayed:
            self._start_relay()
        return f"older copy put back {how}" if settled else "older copy not put back: not settled in time"

    def steer_relay(self) -> str:
        """Start the relay process when there is none; else kill it, end it, or stop it for a while."""
        if not self._programs.is_running(_RELAY):
            self._programs.kill(_RELAY)
            self._start_relay()
            return "relay process started beside producers"
        what = self._dice.choice(["killed", "told to end", "stopped by SIGSTOP"])
        if what == "killed":
            self._programs.kill(_RELAY)
        elif what == "told to end":
            self._programs.send(_RELAY, signal.SIGTERM)
        else:
            self._programs.send(_RELAY, signal.SIGSTOP)
            # Producers take over after 10 s.
            self._resume_relay_at = time.monotonic() + self._dice.choice([3.0, 15.0])
        return f"relay process {what}"

    def _start_relay(self) -> None:
        outboxes = [str(self._all[name].outbox) for name in _RELAYED]
        arguments = [_PROGRAMS, "relay", *(part for path in outboxes for part in ("--outbox", path))]
        self._programs.start(_RELAY, lambda: arguments, restarts=False)

    def stop(self) -> None:
        self._programs.kill_all("controller", "copy", "one-event", "relay")


def _copy_files(folder: Path, to: Path) -> None:
    """As `cp -r` does: one file after the other, while others write them."""
    to.mkdir()
    for file in sorted(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(file, to / file.name)


def _put_back(backup: Path, outbox: Path, how: PutBack) -> None:
    """As `cp` does: into the file that is there."""
    shutil.copyfile(backup / outbox.name, outbox)
    log, log_then = outbox.with_name(outbox.name + _LOG), backup / (outbox.name + _LOG)
    if how != "beside a newer log":
        log.unlink(missing_ok=True)
    if how == "with its log" and log_then.exists():
        shutil.copyfile(log_then, log)


def _move_over(backup: Path, outbox: Path) -> None:
    """As `rsync --delete` does, while the controller runs: into a new file, which gets the name of the old one."""
    arriving = outbox.with_name("arriving.db")
    shutil.copyfile(backup / outbox.name, arriving)
    for end in (_LOG, "-shm"):
        outbox.with_name(outbox.name + end).unlink(missing_ok=True)
    arriving.replace(outbox)


def _has_accepted(controller: Controller) -> bool:
    """Whether the run that was started last has accepted an event."""
    return controller.file is not None and controller.file.exists() and controller.file.stat().st_size > 0


def _unsettled_count(outbox: Path) -> int:
    query = "SELECT count(*) FROM entries WHERE state IN ('pending', 'sent')"
    try:
        with closing(sqlite3.connect(outbox, timeout=10)) as db:
            return int(db.execute(query).fetchone()[0])
    except sqlite3.DatabaseError:  # damaged: its producer has not found that yet
        return 1
