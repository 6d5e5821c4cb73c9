"""The RQ job functions. A job carries one event as one JSON string and makes one row or one recorded rejection.

They are correct under any RQ worker that uses the JSON serializer: the row is committed before it is acknowledged, and
both steps may be repeated. A stock worker imports this module in each fork, so it imports little.
"""

from __future__ import annotations

from redis import Redis, RedisError
from rq import get_current_job

from consumers.db.inserts import insert_event
from consumers.errors import first_line
from consumers.worker.batch import Deferred, EventLogger, Result, acknowledgements, logger, process_batch
from consumers.worker.deliveries import Delivery
from producers.acknowledgements import ACKNOWLEDGEMENT_TTL_SECONDS
from producers.events import Event, PortfolioSnapshotEvent, SignalArchiveEvent, decode
from producers.redis_keys import acknowledgement_key


def record_portfolio_snapshot(event: str) -> int | None:
    """Store one portfolio snapshot and return its row's id. `event` is its JSON text.

    In a job, return None for a rejected event that an operator has discarded before, or whose row was withdrawn.

    Raises:
        InvalidEvent: the event breaks the contract. In a job, the rejection is recorded.
        EventConflict: the event's id is already stored with other content. In a job, the rejection is recorded.
        EventWithdrawn: this content was withdrawn under the event's id. In a job, the rejection is recorded.
        StoreUnavailable: the database is away or cannot store the event now; its producer sends it again.
    """
    return record(event, PortfolioSnapshotEvent)


def record_signal_archive(event: str) -> int | None:
    """Store one signal archive and return its row's id, or None, as `record_portfolio_snapshot` does.

    Raises:
        HistoryError: as `record_portfolio_snapshot` does.
    """
    return record(event, SignalArchiveEvent)


def record(text: str, model: type[Event]) -> int | None:
    """Store one event and return its row's id, or None. Every job function calls this."""
    job = get_current_job()
    if job is None:  # called outside of a job: no delivery whose outcome could be recorded
        return insert_event(decode(text, model))
    ((result,),) = process_batch([Delivery(job.id, text, model)])
    if isinstance(result, Deferred):
        raise result.error
    try:
        _acknowledge(job.connection, result)
    except RedisError as error:
        # The result is committed. Without an acknowledgement, the producer sends the event again.
        message = "cannot acknowledge job %s; its producer sends the event again: %s"
        EventLogger(logger, result).warning(message, job.id, first_line(error))
    if result.error is not None and result.failed:
        raise result.error
    return result.outcome.row_id


def _acknowledge(redis: Redis, result: Result) -> None:
    seconds, _ = redis.time()  # relays compare the time with Redis' clock
    for source, (job_id, text) in acknowledgements([result]).items():
        with redis.pipeline(transaction=True) as pipe:
            pipe.hset(acknowledgement_key(source), job_id, f"{seconds} {text}")
            pipe.expire(acknowledgement_key(source), ACKNOWLEDGEMENT_TTL_SECONDS)
            pipe.execute()
