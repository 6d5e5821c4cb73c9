"""The single row of an outbox's table `outbox`: its token, its Redis and queue, the heartbeat of a relay process."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from producers.outbox_clock import OutboxClock
from producers.outbox_file import OutboxFile

RELAY_ALIVE_SECONDS = 10.0  # a relay process counts as ended when its last heartbeat is older

_MOST_NEXT_TOKENS = 20  # exchanges that ended halfway must not fill the row

_HEADER = "SELECT token, next_tokens, redis, queue, relay, relay_at FROM outbox"
_REPLACE_SOURCES = """
UPDATE sources SET current = 0, left_because = 'copied' WHERE current RETURNING name || '/' || id
"""


class Header(NamedTuple):
    """Header of an outbox.

    Attributes:
        token: Distinguishes copies of the outbox: Redis has the same token.
        next_tokens: Tokens that may have replaced it in Redis, the newest one last, separated by spaces.
        relay: Name of the relay process that sent the last heartbeat.
        relay_at: Time of this heartbeat by the outbox's clock.
    """

    token: str
    next_tokens: str
    redis: str | None
    queue: str | None
    relay: str | None
    relay_at: float | None

    @property
    def tokens(self) -> set[str]:
        """All tokens that Redis may have, if no other copy has replaced them."""
        return {self.token, *self.next_tokens.split()}


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

    def begin_exchange(self, token: str) -> None:
        """Store that Redis may get this token from now on. The tokens that it may have already are kept."""
        with self._file.transaction() as db:
            others = [one for one in _next_tokens(db) if one != token]
            _set_next_tokens(db, [*others, token][-_MOST_NEXT_TOKENS:])

    def end_exchange(self, token: str) -> None:
        """Store that Redis has this token, and no token of an exchange that began earlier.

        If another relay has already ended an exchange that began later, nothing changes.
        """
        with self._file.transaction(durable=False) as db:
            next_tokens = _next_tokens(db)
            if token in next_tokens:
                db.execute("UPDATE outbox SET token = ?", (token,))
                _set_next_tokens(db, next_tokens[next_tokens.index(token) + 1 :])

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


def _next_tokens(db: sqlite3.Connection) -> list[str]:
    (tokens,) = db.execute("SELECT next_tokens FROM outbox").fetchone()
    return str(tokens).split()


def _set_next_tokens(db: sqlite3.Connection, tokens: list[str]) -> None:
    db.execute("UPDATE outbox SET next_tokens = ?", (" ".join(tokens),))
