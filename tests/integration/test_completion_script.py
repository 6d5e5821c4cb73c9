"""The script that completes jobs, with a real Redis: its effect on RQ's keys and on ours, for each kind of job."""

from __future__ import annotations

import json
from typing import Any

import pytest
from redis import Redis

from consumers.worker import scripts

RESERVED, CRASHES, TIMEOUTS = "reserved", "crashes", "timeouts"
FINISHED, FAILED, WORKER = "rq:finished:history", "rq:failed:history", "rq:worker:one"
NOW = 1000
RESULT = ["worker_name", "one"]


def complete(
    redis: Redis, *released: str, sources: tuple[str, ...] = (), calls: tuple[bytes, ...] = (), **given: Any
) -> Any:
    """Run the script. Returns the keys that were quarantined, the ids that stay reserved, and the errors."""
    document = {
        "job_prefix": "rq:job:",
        "result_prefix": "rq:results:",
        "released": released,
        "acknowledgements": [],
        "acknowledged_seconds": 600,
        "forgotten": [],
        "finished": [],
        "failed": [],
        "job": ["status", "finished", "worker_name", "one"],
        "result": RESULT,
        "now": NOW,
        "kept_jobs": 100,
        "waited_for_seconds": 300,
    }
    keys = [RESERVED, CRASHES, TIMEOUTS, FINISHED, FAILED, WORKER, *sources]
    found: Any = scripts.load(redis, "complete")(keys=keys, args=[json.dumps(document | given), *calls])
    quarantined, still_reserved, errors = ([item.decode() for item in items] for items in found)
    return quarantined, still_reserved, errors


def a_job(redis: Redis, *job_ids: str, dependents: bool = False, **fields: str) -> None:
    """Write reserved jobs with an expiry of 50 seconds, as a producer's job may have."""
    for job_id in job_ids:
        written: dict[Any, Any] = {"status": "queued", "data": "call"} | fields
        redis.hset(f"rq:job:{job_id}", mapping=written)
        redis.expire(f"rq:job:{job_id}", 50)
        redis.rpush(RESERVED, job_id)
        if dependents:
            redis.sadd(f"rq:job:{job_id}:dependents", "dependent")


def failure(job_id: str, *, ttl: int = 500, **given: Any) -> dict[str, Any]:
    fields = {"fields": ["status", "failed"], "result": ["type", "2"], "expires_results": True}
    return {"id": job_id, "ttl": ttl} | fields | given


def listed(redis: Redis, key: str) -> list[str]:
    found: Any = redis.lrange(key, 0, -1)
    return [item.decode() for item in found]


def test_each_source_gets_its_acknowledgements_with_the_time_of_redis(redis: Redis) -> None:
    """The hash expires, unless more acknowledgements follow."""
    acknowledged = [["a", "id-1 stored:1", "b", "id-2 stored:2"], ["c", "id-3 stored:3"]]
    before = redis.time()[0]
    complete(redis, sources=("ack:1", "ack:2"), acknowledgements=acknowledged)
    for key, texts in (("ack:1", {b"a": "id-1 stored:1", b"b": "id-2 stored:2"}), ("ack:2", {b"c": "id-3 stored:3"})):
        found: Any = redis.hgetall(key)
        times = {name: int(value.split()[0]) for name, value in found.items()}
        assert {name: value.decode().partition(" ")[2] for name, value in found.items()} == texts
        assert all(before <= at <= redis.time()[0] for at in times.values())
        assert 590 < redis.ttl(key) <= 600


@pytest.mark.parametrize(("before", "after"), [([], []), (["x"], ["y"]), ([], ["y"]), (["x"], [])])
def test_released_jobs_leave_the_reserved_list_and_lose_their_counts(
    redis: Redis, before: list[str], after: list[str]
) -> None:
    """Other reserved jobs keep their place, and the counts of other jobs stay."""
    redis.rpush(RESERVED, *before, "a", "b", *after)
    for counts in (CRASHES, TIMEOUTS):
        redis.hset(counts, mapping={"a": 1, "b": 2, "other": 3})
    assert complete(redis, "a", "b") == ([], [], [])
    assert listed(redis, RESERVED) == [*before, *after]
    assert redis.hgetall(CRASHES) == redis.hgetall(TIMEOUTS) == {b"other": b"3"}


