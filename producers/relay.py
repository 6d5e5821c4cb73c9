"""Carries entries from the outbox to the queue, and acknowledgements back to the outbox.

A sweep sends pending entries, reads acknowledgements and checks overdue entries. Among all threads and processes that
use one outbox, one relays at a time; when it ends or dies, another one takes over. While a relay process
(`trading-history relay`) sends heartbeats, the producers' threads leave relaying to it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from redis import Redis, RedisError
from redis.exceptions import ResponseError

from producers.acknowledgement_reader import AcknowledgementReader
from producers.copies import CopyGuard
from producers.entry_sender import EntrySender
from producers.errors import HistoryError, OutboxDamaged, OutboxError
from producers.outbox import Outbox
from producers.redis_url import redis_reason
from producers.relay_turn import RelayTurn
from producers.times import backoff_seconds

logger = logging.getLogger(__name__)

STOP_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 5.0
_FIRST_BACKOFF_SECONDS = 0.2
_IDLE_SECONDS = 0.05  # the longest pause, after which entries of other processes are noticed
_FIRST_PAUSE_SECONDS = 0.005  # the pause between a send and the first look for acknowledgements
# The shortest time from one sweep to the next; entries that are recorded meanwhile are sent together. A sweep takes a
# millisecond of the interpreter, for which callers wait. After a sweep that sent more than _BUSY_ENTRIES, the longer
# time applies: with 5 ms, callers that record one by one lost a third of their rate.
_SWEEP_SECONDS = 0.005
_BUSY_SWEEP_SECONDS = 0.02
_BUSY_ENTRIES = 3
_SETTLE_SECONDS = 1.0  # how often acknowledgements are read while there is more to send, which is more urgent
_PRUNE_SECONDS = 60.0
_SALVAGE_PAUSE_SECONDS = 10.0
_CHECK_FILE_SECONDS = 0.2  # enough for about 100 MB; calls of `record` wait meanwhile


class Relay:
    """Relays one outbox to one queue, in a daemon thread after `start`, or whenever `sweep` is called.

    With `process_name`, it belongs to a relay process, which sends heartbeats to the outbox.
    """

    def __init__(
        self,
        outbox: Outbox,
        redis: Redis,
        queue: str,
        *,
        keep_seconds: float,
        process_name: str | None = None,
        last_backoff_seconds: float = LAST_BACKOFF_SECONDS,
    ) -> None:
        self._outbox = outbox
        self._keep_seconds = keep_seconds
        self._last_backoff_seconds = last_backoff_seconds
        self.turn = RelayTurn(outbox, redis, queue, process_name)
        self._reader = AcknowledgementReader(outbox, redis)
        self._sender = EntrySender(outbox, redis, queue)
        self._guard = CopyGuard(outbox, redis)
        self._prune_at = self._settle_at = 0.0
        self._salvaging: Iterator[None] | None = None
        self._salvage_at = 0.0
        self._sent = 0  # entries that the last sweep sent
        self._failures = 0
        self.failure: str | None = None  # reason of the last sweep's failure
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._settled = threading.Condition()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread. If the interpreter is shutting down, do nothing: entries wait for the next process."""
        thread = threading.Thread(target=self._run, name="history-relay", daemon=True)
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def wake(self) -> None:
        """End the pause before the next sweep, for example after an append, unless the last sweep failed."""
        self._wake.set()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the thread after its current sweep; return after `seconds` even if it still waits for Redis."""
        self._stop.set()
        self._wake.set()
        if self._thread is None:
            self.turn.end()
        else:
            self._thread.join(seconds)

    def wait_for_results(self, seconds: float) -> None:
        """Wait until this relay settles entries, at most `seconds`. Relays of other processes do not end the wait."""
        with self._settled:
            self._settled.wait(seconds)

    def sweep(self) -> bool:
        """Relay once.

        Returns:
            True if anything was settled, sent or salvaged; False if not, or if another relay has the turn.

        Raises:
            RedisError: Redis cannot be reached, or answers with an error; the entries of that batch are unchanged.
            OutboxError: the outbox cannot be read or written.
            RelayRefused: the outbox belongs to another Redis or queue.
        """
        with self._outbox.repaired():
            return self._sweep()
        return True  # a damaged file was quarantined: continue with the new one

    def _sweep(self) -> bool:
        if not self.turn.take():
            return False
        if not self.turn.is_exclusive:
            self._sender.in_doubt = True  # the other relay may be sending the same entries
        if not self.turn.started:
            self._begin_turn()
        salvaged = self._salvage()  # first, because it does not need Redis
        try:
            return self._exchange() or salvaged
        finally:
            self._prune()  # also while Redis is away: the outbox needs the room

    def _exchange(self) -> bool:
        """Send entries to Redis and read acknowledgements; return whether anything was sent or settled."""
        try:
            self._guard.check()
            self._sent = self._sender.send_pending(probe=bool(self._failures), stopped=self._stop.is_set)
        except ResponseError:  # for example, Redis is full; settling deletes acknowledgements
            self._settle()
            raise
        settled = self._settle()
        resent = self._sender.send_overdue()
        return bool(settled or self._sent or resent)

    def _settle(self) -> int:
        """Settle acknowledged entries and return their number; while more entries wait, only every _SETTLE_SECONDS."""
        if self._sender.has_more and time.monotonic() < self._settle_at:
            return 0
        self._settle_at = time.monotonic() + _SETTLE_SECONDS
        settled = self._reader.apply()
        if settled:
            with self._settled:
                self._settled.notify_all()
        return settled

    def _begin_turn(self) -> None:
        self._check_file()
        self._sender.in_doubt = True  # the previous relay may have sent entries that are not marked as sent
        self._guard.begin()
        self._salvaging = None
        self.turn.started = True

    def _check_file(self) -> None:
        """Raise OutboxDamaged if a quick check finds a fault.

        Relaying alone might not read the damaged pages for a long time, for example if an older file was put back
        beside a newer log.
        """
        fault = self._outbox.quick_check(_CHECK_FILE_SECONDS)
        if fault not in (None, "unfinished"):
            raise OutboxDamaged(f"outbox {self._outbox.path}: {' '.join(str(fault).split())}")

    def _salvage(self) -> bool:
        """Salvage one page of a quarantined file, and return whether there may be more."""
        if self._salvaging is None:
            self._salvaging = self._salvage_all()
        if time.monotonic() < self._salvage_at:
            return False
        try:
            next(self._salvaging)
        except StopIteration:
            return False
        except OutboxDamaged:
            raise
        except (OutboxError, OSError) as error:  # new events must not wait for this
            logger.warning(
                "cannot salvage a damaged file of %s; trying again in %.0f s: %s",
                self._outbox.path,
                _SALVAGE_PAUSE_SECONDS,
                error,
            )
            self._salvaging, self._salvage_at = None, time.monotonic() + _SALVAGE_PAUSE_SECONDS
            return False
        return True

    def _salvage_all(self) -> Iterator[None]:
        self._outbox.quarantine.finish_renames()
        for file in self._outbox.quarantine.damaged_files():
            yield from self._outbox.quarantine.salvaging(file)

    def delete_acknowledgements(self) -> None:
        """Delete this outbox's acknowledgements in Redis, because they name rows of a replaced database."""
        self._reader.delete_acknowledgements()

    def _prune(self) -> None:
        """Delete a page of old settled entries; continue at the next sweep if there are more, else in a minute."""
        if time.monotonic() >= self._prune_at and not self._outbox.deliveries.prune(self._keep_seconds):
            self._prune_at = time.monotonic() + _PRUNE_SECONDS

    def _run(self) -> None:
        pause = _IDLE_SECONDS
        while not self._stop.is_set():
            began_at = time.monotonic()
            try:
                # Sweep often right after an entry changed its state, then less and less often.
                pause = _FIRST_PAUSE_SECONDS if self.sweep() else min(pause * 1.5, _IDLE_SECONDS)
                self._recovered()
            except Exception as error:
                # No error may end the thread, not even a defect in this code: entries wait and the log says why.
                self._stop.wait(self._back_off(error))
            else:
                if not self._sender.has_more:
                    if self._wake.wait(pause):
                        pause = _FIRST_PAUSE_SECONDS
                    period = _BUSY_SWEEP_SECONDS if self._sent > _BUSY_ENTRIES else _SWEEP_SECONDS
                    self._stop.wait(began_at + period - time.monotonic())
            self._wake.clear()
        self.turn.end()

    def _back_off(self, error: Exception) -> float:
        """Log the first failure, and return the seconds until the next try, which new entries do not shorten."""
        self._failures += 1
        self.failure = _reason(error)
        if self.turn.failing_since is None:
            self.turn.failing_since = time.monotonic()
        if self._failures == 1:
            logger.warning(
                "cannot relay %s: %s; events stay in the outbox, trying again",
                self._outbox.path,
                _brief(error),
                exc_info=not isinstance(error, (RedisError, HistoryError, OSError)),
            )
        return backoff_seconds(self._failures, first=_FIRST_BACKOFF_SECONDS, last=self._last_backoff_seconds)

    def _recovered(self) -> None:
        if self._failures:
            logger.warning("relaying %s again after %d failed tries", self._outbox.path, self._failures)
            self._failures, self.failure, self.turn.failing_since = 0, None, None


def _brief(error: Exception) -> str:
    """Return the error's type and the first line of its message, without the details that a driver may append."""
    return f"{type(error).__name__}: {_reason(error)}"


def _reason(error: Exception) -> str:
    if isinstance(error, RedisError):
        return redis_reason(error)
    return str(error).splitlines()[0] if str(error) else "no details"
