"""The age of the oldest entry that no worker has acknowledged."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from redis import Redis, RedisError

from producers.entries import EntryHead
from producers.outbox import Outbox
from producers.rq_queue import unanswered

_PAGE = 1000
_MOST_PAGES = 20  # as many entries as a relay has under way at most
_SOON_SECONDS = 30.0  # Redis is not asked about younger entries
_ANSWER_SECONDS = 1.0  # of Redis, in all


def oldest_unacknowledged_seconds(outbox: Outbox, redis: Redis | None) -> float | None:
    """The age in seconds of the oldest entry that is neither settled nor acknowledged; None when there is none.

    Redis is asked, since a controller that has ended does not read its acknowledgements. Without Redis, or when it does
    not answer within a second, the oldest entry that is neither stored nor rejected counts.

    Raises:
        OutboxError: the outbox cannot be read.
    """
    plain = outbox.status().oldest_unsettled_seconds
    if redis is None or plain is None or plain < _SOON_SECONDS:
        return plain
    try:
        sent = _oldest_unanswered_seconds(outbox, redis, time.monotonic() + _ANSWER_SECONDS)
    except (RedisError, TimeoutError):
        return plain
    return max((age for age in (sent, outbox.oldest_pending_seconds()) if age is not None), default=None)


def _oldest_unanswered_seconds(outbox: Outbox, redis: Redis, deadline: float) -> float | None:
    after = 0
    for _ in range(_MOST_PAGES):
        page = outbox.deliveries.sent(after, _PAGE)
        ages = {head.position: age for head, age in page}
        waiting = _unanswered(redis, [head for head, _ in page], deadline)
        if waiting:
            return ages[waiting[0].position]
        if len(page) < _PAGE:
            return None
        after = page[-1][0].position
    rest = outbox.deliveries.sent(after, 1)
    return rest[0][1] if rest else None


def _unanswered(redis: Redis, heads: Sequence[EntryHead], deadline: float) -> list[EntryHead]:
    """As rq_queue.unanswered. Raises TimeoutError at the deadline, which the client's own limits are too long for."""
    answer: Future[list[EntryHead]] = Future()

    def ask() -> None:
        try:
            answer.set_result(unanswered(redis, heads))
        except Exception as error:  # raised in the caller, if it still waits
            answer.set_exception(error)

    threading.Thread(target=ask, name="history-lateness", daemon=True).start()
    return answer.result(max(deadline - time.monotonic(), 0.0))
