"""The queue and its workers: what waits, who works, what the dead have left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.utils import as_text
from rq.worker import Worker
from rq.worker_registration import get_keys

from consumers.ops.doctor.checks import Check, duration, looked
from consumers.ops.doctor.masking import Mask
from producers.redis_keys import held_key, holders_key, lease_key, strange_key, strays_key, suspects_key

_OLD_SECONDS = 300.0
_FEW_KEYS = 200_000  # looking through more would slow the server down
_PAGE_KEYS = 1000
_START = "trading-history worker"
# What has one more colon may be of a queue whose name begins with this one's.
_HOLDER = re.compile("[^:]+:[0-9a-f]{8}")


def queue_checks(redis: Redis, name: str, mask: Mask) -> Iterator[Check]:
    state = _QueueState(redis, Queue(name, connection=redis, serializer=JSONSerializer))
    looks = {
        "queue": queued,
        "workers": workers,
        "held jobs": held,
        "suspects": suspects,
        "failed jobs": failed,
        "strange entries": strange,
    }
    for title, look in looks.items():
        yield from looked(title, partial(look, state), mask, unseen=(ResponseError,))


@dataclass(frozen=True)
class _QueueState:
    redis: Redis
    queue: Queue

    @cached_property
    def holders(self) -> dict[str, bool]:
        """Who has held jobs as `<worker>:<8 hex digits of the lane>` → whether its lease stands."""
        members: Any = self.redis.hkeys(holders_key(self.queue.name))
        names = [as_text(member) for member in members]
        return {name: bool(self.redis.exists(lease_key(self.queue.name, name))) for name in names}

    @cached_property
    def worker_states(self) -> dict[str, str]:
        """RQ's workers on this queue that have not expired, by name, with the state that they tell."""
        keys = {as_text(key) for key in get_keys(queue=self.queue)}
        states: dict[str, str] = {}
        for key in sorted(keys):
            told: Any = self.redis.hmget(key, "birth", "state")
            if told[0]:
                states[key.removeprefix(Worker.redis_worker_namespace_prefix)] = as_text(told[1] or b"starting")
        return states

    @property
    def history_workers(self) -> set[str]:
        """Names of the living ones: they have a lease, stock workers have none."""
        return {name.rpartition(":")[0] for name, leased in self.holders.items() if leased}

    @property
    def stock_workers(self) -> set[str]:
        """A killed HistoryWorker is not one, although RQ lists it for two minutes more."""
        known = {name.rpartition(":")[0] for name in self.holders}
        return {name for name in self.worker_states if name not in known}


def queued(state: _QueueState) -> Iterator[Check]:
    """Depth, and how long the job at the front has waited."""
    count = state.queue.count
    if is_suspended(state.redis):
        yield Check("queue", "fail", f"{count} jobs, but RQ's workers are suspended", "rq resume")
        return
    age = _age_of_the_first(state)
    found = f"{count} jobs in {state.queue.name}" + ("" if age is None else f", the first for {duration(age)}")
    if age is not None and age > _OLD_SECONDS:
        yield Check(
            "queue", "warn", found, f"look at the lines about workers and PostgreSQL; more of {_START} may help"
        )
    else:
        yield Check("queue", "ok", found)


def _age_of_the_first(state: _QueueState) -> float | None:
    first: Any = state.redis.lindex(state.queue.key, 0)
    at: Any = state.redis.hget(Job.key_for(as_text(first)), "enqueued_at") if first else None
    if not at:
        return None
    now, _ = state.redis.time()  # the relay notes it by this clock, and this host's may be another
    return max(0.0, now - datetime.fromisoformat(as_text(at)).astimezone(UTC).timestamp())


def workers(state: _QueueState) -> Iterator[Check]:
    """How many are alive, of which kind, and whether they wait for something."""
    ours, stock = state.history_workers, state.stock_workers
    found = f"{len(ours)} of HistoryWorker, {len(stock)} of RQ's own"
    waiting = sorted(f"{name} is {told}" for name, told in state.worker_states.items() if told.startswith("waiting"))
    if not ours and not stock:
        waits = state.queue.count > 0
        yield Check("workers", "fail" if waits else "warn", "none" + " although jobs wait" * waits, _START)
    elif waiting:
        yield Check("workers", "fail", f"{found}; {'; '.join(waiting)}", "the worker's log says why it waits")
    elif not ours:
        yield Check("workers", "warn", found, f"{_START}: RQ's own are slow and fail jobs while the database is away")
    else:
        yield Check("workers", "ok", found)


