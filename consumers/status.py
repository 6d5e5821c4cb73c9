"""The pipeline at a glance: what the database holds, what the queue holds, who works, what the outbox holds."""

from __future__ import annotations

from typing import Any

from redis import RedisError
from rq import Queue, Worker
from rq.serializers import JSONSerializer
from sqlalchemy import text

from consumers.connection import get_db
from consumers.errors import StoreUnavailable
from producers.outbox import Outbox
from producers.settings import TransportSettings

_COUNTS = text("""
    SELECT (SELECT count(*) FROM portfolio_history) AS portfolio_snapshots,
        (SELECT count(*) FROM signal_archives) AS signal_archives,
        (SELECT count(*) FROM event_outcomes WHERE outcome = 'absorbed') AS absorbed,
        (SELECT count(*) FROM event_outcomes WHERE outcome = 'rejected') AS rejected
""")


def pipeline_status() -> tuple[dict[str, Any], bool]:
    """Facts by name, and whether both servers answer and at least one worker is alive."""
    settings = TransportSettings.from_environment()
    facts: dict[str, Any] = {}
    healthy = True
    try:
        facts |= database_counts()
        facts["database"] = "reachable"
    except StoreUnavailable as error:
        facts["database"], healthy = str(error), False
    try:
        redis = settings.redis()
        queue = Queue(settings.queue, connection=redis, serializer=JSONSerializer)
        facts |= {
            "queued": queue.count,
            "failed": queue.failed_job_registry.count,
            "workers": Worker.count(queue=queue),
        }
        facts["redis"] = "reachable"
        healthy = healthy and facts["workers"] > 0
    except RedisError as error:
        facts["redis"], healthy = f"{type(error).__name__}: {error}", False
    if settings.outbox.is_file():
        with Outbox(settings.outbox) as opened:
            outbox = opened.status()
        facts |= {
            "outbox_pending": outbox.pending,
            "outbox_sent": outbox.sent,
            "outbox_rejected": outbox.rejected,
        }
    return facts, healthy


def database_counts() -> dict[str, int]:
    """Rows of each table, and deliveries that did not become one. Raises StoreUnavailable."""
    with get_db() as db:
        return dict(db.execute(_COUNTS).mappings().one())
