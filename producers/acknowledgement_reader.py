"""Reads acknowledgements from Redis, settles the entries that they name, and then deletes them in Redis."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from redis import Redis, WatchError
from redis.exceptions import ResponseError

from producers.acknowledgements import ACKNOWLEDGEMENT_TTL_SECONDS, Acknowledgement, read_acknowledgements, shown
from producers.entries import full_source
from producers.outbox import Outbox
from producers.redis_keys import acknowledgement_key, delivery_of, job_id_of

logger = logging.getLogger("producers.relay")  # the name that log filters of controllers use for the whole relay

_PAGE_FIELDS = 500
_REJECTED_SECONDS = 5.0
# Keep the acknowledgement of an entry that is already settled: another copy of the outbox may still wait for it.
_KEPT_FOR_COPIES_SECONDS = 60


class AcknowledgementReader:
    """Settles the entries of one outbox by their acknowledgements.

    Raises:
        RedisError: from every method, when Redis cannot be reached; call the method again.
        OutboxError: from every method, when the outbox cannot be read or written; call the method again.
    """

    def __init__(self, outbox: Outbox, redis: Redis) -> None:
        self._outbox = outbox
        self._redis = redis
        self._rejected_at = 0.0

    def apply(self) -> int:
        """Settle the entries whose acknowledgements are in Redis, and return how many were settled."""
        sources = self._outbox.deliveries.awaiting("sent")
        # An operator may requeue a rejected event, which is then stored. Look for that only now and then.
        if time.monotonic() >= self._rejected_at:
            self._rejected_at = time.monotonic() + _REJECTED_SECONDS
            sources = list({*sources, *self._outbox.deliveries.awaiting("rejected")})
        return sum(self._apply_to_source(source_id, full_source(name, source_id), n) for source_id, name, n in sources)

    def delete_acknowledgements(self) -> None:
        """Delete the acknowledgements of this outbox's entries, because they name rows of a replaced database."""
        for source in self._outbox.sources():
            key = acknowledgement_key(source.full_name)
            fields: Any = self._redis.hkeys(key)
            if own := [field for field in fields if self._outbox.deliveries.has(delivery_of(shown(field)))]:
                self._redis.hdel(key, *own)

    def _apply_to_source(self, source_id: str, source: str, resends: int) -> int:
        settled_count, cursor, key = 0, 0, acknowledgement_key(source)
        while True:
            try:
                cursor, page = self._redis.hscan(key, cursor, count=_PAGE_FIELDS)
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                # Workers quarantine the key too, but only when they have something to acknowledge there.
                self._redis.rename(key, f"{key}:quarantined")
                logger.error(
                    "key %s is not a hash and was renamed to %s:quarantined. Entries without an acknowledgement are"
                    " sent again",
                    key,
                    key,
                )
                return settled_count
            if page:
                fields: dict[Any, Any] = dict(page)  # type: ignore[arg-type]  # a dict with RESP2 and with RESP3
                settled_count += self._settle(source_id, source, resends, fields)
            if not cursor:
                return settled_count

    def _settle(self, source_id: str, source: str, resends: int, fields: Mapping[Any, Any]) -> int:
        """Settle the entries that these fields acknowledge, delete the fields, and return how many were settled."""
        found = read_acknowledgements(fields, source)
        valid = {field: one for field, one in found.items() if one is not None}
        settled = self._outbox.deliveries.settle(source_id, resends, valid)
        # Delete only now that the outbox has them: after a crash in between, they are read once more.
        done = {field for field, one in found.items() if one is None}.union(settled.changed)
        if len(done) < len(fields):
            done |= self._expired(valid, set(settled.known))
        self._remove(acknowledgement_key(source), {field: fields[field] for field in done}, valid)
        for field in settled.changed:
            _log_rejection(source, valid[field])
        return len(settled.changed)

    def _expired(self, acknowledgements: Mapping[Any, Acknowledgement], known: set[Any]) -> set[Any]:
        """Return the fields that settled nothing and are too old for another copy of this outbox to need them."""
        now, _ = self._redis.time()
        return {
            field
            for field, one in acknowledgements.items()
            if now - one.at > (_KEPT_FOR_COPIES_SECONDS if field in known else ACKNOWLEDGEMENT_TTL_SECONDS)
        }

    def _remove(self, key: str, fields: Mapping[Any, Any], acknowledgements: Mapping[Any, Acknowledgement]) -> None:
        """Delete fields that were read; a rejection only if its value is unchanged: a requeue may have replaced it."""
        rejected = [
            field
            for field in fields
            if field in acknowledgements and acknowledgements[field].outcome.kind == "rejected"
        ]
        if final := [field for field in fields if field not in rejected]:
            self._redis.hdel(key, *final)
        if rejected:
            with self._redis.pipeline() as pipe, contextlib.suppress(WatchError):  # the next sweep reads it again
                pipe.watch(key)  # type: ignore[no-untyped-call]  # redis-py annotates it only in part
                values = zip(rejected, pipe.hmget(key, rejected), strict=True)
                same = [field for field, value in values if value == fields[field]]
                pipe.multi()
                if same:
                    pipe.hdel(key, *same)
                pipe.execute()


def _log_rejection(source: str, one: Acknowledgement) -> None:
    if one.outcome.kind == "rejected":
        fields: dict[str, Any] = {"event_id": one.event_id, "source": source, "sequence": one.sequence}
        fields |= {"job_id": job_id_of(one.source_id, one.sequence, one.nonce), "outcome": one.outcome.kind}
        logger.warning("event %s was rejected: %s", one.event_id, one.outcome.reason, extra=fields)