def test_a_job_that_was_reserved_twice_is_released_once_per_delivery(redis: Redis) -> None:
    """The second delivery is released by its own completion."""
    redis.rpush(RESERVED, "a", "b", "a")
    complete(redis, "a")
    assert listed(redis, RESERVED) == ["b", "a"]


def test_a_forgotten_job_leaves_no_key(redis: Redis) -> None:
    """Nor is it in a registry: it may have been requeued after it had failed."""
    a_job(redis, "a", "b")
    for key in ("rq:results:a", "rq:job::a:dependencies"):
        redis.set(key, "x")
    redis.zadd(FAILED, {"a": -1, "b": -1})
    assert complete(redis, "a", "b", forgotten=["a", "b"]) == ([], [], [])
    assert redis.keys("*") == []


@pytest.mark.parametrize(("ttl", "score"), [(500, NOW + 500), (-1, float("inf"))])
def test_a_finished_job_keeps_its_result_for_its_ttl(redis: Redis, ttl: int, score: float) -> None:
    """It is in the registry of finished jobs and no longer in that of failed ones. A negative ttl is no expiry."""
    a_job(redis, "a")
    redis.zadd(FAILED, {"a": -1})
    redis.sadd("rq:job::a:dependencies", "x")
    redis.xadd("rq:results:a", {"type": "2"})
    redis.expire("rq:results:a", 50)
    complete(redis, "a", finished=[{"id": "a", "ttl": ttl, "result": "MQ=="}])

    assert redis.hgetall("rq:job:a") == {b"status": b"finished", b"data": b"call", b"worker_name": b"one"}
    entries: Any = redis.xrange("rq:results:a")
    assert entries[-1][1] == {b"type": b"1", b"return_value": b"MQ==", b"worker_name": b"one"}
    assert (redis.zrange(FINISHED, 0, -1, withscores=True), redis.exists(FAILED)) == ([(b"a", score)], 0)
    for key in ("rq:job:a", "rq:results:a"):
        assert (490 < redis.ttl(key) <= 500) if ttl > 0 else (redis.ttl(key) == -1)
    assert ttl < 0 or redis.ttl("rq:job::a:dependencies") > 490


def test_a_finished_job_with_a_ttl_of_one_second_expires(redis: Redis) -> None:
    """It is the smallest ttl of a job that is kept."""
    a_job(redis, "a")
    complete(redis, "a", finished=[{"id": "a", "ttl": 1, "result": "MQ=="}])
    assert redis.zscore(FINISHED, "a") == NOW + 1
    assert -1 not in (redis.ttl("rq:job:a"), redis.ttl("rq:results:a"))


def test_a_job_has_at_most_ten_results(redis: Redis) -> None:
    """The newest are kept."""
    a_job(redis, "a")
    for number in range(20):
        redis.xadd("rq:results:a", {"number": number})
    complete(redis, "a", finished=[{"id": "a", "ttl": 900, "result": "MQ=="}])
    entries: Any = redis.xrange("rq:results:a")
    assert (len(entries), entries[0][1]) == (10, {b"number": b"11"})


def test_a_finished_job_that_was_deleted_is_not_written_again(redis: Redis) -> None:
    """Without its other fields RQ could not read it."""
    complete(redis, "a", finished=[{"id": "a", "ttl": 500, "result": "MQ=="}])
    assert redis.keys("*") == []


