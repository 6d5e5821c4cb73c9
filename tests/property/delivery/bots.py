"""A bot: a folder with an outbox, and objects that stand for its processes: a controller's producer, and relays."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from redis import Redis

from producers.events import Payload
from producers.history_producer import HistoryProducer, Receipt
from producers.outbox import Outbox
from producers.relay import Relay
from tests.faults.verdict import KeptEntry, kept_entries
from tests.property.delivery.faults import Fault, Process, ProcessDied
from tests.property.delivery.servers import QUEUE

T = TypeVar("T")

KEEP_SECONDS = 7 * 86400.0
_LONG_AGO = datetime(1970, 1, 2, tzinfo=UTC)  # by any clock of the machine
RELAYS = ("first", "second", "process")  # two threads of producers, and `trading-history relay`


class _RelayProcess(Process):
    """A process that relays, which opens the outbox itself."""

    def __init__(self, path: Path, redis: Redis, name: str) -> None:
        super().__init__()
        self._path, self._redis, self._name = path, redis, name
        self._outbox: Outbox | None = None
        self._relay: Relay | None = None

    def sweep(self) -> bool:
        if self._relay is None:
            self._outbox = Outbox(self._path, repair=True)
            process_name = self._name if self._name == "process" else None
            self._relay = Relay(self._outbox, self._redis, QUEUE, keep_seconds=KEEP_SECONDS, process_name=process_name)
        return self._relay.sweep()

    def end(self) -> None:
        if self._relay is not None:
            self._relay.stop()
        if self._outbox is not None:
            self._outbox.close()


class _ProducerProcess(Process):
    """A process that records."""

    def __init__(self, path: Path, redis: Redis) -> None:
        super().__init__()
        self._path, self._redis = path, redis
        self._producer: HistoryProducer | None = None

    @property
    def producer(self) -> HistoryProducer:
        if self._producer is None:
            self._producer = HistoryProducer(self._redis, outbox=self._path, queue=QUEUE, relays=False)
        return self._producer

    def end(self) -> None:
        """Close the producer. If its process is dead, only free its objects.

        If the outbox was replaced, that makes a `taken-out` file for its unsettled entries, which a dead process cannot
        do: delete it.
        """
        if self._producer is not None:
            before = set(self._path.parent.glob("*.taken-out-*"))
            with suppress(ProcessDied):
                self._producer.close(0)
            if self.dead:
                for file in set(self._path.parent.glob("*.taken-out-*")) - before:
                    file.unlink()


class Bot:
    """The processes that use the outbox in `folder`."""

    def __init__(self, folder: Path, redis: Redis) -> None:
        self.folder = folder
        self.path = folder / "outbox.db"
        self.needs_resend = False  # the database has lost commits since the last resend
        self.killed_sweeps = 0
        self._redis = redis
        self._producer: _ProducerProcess | None = None
        self._relays: dict[str, _RelayProcess] = {}

    @property
    def is_open(self) -> bool:
        """Whether the producer runs, so that it has the file open."""
        return self._producer is not None

    def record(self, payloads: Sequence[Payload], fault: Fault | None = None) -> list[Receipt] | None:
        """Record events. Returns None if the producer dies."""
        return self._act(lambda producer: producer.record_many(payloads), fault)

    def use_outbox(self, fault: Fault | None = None) -> bool:
        """Let the producer use its outbox, as any call does. Returns false if it dies."""
        return self._act(HistoryProducer.status, fault) is not None

    def resend(self, fault: Fault | None = None) -> bool:
        """Send all settled events again, as after a restore of the database. Returns false if the producer dies."""
        done = self._act(lambda producer: producer.resend(_LONG_AGO), fault) is not None
        self.needs_resend = self.needs_resend and not done
        return done

    def _act(self, action: Callable[[HistoryProducer], T], fault: Fault | None = None) -> T | None:
        self._producer = process = self._producer or _ProducerProcess(self.path, self._redis)
        with process.acting(fault):
            return action(process.producer)
        self._kill_producer()  # reached only if the process died in the block
        return None

    def sweep(self, name: str, fault: Fault | None = None) -> bool:
        """Let one relay sweep once. Returns whether it sent or settled anything."""
        process = self._relays.setdefault(name, _RelayProcess(self.path, self._redis, name))
        with process.acting(fault):
            return process.sweep()
        self.killed_sweeps += 1  # reached only if the process died in the block
        self._kill_relay(name)
        return False

    def end_relay(self, name: str, fault: Fault | None = None) -> None:
        """Stop one relay."""
        if (process := self._relays.pop(name, None)) is not None:
            with process.acting(fault):
                process.end()
            self._close_locked_files()

    def close(self) -> None:
        """Stop the relays and close the producer."""
        for name in list(self._relays):
            self.end_relay(name)
        if (process := self._producer) is not None:
            self._producer = None
            with process.acting():
                process.end()

    def kill(self) -> None:
        """Kill all processes."""
        for name in list(self._relays):
            self._kill_relay(name)
        self._kill_producer()

    def _kill_relay(self, name: str) -> None:
        if (process := self._relays.pop(name, None)) is not None:
            process.kill()
            self._close_locked_files()

    def _kill_producer(self) -> None:
        if (process := self._producer) is not None:
            self._producer = None
            process.kill()
            with process.acting():
                process.end()
            self._close_locked_files()

    def _close_locked_files(self) -> None:
        """Close the temporary files that a killed process had open: it was a part of this process, which lives."""
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{descriptor}")
                if target.startswith(str(self.folder)) and ".taken-out-" in target:
                    os.close(int(descriptor))

    def entries(self) -> list[KeptEntry]:
        """Return the entries in the file at the path. A process may have died before it made the tables."""
        try:
            return kept_entries(self.path) if self.path.exists() else []
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return []


def copy_folder(source: Path, target: Path) -> None:
    """Copy a bot's folder, as `cp -r` does."""
    shutil.copytree(source, target, dirs_exist_ok=True)
