"""Requeue and discard rejected events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from redis import Redis
from sqlalchemy import Connection, text

from consumers.db.engine import get_db
from consumers.ops.failed_jobs import FailedJobs, LostJob
from consumers.ops.rejections import Rejection, text_of
from producers.errors import HistoryError
from producers.event_kinds import EventKind
from producers.events import KINDS

_AT_ONCE = 500
_TEXT_BYTES = 1024 * 1024  # texts of lost jobs that are in memory at once, or one larger text

# Rows are locked in the order in which workers insert outcomes: another order could cause deadlocks.
# An event that was rejected again since it was chosen has another time, and perhaps a reason that nobody has chosen.
_LOCK = text("""
    SELECT outcomes.job_id, coalesce(octet_length(outcomes.event), 0) AS bytes
    FROM event_outcomes AS outcomes
    JOIN unnest(CAST(:job_ids AS text[]), CAST(:times AS timestamptz[])) AS chosen (job_id, created_at)
        ON chosen.job_id = outcomes.job_id AND chosen.created_at = outcomes.created_at
    WHERE outcomes.outcome = 'rejected' ORDER BY outcomes.job_id FOR UPDATE OF outcomes
""")
_DISCARD = text("""
    UPDATE event_outcomes SET outcome = 'discarded', reason = :reason || '; it was rejected: ' || reason, actor = :actor
    WHERE job_id = ANY (:job_ids)
""")

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def requeue(
    chosen: Iterable[Rejection],
    redis: Redis,
    queue_name: str,
    *,
    on_progress: Callable[[int], object] = lambda _: None,
) -> int:
    """Requeue the chosen rejections under their job ids. If an event is then stored, its rejection is removed.

    A process that is killed has requeued whole batches of 500. Jobs that are queued already stay as they are, so that
    the same call continues its work. Its rows are locked meanwhile: no other operator discards or requeues them.

    Args:
        on_progress: Called after each batch with the number of rejections that were looked at.

    Returns:
        The number of requeued jobs. An event that was stored, discarded or rejected again since it was chosen is not
        requeued.

    Raises:
        HistoryError: for some jobs, Redis no longer has them and the recorded text is not an event. All others were
            requeued.
    """
    jobs = FailedJobs(redis, queue_name)
    requeued, done, unusable = 0, 0, list[str]()
    for some in _batches(chosen):
        with get_db() as db:
            sizes = _locked(db, some)
            moved, lost = jobs.requeue([one.job_id for one in some if one.job_id in sizes])
            requeued += moved
            for few in _with_bounded_texts(lost, sizes):
                found = _lost_jobs(db, few)
                jobs.enqueue_anew(found)
                requeued += len(found)
                unusable += sorted({*few} - {one.job_id for one in found})
        done += len(some)
        on_progress(done)
    if unusable:
        raise HistoryError(_cannot_be_requeued(unusable, requeued))
    return requeued


def _cannot_be_requeued(job_ids: Sequence[str], requeued: int) -> str:
    them, more = ("it", "") if len(job_ids) == 1 else ("them", f" and {len(job_ids) - 1:,} more")
    others = f"; {requeued:,} others were requeued" if requeued else ""
    return (
        f"job {job_ids[0]}{more} cannot be requeued: Redis no longer has {them}, and the recorded text is not an event;"
        f" discard {them} with trading-history failed discard{others}"
    )


def _lost_jobs(db: Connection, job_ids: Sequence[str]) -> list[LostJob]:
    """Return job function and text of the jobs whose recorded text is an event."""
    found = []
    for job_id in job_ids:
        event = text_of(db, job_id) or ""
        kind = kind_of(event)
        if kind is not None:
            found.append(LostJob(job_id, kind.job_function, event))
    return found


def _with_bounded_texts(job_ids: Iterable[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    """Yield the job ids in lists whose texts have at most _TEXT_BYTES together, or of one job."""
    some, total = list[str](), 0
    for job_id in job_ids:
        if some and total + sizes[job_id] > _TEXT_BYTES:
            yield some
            some, total = [], 0
        some.append(job_id)
        total += sizes[job_id]
    if some:
        yield some


def discard(
    chosen: Iterable[Rejection],
    redis: Redis,
    queue_name: str,
    reason: str,
    actor: str | None = None,
    *,
    even_waiting: bool = True,
    on_progress: Callable[[int], object] = lambda _: None,
) -> int:
    """Discard the chosen rejections and delete their jobs. Text, `reason` and `actor` stay in event_outcomes.

    A process that is killed has discarded whole batches of 500, and may have deleted the jobs of the next one, whose
    events are still rejected. The same call continues its work.

    Args:
        even_waiting: Whether to discard also events whose jobs wait or run, since somebody has requeued them.
        on_progress: Called after each batch with the number of rejections that were looked at.

    Returns:
        The number of discarded rejections. An event that was stored, discarded or rejected again since it was chosen
        is left unchanged.
    """
    jobs = FailedJobs(redis, queue_name)
    discarded, done = 0, 0
    for some in _batches(chosen):
        with get_db() as db:
            # First: if the process dies before the commit, the events are still rejected, and can be discarded again.
            deleted = jobs.delete([*_locked(db, some)], even_waiting=even_waiting)
            db.execute(_DISCARD, {"job_ids": deleted, "reason": reason, "actor": actor})
        discarded += len(deleted)
        done += len(some)
        on_progress(done)
    return discarded


def _batches(chosen: Iterable[Rejection]) -> Iterator[list[Rejection]]:
    left = iter(chosen)
    while some := list(islice(left, _AT_ONCE)):
        yield some


def _locked(db: Connection, chosen: Sequence[Rejection]) -> dict[str, int]:
    """Lock the outcomes that are as they were chosen, and return the sizes of their texts in bytes, by job id."""
    given = {"job_ids": [one.job_id for one in chosen], "times": [one.created_at for one in chosen]}
    return {row.job_id: row.bytes for row in db.execute(_LOCK, given)}


def kind_of(beginning: str) -> EventKind | None:
    """Return the kind of an event from the beginning of its text, or None if this part does not name it."""
    try:
        event_type = _type_of(beginning)
    except (ValueError, RecursionError):
        return None
    return KINDS.get(event_type) if isinstance(event_type, str) else None


def _type_of(beginning: str) -> Any:
    """Return the member `type` of the JSON object with this beginning. Raises ValueError if it is not in this part."""
    place = _behind("{", beginning, 0)
    while True:
        name, place = _DECODER.raw_decode(beginning, place)
        value, place = _DECODER.raw_decode(beginning, _behind(":", beginning, place))
        if name == "type":
            return value
        place = _behind(",", beginning, place)


def _behind(sign: str, beginning: str, place: int) -> int:
    """Skip `sign` and the spaces around it, and return the place behind them. Raises ValueError if it is not there."""
    place = _after_space(beginning, place)
    if not beginning.startswith(sign, place):
        raise ValueError(f"no {sign} at {place}")
    return _after_space(beginning, place + 1)


def _after_space(beginning: str, place: int) -> int:
    space = _SPACE.match(beginning, place)
    assert space is not None
    return space.end()
