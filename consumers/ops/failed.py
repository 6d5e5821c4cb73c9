"""Rejected events: group, list, show, requeue and discard them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from itertools import islice
from typing import Any
from uuid import UUID

from redis import Redis
from sqlalchemy import Connection, text

from consumers.db.engine import get_db, long_read
from consumers.ops.failed_jobs import FailedJobs, LostJob
from producers.errors import HistoryError
from producers.event_kinds import EventKind
from producers.events import KINDS

NONE = "-"  # selects rejections whose kind or source is unknown; tables show it in their place
VARIES = "…"  # in the reason of a group: a part that differs from event to event
_AT_ONCE = 500
_TEXT_BYTES = 1024 * 1024  # texts of lost jobs that are in memory at once, or one larger text

# The part of an event's text before its data. In our events, it has the type. In those of other programs the type may
# come later: their kind is unknown then. A quote in a string of JSON has a backslash, so this finds only names.
_BEFORE_DATA = """
    split_part(CASE WHEN octet_length(event) > 8192 THEN left(event, 4096) ELSE event END, '"data":', 1)
"""
# Two reasons are the same if they differ only in words with a digit, such as numbers and ids, and in quoted values that
# follow a colon. Quoted names, as of a constraint, are not values.
_VALUES = r""": (?:"[^"]*"|'[^']*')"""
_WORDS = "[A-Za-z0-9_-]*[0-9][A-Za-z0-9_-]*(?:[.:][0-9][A-Za-z0-9_-]*)*"
_GROUP = "regexp_replace(regexp_replace(reason, :values, ': ' || :varies, 'g'), :words, :varies, 'g')"

_GROUPS = """
    SELECT count(*) AS count, kind,
        CASE WHEN min(reason) = max(reason) THEN min(reason) ELSE varying END AS reason,
        source, min(created_at) AS first_at, max(created_at) AS last_at, min(job_id) AS job_id
    FROM (
        SELECT job_id COLLATE "C" AS job_id, source COLLATE "C" AS source, reason COLLATE "C" AS reason, created_at,
            {kind} AS kind, {group} COLLATE "C" AS varying
        FROM ({selected}) AS selected) AS grouped
    GROUP BY kind, varying, source
    ORDER BY sum(count(*)) OVER (PARTITION BY kind, varying) DESC, varying, kind, count(*) DESC, source
"""
_EACH = """
    SELECT job_id, source, sequence, event_id, reason, {kind} AS kind, created_at FROM ({selected}) AS selected
    ORDER BY created_at, job_id
"""
_EVENT = text("SELECT event FROM event_outcomes WHERE job_id = :job_id AND outcome = 'rejected'")

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


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rejections to select; without any value, all.

    Attributes:
        name: A job id or an event id.
        kind: The name of a kind, or `-` for events whose kind is unknown.
        source: A whole source such as `bot/4e1f0a92`. Without a slash, all sources of that name; with one, all sources
            that begin so. `-` for events whose source is unknown.
        reason: A part of the reason, or of the reason of a group. Upper and lower case are the same.
        since: Only those rejected at or after this aware time.
        until: Only those rejected before this aware time.
        limit: The largest number of rejections; the oldest ones are selected.
    """

    name: str | None = None
    kind: str | None = None
    source: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    limit: int | None = None

    @property
    def is_empty(self) -> bool:
        return all(getattr(self, one.name) is None for one in fields(self))

    def sql(self) -> str:
        """Return a SELECT of the selected rows, oldest first if their number is limited; see `values`."""
        asked = {
            "(job_id = :name OR CAST(event_id AS text) = :name)": self.name,
            f"({_kind_sql()}) IS NOT DISTINCT FROM nullif(:kind, '{NONE}')": self.kind,
            _SOURCE_CONDITION: self.source,
            _REASON_CONDITION if VARIES in (self.reason or "") else _TEXT_CONDITION: self.reason,
            "created_at >= :since": self.since,
            "created_at < :until": self.until,
        }
        conditions = ["outcome = 'rejected'", *(sql for sql, value in asked.items() if value is not None)]
        rows = f"SELECT * FROM event_outcomes WHERE {' AND '.join(conditions)}"  # noqa: S608  # constants
        return rows if self.limit is None else f"{rows} ORDER BY created_at, job_id LIMIT :limit"

    def values(self) -> dict[str, Any]:
        """Return the parameters of `sql`, and of the expressions of kinds and groups."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values |= {name: at and at.astimezone(UTC) for name in ("since", "until") if (at := values[name])}
        return values | {"values": _VALUES, "words": _WORDS, "varies": VARIES} | _types()


