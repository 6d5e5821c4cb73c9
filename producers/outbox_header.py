"""The single row of an outbox's table `outbox`: its token, its Redis and queue, the heartbeat of a relay process."""

from __future__ import annotations

from typing import NamedTuple

from producers.outbox_clock import OutboxClock
from producers.outbox_file import OutboxFile

RELAY_ALIVE_SECONDS = 10.0  # a relay process counts as ended when its last heartbeat is older

_HEADER = "SELECT token, next_token, redis, queue, relay, relay_at FROM outbox"
_REPLACE_SOURCES = """
UPDATE sources SET current = 0, left_because = 'copied' WHERE current RETURNING name || '/' || id
"""


class Header(NamedTuple):
    """Header of an outbox. `token` distinguishes copies, `next_token` is about to replace it, `relay` names a process.

    `relay_at` is the time of the relay's last heartbeat by the outbox's clock.
    """

    token: str
    next_token: str | None
    redis: str | None
    queue: str | None
    relay: str | None
    relay_at: float | None


class OutboxHeader:
    """Reads and writes the header of the outbox in `file`.

    Raises:
        OutboxError: from every method, when the file cannot be read or written.
    """

    def __init__(self, file: OutboxFile, clock: OutboxClock) -> None:
        self._file = file
        self._clock = clock

    def read(self) -> Header:
        with self._file.reading() as db:
            return Header(*db.execute(_HEADER).fetchone())

    def begin_exchange(self, before: Header, token: str, next_token: str) -> bool:
        """Store that Redis has `token` and is about to get `next_token`; until Redis answers, it may have either.

        Return False and store nothing if another relay has begun or ended an exchange since `before` was read.
        """
        with self._file.transaction() as db:
            query = "UPDATE outbox SET token = ?, next_token = ? WHERE token = ? AND next_token IS ?"
            return db.execute(query, (token, next_token, before.token, before.next_token)).rowcount == 1

    def end_exchange(self, token: str) -> None:
        """Store that Redis has this token now. If another relay has begun an exchange since, nothing changes."""
        with self._file.transaction(durable=False) as db:
            db.execute("UPDATE outbox SET token = next_token, next_token = NULL WHERE next_token = ?", (token,))

    def replace_sources(self) -> list[str]:
        """Give new events new sources, because a copy uses the current ones; return the old sources' full names."""
        with self._file.transaction() as db:
            return [name for (name,) in db.execute(_REPLACE_SOURCES).fetchall()]

    def set_destination(self, redis: str, queue: str) -> None:
        """Store the Redis and the queue that the entries go to. The producer that was opened last decides."""
        with self._file.reading() as db:
            if db.execute("SELECT redis, queue FROM outbox").fetchone() == (redis, queue):
                return
        with self._file.transaction() as db:
            db.execute("UPDATE outbox SET redis = ?, queue = ?", (redis, queue))

    def heartbeat(self, relay: str) -> None:
        """Store that the relay process of this name is relaying now."""
        with self._file.transaction(durable=False) as db:
            db.execute("UPDATE outbox SET relay = ?, relay_at = ?", (relay, self._clock.now(db)))
            self._clock.keep(db)

    def clear_heartbeat(self, relay: str) -> None:
        """Store that this relay process no longer relays. If another one sent a heartbeat since, nothing changes."""
        with self._file.transaction(durable=False) as db:
            db.execute("UPDATE outbox SET relay = NULL, relay_at = NULL WHERE relay = ?", (relay,))

    def relay_is_alive(self) -> bool:
        """Return whether the last heartbeat of a relay process is at most RELAY_ALIVE_SECONDS old."""
        with self._file.reading() as db:
            at = Header(*db.execute(_HEADER).fetchone()).relay_at
            return at is not None and abs(self._clock.now(db) - at) <= RELAY_ALIVE_SECONDS
