"""A process that only relays: for controllers that cron starts, or that must not share their interpreter with a relay.

It sends heartbeats to each outbox, and producers leave relaying to it. If an outbox cannot be relayed, that is logged
once and tried again; the process continues and relays the other outboxes meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from redis import Redis

from producers.errors import HistoryError, OutboxError
from producers.outbox import Outbox
from producers.outbox_place import check_is_no_folder
from producers.relay import Relay

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0  # between two tries to open an outbox
END_SECONDS = 8.0  # for all relays together: a relay waits for an answer of Redis for at most 5 s


def run_relay(
    outboxes: Sequence[Path], redis: Redis, queue: str, *, keep_seconds: float, stopped: Callable[[float], bool]
) -> None:
    """Relay these outboxes to the RQ queue until `stopped` returns True; wait for outboxes that do not exist yet.

    `stopped` takes the seconds to wait at most, and returns whether to stop, like `threading.Event.wait`.

    Raises:
        OutboxError: one of `outboxes` is a folder.
        RelayRefused: an outbox that exists at the start belongs to another Redis or queue.
    """
    name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    by_file = {os.path.realpath(path): path.absolute() for path in outboxes}  # once, even if two paths lead to it
    watched = [_Watched(path, redis, queue, keep_seconds, name) for path in by_file.values()]
    check_destinations(list(by_file.values()), redis, queue)
    try:
        while True:
            for one in watched:
                one.check()
            if stopped(_CHECK_SECONDS):
                return
    finally:
        deadline = time.monotonic() + END_SECONDS
        for one in watched:
            one.stop(0.0)
        for one in watched:
            one.stop(max(deadline - time.monotonic(), 0.0))
            one.close()


def check_destinations(outboxes: Sequence[Path], redis: Redis, queue: str) -> None:
    """Check that `run_relay` would not refuse these outboxes.

    Raises:
        OutboxError: one of them is a folder.
        RelayRefused: one of them exists and belongs to another Redis or queue.
    """
    for path in outboxes:
        _Watched(path.absolute(), redis, queue, keep_seconds=0, name="").check_destination()


class _Watched:
    """An outbox and, as soon as it can be opened, its relay. Each change of its state is logged once."""

    def __init__(self, path: Path, redis: Redis, queue: str, keep_seconds: float, name: str) -> None:
        self._path = path
        self._redis, self._queue, self._keep_seconds, self._name = redis, queue, keep_seconds, name
        self._outbox: Outbox | None = None
        self._relay: Relay | None = None
        self._logged = ""
        self._is_standby = False

    def check_destination(self) -> None:
        """Raise OutboxError for a folder, and RelayRefused if the outbox belongs to another Redis or queue."""
        check_is_no_folder(self._path)
        if self._path.is_file():
            try:
                with Outbox(self._path) as outbox:
                    self._new_relay(outbox).turn.check_destination()
            except OutboxError:
                return  # `check` logs the error and tries again

    def check(self) -> None:
        """Start to relay as soon as that is possible, and log each change of state."""
        if self._relay is None:
            self._begin()
        if self._relay is not None:
            with contextlib.suppress(HistoryError):  # the relay gets the same error and logs it
                self._relay.turn.heartbeat()
            self._log_turn(self._relay)

    def _begin(self) -> None:
        if not self._path.is_file():
            self._log(logging.INFO, "there is no outbox at %s yet: waiting for a producer to create it", self._path)
            return
        outbox: Outbox | None = None
        try:
            outbox = Outbox(self._path, repair=True)
            relay = self._new_relay(outbox)
            with outbox.repaired():  # if the file is damaged, a new one replaces it, which names no Redis yet
                relay.turn.check_destination()
            unsettled = outbox.status().depth
        except HistoryError as error:
            if outbox is not None:
                outbox.close()
            self._log(logging.ERROR, "cannot relay %s; trying again: %s", self._path, error)
            return
        self._log(logging.INFO, "relaying %s, unsettled entries: %d", self._path, unsettled)
        self._outbox, self._relay = outbox, relay
        relay.start()

    def _new_relay(self, outbox: Outbox) -> Relay:
        return Relay(outbox, self._redis, self._queue, keep_seconds=self._keep_seconds, process_name=self._name)

    def _log_turn(self, relay: Relay) -> None:
        waits = relay.turn.is_standby
        if waits == self._is_standby:
            return
        self._is_standby = waits
        if waits:
            logger.info("another process is relaying %s: waiting until it ends", self._path)
        else:
            logger.info("relaying %s now", self._path)

    def _log(self, level: int, message: str, *arguments: object) -> None:
        text = message % arguments
        if text != self._logged:
            self._logged = text
            logger.log(level, text)

    def stop(self, seconds: float) -> None:
        if self._relay is not None:
            self._relay.stop(seconds)

    def close(self) -> None:
        if self._outbox is not None:
            self._outbox.close()
            logger.info("no longer relaying %s", self._path)
