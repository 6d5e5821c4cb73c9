"""What somebody has put into Redis to fill the dashboard's memory, and how little of it is read."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ReadOnlyError
from rq.job import Job

from consumers.web.dashboard import changes
from consumers.web.dashboard.job_page import job_facts
from consumers.web.dashboard.stored_calls import line_of
from consumers.web.dashboard.stored_jobs import listed, read_job
from consumers.web.dashboard.stored_queues import read_workers
from producers.redis_keys import delays_key, held_key, holders_key, suspects_key
from tests.dashboard_server import FAILED_KEY, QUEUE_KEY, SNAPSHOT_FUNCTION, failure, plant

_MEGABYTE = 1024 * 1024
_FAILED = {"status": b"failed", "origin": b"history", "created_at": b"2026-11-22T17:02:46Z"}
_BLANKS = zlib.compress(b"[" + b" " * 60 * _MEGABYTE, 1)
_BRACKETS = b"[" + b"[]," * 2 * _MEGABYTE + b"0]"
_LISTS = zlib.compress(b'["f", null, [' + _BRACKETS + b"], {}]", 1)


def _peak(work: Callable[[], object]) -> float:
    """Megabytes."""
    work()  # imports, connections, scripts
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / _MEGABYTE
    finally:
        tracemalloc.stop()


def _lines(redis: Redis) -> list[str]:
    jobs = listed(redis, "history", "failed", offset=0, count=200, newest_first=False)[1]
    return [f"{line_of(job)} | {job.reason}" for job in jobs]


@pytest.mark.parametrize(
    "harm",
    [{"data": _BLANKS}, {"data": b"[]", "exc_info": _BLANKS}, {"data": b"[]", "meta": _BRACKETS}],
    ids=["data", "exc_info", "meta"],
)
def test_requeue_reads_nothing_that_may_be_large(redis: Redis, harm: dict[str, bytes]) -> None:
    """And changes nothing of it: whether it can be run is the worker's business."""

    def again() -> None:
        plant(redis, "j", _FAILED)
        changes.requeue(redis, "j")

    plant(redis, "j", _FAILED | harm)
    assert _peak(again) < 2
    assert redis.zcard(FAILED_KEY) == 0
    assert redis.lrange(QUEUE_KEY, 0, -1) == [b"j", b"j"]
    fields: Any = redis.hgetall(Job.key_for("j"))
    assert {name: fields[name.encode()] for name in ("data", "meta") if name in harm} == {
        name: value for name, value in harm.items() if name != "exc_info"
    }
    assert (fields[b"status"], fields[b"timeout"]) == (b"queued", b"180")


@pytest.mark.parametrize("name", ["webhooks", "dependency_ids", "retry_intervals", "description"])
def test_what_else_is_large_is_not_requeued_but_can_be_deleted(redis: Redis, name: str) -> None:
    """RQ would parse it as JSON."""
    plant(redis, "j", _FAILED | {"data": b"[]", name: _BRACKETS})

    def requeue() -> None:
        with pytest.raises(changes.NotRequeued, match="job j cannot be read: trading-history failed requeue j"):
            changes.requeue(redis, "j")

    assert _peak(requeue) < 2
    assert redis.zcard(FAILED_KEY) == 1
    assert _peak(lambda: changes.delete(redis, "j")) < 2
    assert (redis.exists(Job.key_for("j")), redis.zcard(FAILED_KEY)) == (0, 0)


def test_a_list_reads_and_parses_only_what_it_shows(redis: Redis) -> None:
    """Neither meta, nor a call beside a description, nor a large call, nor a large error."""
    small = b'["f", null, [' + b"[" + b"[]," * 20_000 + b"0]" + b"], {}]"
    planted: dict[str, tuple[dict[str, bytes], str]] = {
        "a-described": ({"data": _LISTS, "description": b"told"}, "told"),
        "b-meta": ({"data": b'["f", null, ["x"], {}]', "meta": _BRACKETS}, "f"),
        "c-lists": ({"data": _LISTS}, "f"),
        "d-large": ({"data": b'["f", null, [' + _BRACKETS + b"], {}]"}, "its data has 6,291,478 bytes"),
        "e-description": ({"data": b'["f", null, ["x"], {}]', "description": _BRACKETS}, "f"),
        "f-name": ({"data": b"[]", "description": b"x", "worker_name": _BRACKETS}, "x"),
    }
    for name, (fields, _) in planted.items():
        plant(redis, name, _FAILED | fields, result=failure("a\nno"))
    for n in range(12):
        plant(redis, f"small-{n}", _FAILED | {"data": small})
    plant(redis, "z", _FAILED, result={"type": b"2", "exc_string": b"A" * _MEGABYTE})

    shown = _lines(redis)

    assert shown[:6] == [f"{line} | no" for _, line in planted.values()]
    assert shown[6:] == ["f | no reason is kept"] * 12 + [
        "its data cannot be read as JSON | its failure cannot be read"
    ]
    assert _peak(lambda: _lines(redis)) < 8