@pytest.mark.parametrize(("ttl", "score", "expiry"), [(500, NOW + 500, 500), (0, NOW, None), (-1, -1, -1)])
def test_a_failed_job_keeps_its_result_for_its_ttl(redis: Redis, ttl: int, score: int, expiry: int | None) -> None:
    """The fields that are not written stay, and an expiry of the queue ends. At a ttl of 0 its keys are deleted."""
    a_job(redis, "a")
    redis.xadd("rq:results:a", {"type": "1"})
    redis.expire("rq:results:a", 50)
    complete(redis, "a", failed=[failure("a", ttl=ttl)])

    assert redis.zrange(FAILED, 0, -1, withscores=True) == [(b"a", score)]
    assert listed(redis, RESERVED) == []
    if expiry is None:
        assert redis.exists("rq:job:a", "rq:results:a") == 0
        return
    assert redis.hgetall("rq:job:a") == {b"status": b"failed", b"data": b"call"}
    entries: Any = redis.xrange("rq:results:a")
    assert entries[-1][1] == {b"type": b"2"}
    for key in ("rq:job:a", "rq:results:a"):
        assert expiry - 10 < redis.ttl(key) <= expiry if expiry > 0 else redis.ttl(key) == -1


def test_the_results_of_a_failed_job_keep_their_expiry_if_the_job_has_no_own_ttl(redis: Redis) -> None:
    """RQ does the same."""
    a_job(redis, "a")
    redis.xadd("rq:results:a", {"type": "1"})
    redis.expire("rq:results:a", 50)
    complete(redis, "a", failed=[failure("a", expires_results=False)])
    assert 0 < redis.ttl("rq:results:a") <= 50 < redis.ttl("rq:job:a")


def test_a_failed_job_gets_the_call_at_its_index(redis: Redis) -> None:
    """A job without an index keeps its own call."""
    a_job(redis, "a", "b", "c")
    calls = (b"\xff first", b"second")
    complete(redis, "a", "b", "c", calls=calls, failed=[failure("a", call=3), failure("b"), failure("c", call=2)])
    assert [redis.hget(f"rq:job:{one}", "data") for one in "abc"] == [b"second", b"call", b"\xff first"]


@pytest.mark.parametrize("is_hash", [True, False])
def test_a_placeholder_replaces_the_fields_of_an_unreadable_job(redis: Redis, is_hash: bool) -> None:
    """A key of another type is replaced in any case."""
    a_job(redis, "a", timeout="abc")
    if not is_hash:
        redis.delete("rq:job:a")
        redis.set("rq:job:a", "x")
    complete(redis, "a", failed=[failure("a", is_placeholder=is_hash)])
    assert redis.hgetall("rq:job:a") == {b"status": b"failed"}


def test_results_of_another_type_are_replaced(redis: Redis) -> None:
    """Otherwise the reason of the failure would be lost."""
    a_job(redis, "a")
    redis.set("rq:results:a", "x")
    assert complete(redis, "a", failed=[failure("a")])[2] == []
    entries: Any = redis.xrange("rq:results:a")
    assert [fields for _, fields in entries] == [{b"type": b"2"}]


def test_a_job_without_fields_is_only_listed_as_failed(redis: Redis) -> None:
    """This is for a job whose records cannot be written."""
    a_job(redis, "a", dependents=True)
    assert complete(redis, "a", failed=[failure("a", ttl=-1, fields=[])]) == ([], [], [])
    assert redis.zrange(FAILED, 0, -1) == [b"a"]
    assert redis.hget("rq:job:a", "status") == b"queued"
    assert 0 < redis.ttl("rq:job:a") <= 50


@pytest.mark.parametrize("ttl", [50, 5000])
def test_a_job_with_dependents_stays_reserved_and_readable_until_they_are_enqueued(redis: Redis, ttl: int) -> None:
    """That holds for forgotten, finished and failed jobs: for at least 300 seconds, and as long as their ttl."""
    a_job(redis, "forgotten", "finished", "failed", dependents=True)
    a_job(redis, "without")
    found = complete(
        redis,
        *("forgotten", "finished", "failed", "without"),
        forgotten=["forgotten"],
        finished=[{"id": "finished", "ttl": ttl, "result": "MQ=="}, {"id": "without", "ttl": ttl, "result": "MQ=="}],
        failed=[failure("failed", ttl=ttl)],
    )
    assert found == ([], ["forgotten", "finished", "failed"], [])
    assert listed(redis, RESERVED) == ["forgotten", "finished", "failed"]
    statuses = [redis.hget(f"rq:job:{one}", "status") for one in ("forgotten", "finished", "failed")]
    assert statuses == [b"finished", b"finished", b"failed"]
    assert 290 < redis.ttl("rq:job:forgotten") <= 300
    for key in ("rq:job:finished", "rq:job:failed", "rq:job:finished:dependents", "rq:job:failed:dependents"):
        assert max(ttl, 300) - 10 < redis.ttl(key) <= max(ttl, 300)
    assert ttl - 10 < redis.ttl("rq:job:without") <= ttl
    assert ttl - 10 < redis.ttl("rq:results:failed") <= ttl