ALL = Selection()

_SOURCE_CONDITION = f"""
    CASE WHEN :source = '{NONE}' THEN source IS NULL ELSE source = :source
        OR starts_with(source, :source || CASE WHEN strpos(:source, '/') > 0 THEN '' ELSE '/' END) END
"""
_TEXT_CONDITION = "strpos(lower(reason), lower(:reason)) > 0"
_REASON_CONDITION = f"({_TEXT_CONDITION} OR strpos(lower({_GROUP}), lower(:reason)) > 0)"


def _kind_sql() -> str:
    """Return the SQL expression for the name of an event's kind, which reads only the beginning of its text."""
    cases = (f"WHEN {_has_type(n)} THEN '{kind.name}'" for n, kind in enumerate(KINDS.values()))
    return f"CASE {' '.join(cases)} END"


def _has_type(number: int) -> str:
    return " OR ".join(f"strpos({_BEFORE_DATA}, :type_{number}{form}) > 0" for form in ("", "_spaced"))


def _types() -> dict[str, str]:
    """Return the types of all kinds as members of a JSON object, without a space behind the colon and with one."""
    types = [*enumerate(KINDS)]
    spaced = {f"type_{n}_spaced": f'"type": "{event_type}"' for n, event_type in types}
    return {f"type_{n}": f'"type":"{event_type}"' for n, event_type in types} | spaced


@dataclass(frozen=True)
class Rejection:
    """One rejected delivery and its reason, without the event's text, which may be large: see `rejected_text`.

    `kind` is the name of the event's kind, such as `snapshot`, or None if the beginning of the text does not name it.
    """

    job_id: str
    source: str | None
    sequence: int | None
    event_id: UUID | None
    reason: str
    kind: str | None
    created_at: datetime


@dataclass(frozen=True)
class RejectionGroup:
    """Rejections of one kind and source with the same reason.

    Their texts may differ in numbers, ids and values: `reason` has … in their place then. `first_at` and `last_at` are
    the times of the first and the last rejection. `job_id` is one of the jobs.
    """

    count: int
    kind: str | None
    reason: str
    source: str | None
    first_at: datetime
    last_at: datetime
    job_id: str


def rejection_groups(selection: Selection = ALL) -> list[RejectionGroup]:
    """Return the groups of the selected rejections: first the reason with the most, in it the source with the most.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    statement = _GROUPS.format(kind=_kind_sql(), group=_GROUP, selected=selection.sql())
    with long_read() as db:
        return [RejectionGroup(*row) for row in db.execute(text(statement), selection.values())]


def count_rejections(selection: Selection = ALL) -> int:
    """Return the number of selected rejections.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with long_read() as db:
        found: int = db.execute(
            text(f"SELECT count(*) FROM ({selection.sql()}) AS selected"),  # noqa: S608  # from constants
            selection.values(),
        ).scalar_one()
    return found


def rejections(selection: Selection = ALL) -> Iterator[Rejection]:
    """Yield the selected rejections of one moment, oldest first.

    They are read in batches of 500, so that memory does not grow with their number.

    Raises:
        StoreUnavailable: the database cannot be read, at the start or while the caller iterates.
    """
    statement = text(_EACH.format(kind=_kind_sql(), selected=selection.sql()))
    with long_read() as db:
        for row in db.execute(statement, selection.values(), execution_options={"yield_per": _AT_ONCE}):
            yield Rejection(*row)


def rejected_text(job_id: str) -> str | None:
    """Return the event's text as it was received, or None if the job is no longer rejected.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_db() as db:
        row = db.execute(_EVENT, {"job_id": job_id}).one_or_none()
    return None if row is None else row.event or ""


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
        event = db.execute(_EVENT, {"job_id": job_id}).scalar_one() or ""
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


def as_dict(rejection: Rejection) -> dict[str, Any]:
    """Return the rejection as a dict for JSON and tables."""
    return {
        "job_id": rejection.job_id,
        "kind": rejection.kind,
        "event_id": rejection.event_id and str(rejection.event_id),
        "source": rejection.source,
        "sequence": rejection.sequence,
        "reason": rejection.reason,
        "created_at": rejection.created_at,
    }
