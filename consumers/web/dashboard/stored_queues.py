"""Queues and workers as Redis has them, in whatever state."""

from __future__ import annotations

from typing import Any

from redis import Redis, ResponseError
from rq import Queue, Worker

from consumers.errors import is_wrong_type
from consumers.web.dashboard.bounded import FIELD_BYTES, PAGE_BYTES, read_hash
from consumers.web.dashboard.stored_calls import line_of
from consumers.web.dashboard.stored_jobs import REGISTRIES, read_job, registry_key, shown
from producers.redis_keys import held_key, holders_key

_WORKER_LIMITS = dict.fromkeys(("state", "queues", "current_job", "version", "python_version"), FIELD_BYTES)


def queue_names(redis: Redis) -> list[str]:
    """Sorted; what is no queue's key is left out."""
    keys: Any = redis.smembers(Queue.redis_queues_keys)
    prefix = Queue.redis_queue_namespace_prefix
    return sorted(key.removeprefix(prefix) for key in map(shown, keys) if key.startswith(prefix) and key != prefix)


def read_queues(redis: Redis) -> list[tuple[str, dict[str, int | str]]]:
    """Each queue with how many jobs wait in it (`queued`) and are in each of its registries; `?` where none can be."""
    found = []
    for name in queue_names(redis):
        with redis.pipeline(transaction=False) as pipe:
            pipe.llen(Queue.redis_queue_namespace_prefix + name)
            for registry_name in REGISTRIES:
                pipe.zcard(registry_key(name, registry_name))
            answers = pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception) and not is_wrong_type(answer):
                raise answer
        counts = ["?" if isinstance(answer, Exception) else answer for answer in answers]
        found.append((name, dict(zip(("queued", *REGISTRIES), counts, strict=True))))
    return found


def read_workers(redis: Redis) -> list[dict[str, Any]]:
    """Each as the page of workers wants it, sorted."""
    found = []
    keys: Any = redis.smembers(Worker.redis_workers_keys)
    for key in keys:
        stored = read_hash(redis, key, _WORKER_LIMITS)
        if stored and stored.exists:  # one that is gone without a word keeps its key in the set for a while
            facts = {name: shown(value) for name, value in stored.fields.items()}
            found.append(_worker(redis, shown(key).removeprefix(Worker.redis_worker_namespace_prefix), facts))
    return sorted(found, key=lambda one: (one["state"], one["queues"], one["name"]))


def _worker(redis: Redis, name: str, facts: dict[str, str]) -> dict[str, Any]:
    queues = [queue for queue in facts.get("queues", "").split(",") if queue]
    return {
        "name": name,
        "state": facts.get("state", "?"),
        "queues": queues,
        "current_job": _work(redis, name, queues, facts),
        "version": facts.get("version", ""),
        "python_version": facts.get("python_version", ""),
    }


def _work(redis: Redis, name: str, queues: list[str], facts: dict[str, str]) -> str | dict[str, str | None]:
    """The job at hand, or what else it does. A HistoryWorker has not one job at hand but batches of them."""
    if job_id := facts.get("current_job"):
        job = read_job(redis, job_id, data_bytes=PAGE_BYTES)
        return {
            "job_id": job_id,
            "description": (line := line_of(job)),
            "call_string": line,
            "created_at": job.text("created_at"),
        }
    held = sum(_held(redis, queue, name) for queue in queues)
    return f"{held:,} at hand" if held else facts.get("state", "?")


def _held(redis: Redis, queue: str, worker: str) -> int:
    try:
        holders: Any = redis.hkeys(holders_key(queue))
        # One for each of its lanes.
        mine = [holder for holder in map(shown, holders) if holder.rpartition(":")[0] == worker]
        return sum(redis.llen(held_key(queue, holder)) for holder in mine)
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        return 0