def test_a_job_with_dependents_that_is_completed_alone_stays_reserved(redis: Redis) -> None:
    """As one of many does."""
    a_job(redis, "a", dependents=True)
    assert complete(redis, "a", forgotten=["a"]) == ([], ["a"], [])
    assert listed(redis, RESERVED) == ["a"]


def test_a_failed_job_with_a_slot_of_a_rate_limit_stays_reserved(redis: Redis) -> None:
    """Until RQ has freed the slot."""
    a_job(redis, "a", "b")
    assert complete(redis, "a", "b", failed=[failure("a", keep_reserved=True, ttl=5), failure("b")])[1] == ["a"]
    assert listed(redis, RESERVED) == ["a"]
    assert 290 < redis.ttl("rq:job:a") <= 300


def test_a_forgotten_job_with_dependents_that_was_deleted_is_released(redis: Redis) -> None:
    """Its status cannot be written any more."""
    redis.sadd("rq:job:a:dependents", "dependent")
    assert complete(redis, "a", forgotten=["a"]) == ([], [], [])
    assert redis.keys("rq:job:a") == redis.keys(RESERVED) == []


def test_the_oldest_finished_jobs_beyond_the_maximum_are_deleted(redis: Redis) -> None:
    """A job without an expiry does not count. A job that was enqueued again is only removed from the registry."""
    for number, job_id in enumerate(("oldest", "again", "older", "new")):
        redis.hset(f"rq:job:{job_id}", "status", "queued" if job_id == "again" else "finished")
        redis.xadd(f"rq:results:{job_id}", {"type": "1"})
        redis.zadd(FINISHED, {job_id: NOW + number})
    redis.zadd(FINISHED, {"forever": float("inf")})
    a_job(redis, "a", "b")
    complete(redis, "a", "b", kept_jobs=3, finished=[{"id": one, "ttl": 500, "result": "MQ=="} for one in "ab"])

    assert redis.zrange(FINISHED, 0, -1) == [b"new", b"a", b"b", b"forever"]
    assert sorted(redis.keys("rq:job:*")) == [b"rq:job:a", b"rq:job:again", b"rq:job:b", b"rq:job:new"]
    assert sorted(redis.keys("rq:results:*")) == [
        b"rq:results:a",
        b"rq:results:again",
        b"rq:results:b",
        b"rq:results:new",
    ]


@pytest.mark.parametrize("old_jobs", [1, 700])
def test_one_finished_job_is_enough_to_delete_all_jobs_beyond_the_maximum(redis: Redis, old_jobs: int) -> None:
    """Up to a thousand, which is more than a batch can add."""
    redis.zadd(FINISHED, {f"old-{number}": NOW for number in range(old_jobs)})
    for key in ("rq:job:old-0", "rq:results:old-0"):
        redis.hset(key, "status", "finished")
    a_job(redis, "a")
    complete(redis, "a", kept_jobs=1, finished=[{"id": "a", "ttl": 500, "result": "MQ=="}])
    assert redis.zrange(FINISHED, 0, -1) == [b"a"]
    assert redis.exists("rq:job:old-0", "rq:results:old-0") == 0


def test_a_job_whose_dependents_are_not_enqueued_is_not_deleted_beyond_the_maximum(redis: Redis) -> None:
    """It would be the oldest."""
    a_job(redis, "a", dependents=True)
    a_job(redis, "b")
    finished = [{"id": "a", "ttl": 5, "result": "MQ=="}, {"id": "b", "ttl": 500, "result": "MQ=="}]
    complete(redis, "a", "b", kept_jobs=1, finished=finished)
    assert redis.zrange(FINISHED, 0, -1) == [b"a", b"b"]
    assert redis.hget("rq:job:a", "status") == b"finished"


