"""Ids of jobs, and names of the Redis keys that this project adds to RQ's. Workers write most of them.

The keys begin with `history:`. If RQ's keys have another prefix than `rq` (RQ_KEY_PREFIX), that prefix and a colon
precede `history:`.
"""

from __future__ import annotations

import os
import re

_DEFAULT = "rq"
# Read at import, as RQ does. RQ itself is not imported here: that would slow down commands.
_GIVEN = os.environ.get("RQ_KEY_PREFIX", _DEFAULT)
KEY_PREFIX = None if _GIVEN == _DEFAULT else _GIVEN  # None: RQ's default


def key_prefix_problem(error: ValueError) -> str:
    """Return what to do about the error with which RQ refuses RQ_KEY_PREFIX when it is imported."""
    return "RQ_KEY_PREFIX is empty, which RQ does not accept: unset it" if _GIVEN == "" else str(error)


_HISTORY = "history" if KEY_PREFIX is None else f"{KEY_PREFIX}:history"

# A sequence is less than 2^63, so it has at most 19 digits.
_JOB_ID = re.compile(r"(?P<source_id>[0-9a-f]{1,64})-(?P<sequence>[0-9]{1,19})(-(?P<nonce>[0-9a-f]{16}))?")


def job_id_of(source_id: str, sequence: int, nonce: str = "") -> str:
    """Return the id of the RQ job of one delivery. If a fact is recorded twice, it has two jobs.

    The nonce makes ids of two copies of an outbox differ, because they can give the same number to different events.
    Entries of an import and of earlier versions have no nonce.
    """
    return f"{source_id}-{sequence}-{nonce}" if nonce else f"{source_id}-{sequence}"


def delivery_of(job_id: str) -> tuple[str, int, str] | None:
    """Return source id, sequence and nonce ("" if absent) of a job id made by `job_id_of`; None for any other id."""
    found = _JOB_ID.fullmatch(job_id)
    return (found["source_id"], int(found["sequence"]), found["nonce"] or "") if found else None


def acknowledgement_key(source: str) -> str:
    """Hash of job id → acknowledgement. Workers write it; relays that have entries of that source read it."""
    return f"{_HISTORY}:ack:{source}"


def token_key(source: str) -> str:
    """Token that the outbox of this source wrote last. A copy of the outbox has a different token."""
    return f"{_HISTORY}:outbox:{source}"


def owners_key(queue: str) -> str:
    """Hash of owner → `alone` while that worker thread runs a poison candidate, otherwise empty.

    It contains all worker threads that may have reservations. The name of an owner is `<worker>:<8 hex digits>`.
    """
    return f"{_HISTORY}:owners:{queue}"


def reserved_key(queue: str, owner: str) -> str:
    """List of the ids of the jobs that an owner has reserved."""
    return f"{_HISTORY}:reserved:{queue}:{owner}"


def lease_key(queue: str, owner: str) -> str:
    """Lease of an owner. The key exists while the owner's reservations are valid."""
    return f"{_HISTORY}:lease:{queue}:{owner}"


def timeouts_key(queue: str) -> str:
    """Hash of job id → number of times that the job timed out alone and was moved to the tail of the queue."""
    return f"{_HISTORY}:timeouts:{queue}"


def crashes_key(queue: str) -> str:
    """Hash of poison candidates: job id → number of workers that crashed while they ran it alone."""
    return f"{_HISTORY}:crashes:{queue}"


def orphans_key(queue: str) -> str:
    """Hash of orphans: job id → time at which it was first seen in no list, in seconds since the epoch."""
    return f"{_HISTORY}:orphans:{queue}"


def quarantine_key(queue: str) -> str:
    """List of quarantined items of the queue that are not job ids."""
    return f"{_HISTORY}:quarantine:{queue}"
