"""The RQ job functions. A job carries one event as one JSON string and ends as one row or one recorded rejection.

Correct under any RQ worker that uses the JSON serializer: the row is committed before it is acknowledged, and
both may be repeated. A stock worker imports this module in each fork, so it imports little.
"""

from __future__ import annotations

from redis import RedisError
from rq import get_current_job

from consumers.db.inserts import insert_event
from consumers.worker.batch import Delivery, Unsettled, acknowledge, log_fields, logger, settle
from producers.events import Event, PortfolioSnapshotEvent, SignalArchiveEvent, decode


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
    ((end,),) = settle([Delivery(job.id, text, model)])
    if isinstance(end, Unsettled):
        raise end.error
    try:
        with job.connection.pipeline(transaction=True) as pipe:
            acknowledge(pipe, [end])
            pipe.execute()
    except RedisError as error:
        # The work is done and committed. The producer sends again what it has no acknowledgement of.
        reason = type(error).__name__
        logger.warning("job %s is done but could not be acknowledged: %s", job.id, reason, extra=log_fields(end))
    if end.error is not None:
        raise end.error
    assert end.outcome.row_id is not None
    return end.outcome.row_id