def test_failed_jobs_alone_delete_no_finished_job(redis: Redis) -> None:
    """The registry is read only after a success."""
    a_job(redis, "a")
    redis.zadd(FINISHED, {"x": NOW, "y": NOW})
    complete(redis, "a", kept_jobs=1, failed=[failure("a")])
    assert redis.zcard(FINISHED) == 2


@pytest.mark.parametrize("key", [RESERVED, CRASHES, TIMEOUTS, FINISHED, FAILED, WORKER, "ack"])
def test_a_key_of_another_type_is_renamed_and_the_job_is_completed(redis: Redis, key: str) -> None:
    """Its content is kept under the new name. A key of the right type is not renamed."""
    a_job(redis, "a")
    for hash_key in (CRASHES, TIMEOUTS, WORKER, "ack"):
        redis.hset(hash_key, "other", 1)
    for registry in (FINISHED, FAILED):
        redis.zadd(registry, {"other": NOW + 60})
    redis.delete(key)
    redis.setrange(key, 0, "x")
    acknowledged: dict[str, Any] = {"sources": ("ack",), "acknowledgements": [["a", "id-1 stored:1"]]}
    finished = [{"id": "a", "ttl": 500, "result": "MQ=="}]
    assert complete(redis, "a", finished=finished, failed=[failure("b")], **acknowledged) == ([key], [], [])
    assert redis.get(f"{key}:quarantined") == b"x"
    assert redis.zscore(FINISHED, "a")
    assert redis.zscore(FAILED, "b")
    assert redis.hexists("ack", "a")


@pytest.mark.parametrize("command", ["hset", "xadd"])
def test_a_forbidden_record_of_rq_is_reported_once_and_the_jobs_are_released(redis: Redis, command: str) -> None:
    """The results that a failed job has are kept."""
    redis.acl_setuser("limited", enabled=True, nopass=True, keys=["*"], commands=["+@all", f"-{command}"])
    a_job(redis, "a", "b", "failed")
    redis.xadd("rq:results:failed", {"type": "1"})
    finished = [{"id": one, "ttl": 500, "result": "MQ=="} for one in "ab"]
    failed = [failure("failed")] if command == "xadd" else []
    path = redis.connection_pool.connection_kwargs["path"]
    with Redis(unix_socket_path=path, username="limited", password="any") as limited:
        quarantined, still_reserved, errors = complete(limited, "a", "b", "failed", finished=finished, failed=failed)
    redis.acl_deluser("limited")

    assert (quarantined, still_reserved, len(errors)) == ([], [], 1)
    assert f"'{command}'" in errors[0]
    assert listed(redis, RESERVED) == []
    assert redis.zrange(FINISHED, 0, -1) == [b"a", b"b"]
    assert redis.xlen("rq:results:failed") == 1


def test_fields_of_jobs_are_read_without_the_data_and_within_limits(redis: Redis) -> None:
    """Nothing is read of a key that is no hash, or has too many fields or bytes. The order is that of the keys."""
    redis.set("string", "x")
    fits: dict[Any, Any] = {"abc": "x" * 7, "data": "y" * 1000}
    redis.hset("fits", mapping=fits)
    redis.hset("long", mapping=fits | {"b": ""})
    redis.hset("data", mapping={"data": "y" * 1000})
    few: dict[Any, Any] = dict.fromkeys(range(1000), "")
    redis.hset("few", mapping=few)
    redis.hset("many", mapping=few | {1000: ""})
    read = scripts.load(redis, "read_fields")

    keys = ["string", "fits", "missing", "long", "data", "fits"]
    fields = [[b"abc"], [b"x" * 7]]
    assert read(keys=keys, args=[10]) == [None, fields, None, None, [[], []], fields]
    (names, values), nothing = read(keys=["few", "many"], args=[10_000])
    assert ({int(name) for name in names}, set(values), nothing) == (set(range(1000)), {b""}, None)
