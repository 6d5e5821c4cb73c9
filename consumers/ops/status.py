"""The pipeline at a glance: what the database holds, what the queue holds, who works, what the outbox holds."""

from __future__ import annotations

import stat
import threading
from contextlib import nullcontext
from typing import Any

from redis import Redis, RedisError
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import utcparse
from rq.worker_registration import WORKERS_BY_QUEUE_KEY
from sqlalchemy import text

from consumers.db.engine import READ_SECONDS, get_db
from consumers.db.row_counts import quick_counts
from consumers.db.waits import DatabaseWaits
from consumers.errors import StoreUnavailable
from consumers.worker.quarantine import is_wrong_type
from producers.errors import OutboxError
from producers.lateness import oldest_unacknowledged_seconds
from producers.outbox import Outbox
from producers.redis_keys import held_key, holders_key
from producers.settings import TransportSettings

_COUNTING_SECONDS = 30.0  # of a slow disk
_ANY = text("SELECT 1")


def pipeline_status() -> tuple[dict[str, Any], bool]:
    """Facts by name, and whether all parts of it can be read and at least one worker is alive.

    Counts of many rows are estimates: their names are in the fact `approximate`.
    """
    settings = TransportSettings.from_environment()
    facts: dict[str, Any] = {}
    healthy = True
    try:
        # A server that is frozen but connected sends nothing, and libpq would wait for ever.
        with DatabaseWaits(READ_SECONDS, threading.Event()).limited(), get_db() as db:
            db.execute(_ANY)
        with DatabaseWaits(_COUNTING_SECONDS, threading.Event()).limited():
            counts, approximate = quick_counts()
        facts |= {**counts, "approximate": approximate}
        facts["database"] = "reachable"
    except StoreUnavailable as error:
        facts["database"], healthy = str(error), False
    try:
        with settings.redis() as redis:
            queued = queue_facts(redis, settings.queue)
        facts |= {name: queued[name] for name in ("queued", "failed", "workers")}
        facts["redis"] = "reachable"
        healthy = healthy and facts["workers"] > 0
    except RedisError as error:
        facts["redis"], healthy = f"{type(error).__name__}: {error}", False
    try:
        if outbox := outbox_facts(settings):
            facts |= {f"outbox_{state}": outbox[state] for state in ("pending", "sent", "rejected")}
    except OutboxError as error:
        facts["outbox"], healthy = str(error), False
    return facts, healthy


def queue_facts(redis: Redis, queue_name: str) -> dict[str, Any]:
    """Jobs waiting, held by workers and failed, seconds since the oldest waiting one came, workers alive.

    Raises:
        RedisError: Redis cannot be read now.
    """
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    return {
        "queued": queue.count,
        "held": _held(redis, queue_name),
        "oldest_waiting_seconds": _waited(redis, queue),
        "failed": queue.failed_job_registry.count,
        # As RQ's Worker.count, which cannot read what is no text.
        "workers": redis.scard(WORKERS_BY_QUEUE_KEY % queue_name),
    }


def _held(redis: Redis, queue_name: str) -> int:
    """By those whose names and lists are in order; workers look after the others."""
    try:
        names: Any = redis.hkeys(holders_key(queue_name))
    except RedisError as error:
        if is_wrong_type(error):
            return 0
        raise
    with redis.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.llen(held_key(queue_name, name.decode(errors="replace")))
        lengths = pipe.execute(raise_on_error=False)
    return sum(length for length in lengths if isinstance(length, int))


def _waited(redis: Redis, queue: Queue) -> float | None:
    """Of the job at the front; None when there is none, or none that tells."""
    front: Any = redis.lindex(queue.key, 0)
    if not front:
        return None
    try:
        enqueued_at: Any = redis.hget(Job.key_for(front.decode()), "enqueued_at")
        since = utcparse(enqueued_at.decode()) if enqueued_at else None
    except (ValueError, RedisError) as error:
        if isinstance(error, RedisError) and not is_wrong_type(error):
            raise
        return None
    if since is None:
        return None
    now, _ = redis.time()  # the relay notes it by this clock, and this host's may be another
    return max(now - since.timestamp(), 0.0)


def outbox_facts(settings: TransportSettings) -> dict[str, Any] | None:
    """Entries by state and the age of the oldest that is neither settled nor acknowledged; None without an outbox.

    Raises:
        OutboxError: the outbox cannot be read.
    """
    path = settings.outbox
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error
    with Outbox(path) as outbox, nullcontext() if settings.redis_url is None else settings.redis() as redis:
        status = outbox.status()
        oldest = oldest_unacknowledged_seconds(outbox, redis)
    return {
        "pending": status.pending,
        "sent": status.sent,
        "rejected": status.rejected,
        "oldest_unsettled_seconds": oldest,
    }
