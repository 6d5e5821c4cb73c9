"""The RQ job functions. A job carries one event as one JSON string and ends as one row or one recorded rejection.

Correct under any RQ worker that uses the JSON serializer: the row is committed before it is acknowledged, and
both may be repeated. A stock worker imports this module in each fork, so it imports little.
"""

from __future__ import annotations

from redis import Redis, RedisError
from rq import get_current_job

from consumers.db.inserts import insert_event
from consumers.worker.batch import Deferred, Result, acknowledgements, log_fields, logger, process_batch
from consumers.worker.deliveries import Delivery
from producers.acknowledgements import ACKNOWLEDGEMENT_TTL_SECONDS
from producers.events import Event, PortfolioSnapshotEvent, SignalArchiveEvent, decode
from producers.redis_keys import acknowledgement_key


def record_portfolio_snapshot(event: str) -> int:
    """Store one portfolio snapshot and return its row's id. `event` is its JSON text.

    Raises:
        InvalidEvent: it breaks the contract; the rejection is recorded when this runs as a job.
        EventConflict: its id is stored with other content; likewise.
        StoreUnavailable: the database cannot take it now; the producer will send it again.
    """
    return record(event, PortfolioSnapshotEvent)


def record_signal_archive(event: str) -> int:
    """Store one signal archive and return its row's id; raises what `record_portfolio_snapshot` raises."""
    return record(event, SignalArchiveEvent)


def record(text: str, model: type[Event]) -> int:
    """Store one event of a kind and return its row's id; the body of every job function."""
    job = get_current_job()
    if job is None:  # called by hand: there is no delivery to account for
        return insert_event(decode(text, model))
    ((result,),) = process_batch([Delivery(job.id, text, model)])
    if isinstance(result, Deferred):
        raise result.error
    try:
        _acknowledge(job.connection, result)
    except RedisError as error:
        # It is committed. The producer sends an event again if it sees no acknowledgement.
        reason = type(error).__name__
        logger.warning("job %s is done but could not be acknowledged: %s", job.id, reason, extra=log_fields(result))
    if result.error is not None:
        raise result.error
    assert result.outcome.row_id is not None
    return result.outcome.row_id


def _acknowledge(redis: Redis, result: Result) -> None:
    seconds, _ = redis.time()  # relays compare it with Redis' clock
    for source, (job_id, text) in acknowledgements([result]).items():
        with redis.pipeline(transaction=True) as pipe:
            pipe.hset(acknowledgement_key(source), job_id, f"{seconds} {text}")
            pipe.expire(acknowledgement_key(source), ACKNOWLEDGEMENT_TTL_SECONDS)
            pipe.execute()