def test_a_jobs_page_parses_what_is_large_as_a_worker_does(redis: Redis) -> None:
    """Only in the shape that is ours; and no event of more pieces than an archive has."""
    plant(redis, "lists", _FAILED | {"data": _LISTS})
    plant(redis, "blanks", _FAILED | {"data": _BLANKS})
    nested = json.dumps([SNAPSHOT_FUNCTION, None, [_BRACKETS.decode()], {}]).encode()
    plant(redis, "nested", _FAILED | {"data": zlib.compress(nested, 1)})
    told = {}
    for name in ("lists", "blanks", "nested"):
        assert _peak(lambda: told.update({name: job_facts(read_job(redis, name))})) < 110  # noqa: B023  # called at once
    calls = {name: [fact for fact in facts["job"] if fact[0] in ("function", "call")] for name, facts in told.items()}
    assert calls == {
        "lists": [
            ("function", "f"),
            ("call", "refused: its data is large, and not the call of a function with one text"),
        ],
        "blanks": [("function", "refused: its job is larger than 48 MiB")],
        "nested": [("function", SNAPSHOT_FUNCTION)],
    }
    assert told["nested"]["text"].startswith("[[],[]")
    assert told["nested"]["event"] == []


def test_the_largest_event_is_shown(redis: Redis) -> None:
    """7 MB of ü are 21 MB in a call."""
    event = {"type": "t", "subject": "s", "time": "now", "data": {"market": "ü" * 3_500_000}}
    text = json.dumps(event, ensure_ascii=False)
    plant(redis, "j", _FAILED | {"data": zlib.compress(json.dumps([SNAPSHOT_FUNCTION, None, [text], {}]).encode(), 1)})
    told = job_facts(read_job(redis, "j"))
    assert (told["title"], told["data"]) == ("s · now", [("market", "ü" * 300)])
    assert told["text"].endswith("\n… and more")


def test_a_worker_is_read_as_far_as_it_is_shown(redis: Redis) -> None:
    redis.sadd("rq:workers", "rq:worker:w")
    redis.hset("rq:worker:w", mapping={"state": "busy", "queues": _BRACKETS, "x": _BRACKETS, "current_job": "j"})
    plant(redis, "j", {"data": _LISTS})
    assert _peak(lambda: read_workers(redis)) < 2
    (worker,) = read_workers(redis)
    assert (worker["name"], worker["state"], worker["current_job"]["description"]) == ("w", "busy", "f")


def test_a_deleted_job_stands_nowhere_any_more(redis: Redis) -> None:
    """Nor in what workers have at hand and know of it, or its executions; what is of another type stays."""
    plant(redis, "j-1", _FAILED | {"data": b"[]"}, result=failure("no"))
    redis.rpush(QUEUE_KEY, "j-1")
    for holder in ("w:1", "w:2"):
        redis.hset(holders_key("history"), holder, "")
        redis.rpush(held_key("history", holder), "other", "j-1")
    redis.hset(suspects_key("history"), "j-1", 1)
    redis.set(delays_key("history"), "a string")
    redis.sadd("rq:job:j-1:dependents", "x")
    redis.sadd("rq:job::j-1:dependencies", "x")

    changes.delete(redis, "j-1")

    keys: Any = redis.keys("*")
    assert [key for key in keys if b"j-1" in key or b"j-1" in (redis.dump(key) or b"")] == []
    assert redis.lrange(held_key("history", "w:1"), 0, -1) == [b"other"]
    assert redis.get(delays_key("history")) == b"a string"


def test_what_another_dashboard_has_sent_meanwhile_is_no_failure(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go through the same list: each job is queued once, and none is called unreadable."""
    for name in ("a", "b", "harmed"):
        plant(redis, name, _FAILED | ({"data": b"[]"} if name != "harmed" else {}))
    requeue = changes.requeue

    def after_another(redis: Redis, job_id: str) -> None:
        if job_id == "b":
            requeue(redis, job_id)
        requeue(redis, job_id)

    monkeypatch.setattr(changes, "requeue", after_another)
    assert changes.requeue_all(redis, "history") == (1, 1)
    assert redis.lrange(QUEUE_KEY, 0, -1) == [b"a", b"b"]


@pytest.mark.parametrize("change", [changes.requeue, changes.delete])
def test_a_redis_that_refuses_is_not_the_jobs_fault(
    redis: Redis, change: Callable[[Redis, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a replica: nothing is said to be done, or unreadable."""

    def refuse(*_: object) -> None:
        raise ReadOnlyError("You can't write against a read only replica.")

    plant(redis, "j", _FAILED | {"data": b"[]"})
    monkeypatch.setattr(changes, "read_without", refuse)
    with pytest.raises(ReadOnlyError):
        change(redis, "j")