def held(state: _QueueState) -> Iterator[Check]:
    """Lists of held jobs whose worker has no lease any more; a living HistoryWorker returns those in `holders`."""
    lists: dict[str, int] = {name: _length(state, name) for name in state.holders} | _unlisted(state)
    orphans = {name: count for name, count in lists.items() if count and not state.holders.get(name)}
    lost = [name for name in orphans if name not in state.holders]
    count = sum(orphans.values())
    if lost:
        keys = [held_key(state.queue.name, name) for name in lost[:3]]
        yield Check(
            "held jobs",
            "fail",
            f"{count} in lists that no worker knows: {', '.join(keys)}",
            "return the jobs to the queue, for each list again and again until nothing is left in it: "
            f"redis-cli LMOVE {keys[0]} {state.queue.key} RIGHT LEFT",
        )
    elif orphans:
        rescue = "returned within 30 s by the living worker" if state.history_workers else _START
        yield Check("held jobs", "warn" if state.history_workers else "fail", f"{count} of dead workers", rescue)
    else:
        yield Check("held jobs", "ok", f"{sum(lists.values())}, all under a lease")


def _unlisted(state: _QueueState) -> dict[str, int]:
    """Held lists whose name stands nowhere else: Redis has lost a part of its keys, or somebody has deleted it."""
    if state.redis.dbsize() > _FEW_KEYS:
        return {}
    prefix = held_key(state.queue.name, "")
    keys = state.redis.scan_iter(match=f"{prefix}*", count=_PAGE_KEYS)
    names = {as_text(key).removeprefix(prefix) for key in keys} - state.holders.keys()
    # Asked after the scan: a worker may have come since the holders were read.
    return {name: _length(state, name) for name in names if _HOLDER.fullmatch(name) and not _is_known(state, name)}


def _is_known(state: _QueueState, holder: str) -> bool:
    """Whether somebody has the list. Queues and workers may have colons in their names: by any reading of its key."""
    if state.redis.exists(lease_key(state.queue.name, holder)):
        return True
    parts = f"{state.queue.name}:{holder}".split(":")
    readings = [(":".join(parts[:n]), ":".join(parts[n:])) for n in range(1, len(parts) - 1)]
    return any(state.redis.hexists(holders_key(queue), reading) for queue, reading in readings)


def _length(state: _QueueState, holder: str) -> int:
    count: Any = state.redis.llen(held_key(state.queue.name, holder))
    return int(count)


def suspects(state: _QueueState) -> Iterator[Check]:
    """Jobs whose workers died with them."""
    deaths: Any = state.redis.hvals(suspects_key(state.queue.name))
    guilty = [int(count) for count in deaths if int(count) > 0]
    if guilty:
        found = f"{len(guilty)} jobs, with up to {max(guilty)} dead workers each"
        yield Check("suspects", "warn", found, "the logs of the workers that died; after three deaths it is rejected")
    else:
        yield Check("suspects", "ok", f"{len(deaths)} run alone, none has killed a worker" if deaths else "none")


def failed(state: _QueueState) -> Iterator[Check]:
    count = state.queue.failed_job_registry.count
    if count:
        yield Check("failed jobs", "warn", str(count), "trading-history failed list; then failed requeue or discard")
    else:
        yield Check("failed jobs", "ok", "none")


def strange(state: _QueueState) -> Iterator[Check]:
    """What stood in the queue and is no job id, and jobs that are in no list."""
    name = state.queue.name
    odd: Any = state.redis.llen(strange_key(name))
    strays: Any = state.redis.hlen(strays_key(name))
    if odd:
        yield Check(
            "strange entries",
            "warn",
            f"{odd} entries that are no job ids in {strange_key(name)}",
            "find who put them there, then delete the list",
        )
    else:
        found = f"{strays} jobs in no list: a worker returns them to the queue" if strays else "none"
        yield Check("strange entries", "ok", found)
