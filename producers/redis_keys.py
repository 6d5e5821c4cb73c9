"""Names in Redis: of jobs, and of keys beside RQ's own. Most are the workers'; a relay reads some of them."""

from __future__ import annotations

import re

# No number has more digits than 2^63 - 1.
_JOB_ID = re.compile(r"(?P<source_id>[0-9a-f]{1,64})-(?P<sequence>[0-9]{1,19})(-(?P<nonce>[0-9a-f]{16}))?")


def job_id_of(source_id: str, sequence: int, nonce: str = "") -> str:
    """The RQ job of one delivery. It does not name the fact: two records of one fact are two jobs.

    The nonce keeps two copies of an outbox apart, which may give the same number to different events. Entries of an
    import and of the first releases have none.
    """
    return f"{source_id}-{sequence}-{nonce}" if nonce else f"{source_id}-{sequence}"


def delivery_of(job_id: str) -> tuple[str, int, str] | None:
    """Source id, sequence and nonce of a job id as `job_id_of` makes it; None for any other."""
    found = _JOB_ID.fullmatch(job_id)
    return (found["source_id"], int(found["sequence"]), found["nonce"] or "") if found else None


def acknowledgement_key(source: str) -> str:
    """Hash of job id → acknowledgement, written by workers and read by the relays that have entries of that source."""
    return f"history:ack:{source}"


def token_key(source: str) -> str:
    """The token that the outbox of this source wrote last; a copy of the outbox has another one."""
    return f"history:outbox:{source}"


def owners_key(queue: str) -> str:
    """Hash of the worker threads that may have reservations → `alone` while one runs a poison candidate, else empty.

    The name of an owner is `<worker>:<8 hex digits>`.
    """
    return f"history:owners:{queue}"


def reserved_key(queue: str, owner: str) -> str:
    """List of the ids of the jobs that an owner has reserved."""
    return f"history:reserved:{queue}:{owner}"


def lease_key(queue: str, owner: str) -> str:
    """Exists while the owner's reservations are valid."""
    return f"history:lease:{queue}:{owner}"


def timeouts_key(queue: str) -> str:
    """Hash of job id → how often it timed out alone and was moved to the tail of the queue."""
    return f"history:timeouts:{queue}"


def crashes_key(queue: str) -> str:
    """Hash of poison candidates: job id → how many workers crashed while they ran it alone."""
    return f"history:crashes:{queue}"


def orphans_key(queue: str) -> str:
    """Hash of job id → when it was first seen in no list, in seconds since the epoch."""
    return f"history:orphans:{queue}"


def quarantine_key(queue: str) -> str:
    """List of entries of the queue that are not job ids."""
    return f"history:quarantine:{queue}"
