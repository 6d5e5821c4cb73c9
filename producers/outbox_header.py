"""The single row of an outbox's table `outbox`: its token, its Redis and queue, the heartbeat of a relay process."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence
from typing import NamedTuple

from producers.outbox_clock import OutboxClock
from producers.outbox_file import OutboxFile

RELAY_ALIVE_SECONDS = 10.0  # a relay process counts as ended when its last heartbeat is older

_MOST_OTHER_TOKENS = 100  # of the last hour or more, beside those that Redis has

_HEADER = "SELECT token, other_tokens, redis, queue, relay, relay_at FROM outbox"
_SET_TOKENS = "UPDATE outbox SET token = coalesce(?, token), other_tokens = ?"
_REPLACE_SOURCES = """
UPDATE sources SET current = 0, left_because = 'copied'
WHERE current AND name || '/' || id IN (SELECT value FROM json_each(?)) RETURNING name || '/' || id
"""


class Header(NamedTuple):
    """Header of an outbox.

    Attributes:
        token: Distinguishes copies of the outbox: Redis has the same token.
        other_tokens: Those that Redis may have in its place, the newest one last: of exchanges that have begun, and
            earlier ones, if Redis has lost its last writes.
        relay: Name of the relay process that sent the last heartbeat.
        relay_at: Time of this heartbeat by the outbox's clock.
    """

    token: str
    other_tokens: tuple[str, ...]
    redis: str | None
    queue: str | None
    relay: str | None
    relay_at: float | None

    @property
    def tokens(self) -> set[str]:
        """All tokens that Redis may have, if no other copy has replaced them."""
        return {self.token, *self.other_tokens}


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
            return _header(db)

    def begin_exchange(self, found: Collection[str], token: str) -> None:
        """Store that Redis, which has the tokens `found`, may get this token from now on."""
        with self._file.transaction() as db:
            others = [one for one in _header(db).other_tokens if one != token]
            newest = others[1 - _MOST_OTHER_TOKENS :]
            kept = [one for one in others if one in found or one in newest]
            db.execute(_SET_TOKENS, (None, " ".join([*kept, token])))

    def end_exchange(self, token: str) -> None:
        """Store that Redis has this token now. Its earlier one is kept."""
        with self._file.transaction(durable=False) as db:
            header = _header(db)
            if token in header.other_tokens:
                others = [one for one in header.other_tokens if one != token]
                db.execute(_SET_TOKENS, (token, " ".join([*others, header.token])))

    def replace_sources(self, sources: Sequence[str]) -> list[str]:
        """Give new events new sources instead of these, which a copy uses; return those that were replaced now."""
        with self._file.transaction() as db:
            return [name for (name,) in db.execute(_REPLACE_SOURCES, (json.dumps(sources),)).fetchall()]

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
            at = _header(db).relay_at
            return at is not None and abs(self._clock.now(db) - at) <= RELAY_ALIVE_SECONDS


def _header(db: sqlite3.Connection) -> Header:
    token, other_tokens, *others = db.execute(_HEADER).fetchone()
    return Header(token, tuple(other_tokens.split()), *others)
