"""Entries of an outbox: append some, and name those in a file."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from producers.entries import Accepted
from producers.outbox import Outbox
from producers.redis_keys import job_id_of
from tests.factories import a_snapshot


def append_snapshots(outbox: Outbox, count: int = 1, after: int = 0) -> list[Accepted]:
    """Append snapshots of successive days, `after` days later than the usual one."""
    return outbox.append("trading-controller", [a_snapshot(after=timedelta(after + n)) for n in range(count)])


def job_ids_of(accepted: list[Accepted]) -> list[str]:
    return [job_id_of(one.source_id, one.sequence, one.nonce) for one in accepted]


def job_ids_at(path: Path) -> list[str]:
    """Return the job ids of the entries in the file at the path, read with a new connection."""
    with Outbox(path) as found:
        return [entry.job_id for entry in found.entries()]
