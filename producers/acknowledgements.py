"""The acknowledgement of a delivery: a worker writes it, a relay reads it.

It is a field of the hash `history:ack:<source>`; the field's name is the job id. Its value is text with three parts:
the time by Redis' clock (seconds since the epoch), the event's id (`-` if the event was unreadable), and the outcome,
which is `stored:<row id>`, `duplicate:<row id>` or `rejected:<reason>`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, cast

from producers.redis_keys import delivery_of

logger = logging.getLogger(__name__)

# Longer than a controller is off over a long weekend. A lost acknowledgement costs only a re-send.
ACKNOWLEDGEMENT_TTL_SECONDS = 7 * 24 * 3600

_END_OF_NUMBERS = 2**63  # SQLite and PostgreSQL store smaller integers only

Kind = Literal["stored", "duplicate", "rejected"]


class Outcome(NamedTuple):
    """Outcome of a delivery. `row_id` is set unless it was rejected; `reason` is set only if it was rejected."""

    kind: Kind
    row_id: int | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.reason if self.kind == 'rejected' else self.row_id}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the outcome that `str` wrote. Raises ValueError for any other text."""
        kind, colon, detail = text.partition(":")
        if kind == "rejected" and colon:
            return cls("rejected", reason=detail)
        if kind in ("stored", "duplicate") and detail.isdecimal() and int(detail) < _END_OF_NUMBERS:
            return cls(cast("Kind", kind), row_id=int(detail))
        raise ValueError(f"not an acknowledgement: {text[:60]!r}")


class Acknowledgement(NamedTuple):
    """A worker's report on one delivery. `at` is in seconds since the epoch, by Redis' clock."""

    source_id: str
    sequence: int
    nonce: str
    event_id: str | None
    outcome: Outcome
    at: int

    @classmethod
    def parse(cls, job_id: str, text: str) -> Self:
        """Read one field and its value. Raises ValueError if they are not an acknowledgement."""
        delivery = delivery_of(job_id)
        at, event_id, outcome = [*text.split(" ", 2), "", ""][:3]
        if delivery is None or delivery[1] >= _END_OF_NUMBERS or not at.isdecimal() or len(at) > 18:
            raise ValueError(f"not an acknowledgement: {text[:60]!r}")
        return cls(*delivery, None if event_id == "-" else event_id, Outcome.parse(outcome), int(at))


def acknowledgement_text(at: int, event_id: object | None, outcome: Outcome) -> str:
    """Return the value of an acknowledgement's field; `at` is Redis' time in seconds since the epoch."""
    return f"{at} {event_id or '-'} {outcome}"


def read_acknowledgements(fields: Mapping[Any, Any], source: str) -> dict[Any, Acknowledgement | None]:
    """Return the acknowledgements of this source by the hash's fields (text or bytes, as the client gives them).

    Other programs may write to the hash: a field that is not an acknowledgement is logged and gets None.
    """
    found: dict[Any, Acknowledgement | None] = {}
    for field, value in fields.items():
        job_id = shown(field)
        try:
            found[field] = Acknowledgement.parse(job_id, shown(value))
        except ValueError:  # `int` also raises it for a number of thousands of digits
            found[field] = None
            logger.warning(
                "removed field %s of %s: it is not an acknowledgement", job_id[:80], source, extra={"source": source}
            )
    return found


def shown(value: str | bytes) -> str:
    """Return a value of Redis as text, with or without `decode_responses`; invalid UTF-8 is replaced."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
