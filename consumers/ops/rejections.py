"""Rejected events: select, group, count and list them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from consumers.db.engine import get_db, long_read
from producers.events import KINDS

NONE = "-"  # selects rejections whose kind or source is unknown; tables show it in their place
VARIES = "…"  # in the reason of a group: a part that differs from event to event
_FETCHED_ROWS = 500

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
        for row in db.execute(statement, selection.values(), execution_options={"yield_per": _FETCHED_ROWS}):
            yield Rejection(*row)


def rejected_text(job_id: str) -> str | None:
    """Return the event's text as it was received, or None if the job is no longer rejected.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_db() as db:
        return text_of(db, job_id)


def text_of(db: Connection, job_id: str) -> str | None:
    """Return the same as `rejected_text`, within a transaction."""
    row = db.execute(_EVENT, {"job_id": job_id}).one_or_none()
    return None if row is None else row.event or ""


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
