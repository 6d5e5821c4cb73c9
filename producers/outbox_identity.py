"""What an outbox knows of itself: its token, where its entries go, whether a relay process looks after it."""

from __future__ import annotations

from typing import NamedTuple

from producers.outbox_clock import OutboxClock
from producers.outbox_file import OutboxFile

RELAY_ALIVE_SECONDS = 10.0  # after its last heartbeat a relay process counts as gone

_IDENTITY = "SELECT token, next_token, redis, queue, relay, relay_at FROM outbox"
_LEAVE_SOURCES = """
UPDATE sources SET current = 0, left_at = ?, left_because = ? WHERE current RETURNING name || '/' || id
"""


class Identity(NamedTuple):
    """What tells this outbox from a copy, where its entries go, and the last heartbeat of a relay process."""

    token: str
    next_token: str | None
    redis: str | None
    queue: str | None
    relay: str | None
    relay_at: float | None


class OutboxIdentity:
    """Of the outbox in `file`.

    Raises:
        OutboxError: from every method, when the file cannot be read or written.
    """

    def __init__(self, file: OutboxFile, clock: OutboxClock) -> None:
        self._file = file
        self._clock = clock

    def read(self) -> Identity:
        with self._file.reading() as db:
            return Identity(*db.execute(_IDENTITY).fetchone())

    def begin_exchange(self, before: Identity, token: str, next_token: str) -> bool:
        """Redis has `token`, and is about to get `next_token`: until it has answered, it may have either.

        False, and nothing is noted, when another relay has begun or ended an exchange since `before` was read.
        """
        with self._file.transaction() as db:
            query = "UPDATE outbox SET token = ?, next_token = ? WHERE token = ? AND next_token IS ?"
            return db.execute(query, (token, next_token, before.token, before.next_token)).rowcount == 1

    def end_exchange(self, token: str) -> None:
        """Redis has this token now, or another relay has begun a later exchange since."""
        with self._file.transaction(durable=False) as db:
            db.execute("UPDATE outbox SET token = next_token, next_token = NULL WHERE next_token = ?", (token,))

    def leave_sources(self, because: str) -> list[str]:
        """From now on what is recorded has new sources; the full names of those that were current."""
        with self._file.transaction() as db:
            left = db.execute(_LEAVE_SOURCES, (self._clock.now(db), because)).fetchall()
        return [name for (name,) in left]

    def set_destination(self, redis: str, queue: str) -> None:
        """Where the entries go. Of several producers with other settings, the one that was opened last decides."""
        with self._file.reading() as db:
            if db.execute("SELECT redis, queue FROM outbox").fetchone() == (redis, queue):
                return
        with self._file.transaction() as db:
            db.execute("UPDATE outbox SET redis = ?, queue = ?", (redis, queue))

    def announce_relay(self, relay: str) -> None:
        """The heartbeat of the relay process of this name."""
        with self._file.transaction(durable=False) as db:
            db.execute("UPDATE outbox SET relay = ?, relay_at = ?", (relay, self._clock.now(db)))
            self._clock.keep(db)

    def forget_relay(self, relay: str) -> None:
        """This relay process no longer relays; nothing changes when another one was announced since."""
        with self._file.transaction(durable=False) as db:
            db.execute("UPDATE outbox SET relay = NULL, relay_at = NULL WHERE relay = ?", (relay,))

    def relay_is_alive(self) -> bool:
        """Whether a relay process has had a heartbeat lately."""
        with self._file.reading() as db:
            at = Identity(*db.execute(_IDENTITY).fetchone()).relay_at
            return at is not None and abs(self._clock.now(db) - at) <= RELAY_ALIVE_SECONDS
