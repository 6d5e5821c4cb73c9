"""Reservations and orphans with a real Redis: which jobs a thread takes, in which order, and where they go."""

from __future__ import annotations

from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from consumers.worker import orphans, scripts
from consumers.worker.deliveries import MAX_JOB_BYTES
from consumers.worker.orphans import ORPHAN_SECONDS, Orphans
from consumers.worker.reservations import LEASE_SECONDS, Reservations, requeue_expired
from producers.redis_keys import orphans_key
from tests.deliveries import history_queue

QUEUE = "rq:queue:history"
OWNERS, CRASHES, TIMEOUTS = "history:owners:history", "history:crashes:history", "history:timeouts:history"
QUARANTINE, ORPHANS = "history:quarantine:history", orphans_key("history")
DAY = 86400


def enqueue(redis: Redis, *job_ids: str, data: str = "[]", **fields: str) -> None:
    """Put jobs at the tail of the queue."""
    for job_id in job_ids:
        written: dict[Any, Any] = {"data": data, "status": "queued", "origin": "history"} | fields
        redis.hset(f"rq:job:{job_id}", mapping=written)
        redis.rpush(QUEUE, job_id)


def reservations_of(redis: Redis, worker: str = "one") -> Reservations:
    return Reservations(redis, history_queue(redis), worker)


def reserved(reservations: Reservations, limit: int = 100) -> list[str]:
    return [job.job_id for job in reservations.reserve(limit).jobs]


def listed(redis: Redis, key: str = QUEUE) -> list[str]:
    found: Any = redis.lrange(key, 0, -1)
    return [item.decode() for item in found]


def owner_of(reservations: Reservations) -> str:
    return reservations.list_key.removeprefix("history:reserved:history:")


def expire(redis: Redis, reservations: Reservations) -> None:
    redis.delete(f"history:lease:history:{owner_of(reservations)}")


def test_a_reservation_takes_jobs_in_order_up_to_the_limit(redis: Redis) -> None:
    """They are in the reserved list, under a lease of 20 seconds, and their owner is known. The others stay."""
    enqueue(redis, "a", "b", "c", data="text")
    one = reservations_of(redis)
    reservation = one.reserve(2)

    assert [(job.job_id, job.state, job.data, job.result_ttl) for job in reservation.jobs] == [
        ("a", "usual", b"text", None),
        ("b", "usual", b"text", None),
    ]
    assert (reservation.crashes, reservation.timeouts) == (None, 0)
    assert (listed(redis, one.list_key), listed(redis)) == (["a", "b"], ["c"])
    assert LEASE_SECONDS - 5 < redis.ttl(f"history:lease:history:{owner_of(one)}") <= LEASE_SECONDS
    assert redis.hgetall(OWNERS) == {owner_of(one).encode(): b""}


def test_an_empty_queue_gives_an_empty_reservation_and_renews_the_lease(redis: Redis) -> None:
    """The owner is known too, before it waits for a job."""
    one = reservations_of(redis)
    assert one.reserve(5) == ([], None, 0)
    assert redis.ttl(f"history:lease:history:{owner_of(one)}") > 0
    assert redis.hexists(OWNERS, owner_of(one))


def test_jobs_of_a_reservation_whose_reply_was_lost_keep_their_order(redis: Redis) -> None:
    """The next reservation has them again, before later jobs."""
    enqueue(redis, "a", "b", "c")
    one = reservations_of(redis)
    assert (reserved(one, 2), reserved(one, 3)) == (["a", "b"], ["a", "b", "c"])


def test_an_id_that_no_job_can_have_is_quarantined(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A job id has 1 to 200 letters, digits, hyphens and underscores. The jobs around it are reserved."""
    longest = "y" * 200
    for job_id in ("an id", "a_B-1", "", longest + "y", longest, "a:b"):
        enqueue(redis, job_id)
    assert reserved(reservations_of(redis)) == ["a_B-1", longest]
    assert sorted(listed(redis, QUARANTINE)) == sorted(["an id", "", longest + "y", "a:b"])
    assert caplog.messages == [f"moved 4 entries that cannot be job ids from the queue to list {QUARANTINE}"]
    assert listed(redis) == []


def test_an_id_is_quarantined_although_the_key_for_it_has_another_type(redis: Redis) -> None:
    """That key is renamed first, so that the jobs behind the id are not held up."""
    enqueue(redis, "an id", "a")
    redis.set(QUARANTINE, "x")
    assert reserved(reservations_of(redis)) == ["a"]
    assert (listed(redis, QUARANTINE), redis.get(f"{QUARANTINE}:quarantined")) == (["an id"], b"x")


@pytest.mark.parametrize("counts", [CRASHES, TIMEOUTS])
def test_a_job_with_a_count_is_reserved_alone(redis: Redis, counts: str) -> None:
    """The jobs before it are reserved without it, and only its reservation has the count."""
    enqueue(redis, "a", "b", "counted", "c", "d", "another")
    redis.hset(counts, mapping={"counted": 2, "another": 3})
    one = reservations_of(redis)
    found = []
    for _ in range(3):
        reservation = one.reserve(10)
        found.append(([job.job_id for job in reservation.jobs], reservation.crashes, reservation.timeouts))
        redis.delete(one.list_key)
    counted = (["counted"], 2, 0) if counts == CRASHES else (["counted"], None, 2)
    assert found == [(["a", "b"], None, 0), counted, (["c", "d"], None, 0)]


@pytest.mark.parametrize(("value", "count"), [("abc", 0), ("", 0), ("12345", 0), ("9999", 9999), ("0", 0)])
def test_a_count_has_one_to_four_digits_and_any_other_value_becomes_zero(redis: Redis, value: str, count: int) -> None:
    """It is written as 0, so that the next crash or timeout can be counted."""
    enqueue(redis, "a")
    redis.hset(CRASHES, "a", value)
    redis.hset(TIMEOUTS, "a", value)
    reservation = reservations_of(redis).reserve(1)
    assert (reservation.crashes, reservation.timeouts) == (count, count)
    assert redis.hget(CRASHES, "a") == redis.hget(TIMEOUTS, "a") == str(count).encode()


def test_a_reservation_that_has_reached_4_mib_takes_no_further_job(redis: Redis) -> None:
    """A reservation of large jobs is short; a job that is larger than that is reserved alone."""
    enqueue(redis, "a", "b", "c", data="x" * 2**21)
    enqueue(redis, "d", data="x" * 2**22)
    one, found = reservations_of(redis), []
    for _ in range(3):
        found.append(reserved(one))
        redis.delete(one.list_key)
    assert found == [["a", "b"], ["c", "d"], []]


def test_a_queue_of_another_type_is_an_error_that_names_it(redis: Redis) -> None:
    """Nothing is changed before the error."""
    enqueue(redis, "a")
    dead = reservations_of(redis, "dead")
    dead.reserve(1)
    expire(redis, dead)
    redis.set(QUEUE, "x")
    for call in (lambda: reservations_of(redis).reserve(1), lambda: requeue_expired(redis, history_queue(redis))):
        with pytest.raises(ResponseError, match=f"^WRONGTYPE {QUEUE} is a string and not a list: rename or delete it$"):
            call()
    assert (listed(redis, dead.list_key), redis.exists(CRASHES)) == (["a"], 0)
    assert redis.hkeys(OWNERS) == [owner_of(dead).encode()]


@pytest.mark.parametrize(("more_bytes", "state"), [(0, "usual"), (1, "oversized")])
def test_a_job_is_read_up_to_its_largest_size(redis: Redis, more_bytes: int, state: str) -> None:
    """Nothing is read of a larger one."""
    size = MAX_JOB_BYTES + more_bytes
    enqueue(redis, "large", data="x" * size)
    (job,) = reservations_of(redis).reserve(1).jobs
    assert (job.state, len(job.data)) == (state, 0 if more_bytes else size)


def test_a_reserved_job_lists_the_rq_features_that_it_asks_for(redis: Redis) -> None:
    """A callback, webhooks, repetitions, a rate limit, or an own result_ttl. An empty field asks for nothing."""
    asks = ("success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks", "repeats_left")
    for field in (*asks, "rate_limit_key"):
        enqueue(redis, field, data="text", **{field: "x"})
    enqueue(redis, "nothing", webhooks="")
    ttls = {"ttl-1": -1, "ttl0": 0, "ttl500": 500, "ttl999999999": 999999999, "ttl1000000000": None, "ttl-": None}
    for job_id in ttls:
        enqueue(redis, job_id, result_ttl=job_id.removeprefix("ttl"))
    jobs = {job.job_id: job for job in reservations_of(redis).reserve(100).jobs}

    assert [(jobs[field].state, jobs[field].data) for field in asks] == [(field, b"text") for field in asks]
    assert jobs["rate_limit_key"].state == "rate_limit_key"
    assert {job_id: jobs[job_id].result_ttl for job_id in ttls} == ttls
    assert {jobs[job_id].state for job_id in ("nothing", *ttls)} == {"usual"}


def test_a_job_without_data_is_unreadable_and_one_without_a_key_is_deleted(redis: Redis) -> None:
    """An unreadable one keeps its result_ttl. A key of another type is unreadable, too. None of them has data."""
    enqueue(redis, "empty", "string", "deleted", "last", data="text", result_ttl="60")
    redis.hdel("rq:job:empty", "data")
    redis.delete("rq:job:string", "rq:job:deleted")
    redis.set("rq:job:string", "x")
    jobs = reservations_of(redis).reserve(10).jobs
    assert [(job.state, job.data, job.result_ttl) for job in jobs] == [
        ("unreadable", b"", 60),
        ("unreadable", b"", None),
        ("deleted", b"", None),
        ("usual", b"text", 60),
    ]


def test_a_job_that_may_not_be_read_is_an_error_and_stays_in_the_queue(redis: Redis) -> None:
    """A wrong access list must reject no event."""
    enqueue(redis, "a", "b")
    redis.acl_setuser("limited", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-hstrlen"])
    path = redis.connection_pool.connection_kwargs["path"]
    refused = pytest.raises(ResponseError, match="(?i)permissions|can't run this command")
    with Redis(unix_socket_path=path, username="limited", password="any") as limited, refused:
        reservations_of(limited).reserve(2)
    redis.acl_deluser("limited")
    assert listed(redis) == ["a", "b"]


def test_a_job_moved_to_the_tail_is_counted_once_per_move(redis: Redis) -> None:
    """The count expires a week after the last move. A job that is not reserved is neither moved nor counted."""
    enqueue(redis, "a", "b", "c")
    one = reservations_of(redis)
    one.reserve(2)
    assert one.move_to_tail("a", TIMEOUTS) == 1
    assert (one.move_to_tail("a", TIMEOUTS), one.move_to_tail("c", TIMEOUTS)) == (0, 0)
    assert (listed(redis), listed(redis, one.list_key)) == (["c", "a"], ["b"])
    one.reserve(1)
    one.reserve(2)
    assert one.move_to_tail("b", CRASHES) == 1
    assert one.reserve(1).jobs[0].job_id == "c"
    redis.delete(one.list_key)
    assert [job.job_id for job in one.reserve(1).jobs] == ["a"]
    assert one.move_to_tail("a", TIMEOUTS) == 2
    assert redis.hgetall(TIMEOUTS) == {b"a": b"2"}
    assert 6 * DAY < redis.ttl(TIMEOUTS) <= 7 * DAY


def test_requeued_jobs_return_to_the_front_in_their_order(redis: Redis) -> None:
    """Closing the reservations does that too, and ends the lease and the owner's entry."""
    enqueue(redis, "a", "b", "c")
    one = reservations_of(redis)
    one.reserve(2)
    assert one.requeue() == 2
    assert (listed(redis), redis.exists(one.list_key)) == (["a", "b", "c"], 0)
    one.reserve(1)
    one.close()
    assert listed(redis) == ["a", "b", "c"]
    assert redis.keys("history:*") == []


def test_a_wait_for_a_job_ends_with_a_reserved_job_or_without_one(redis: Redis) -> None:
    """The reserved one is the first of the queue."""
    one = reservations_of(redis)
    assert one.wait(1) is False
    enqueue(redis, "a", "b")
    assert one.wait(1) is True
    assert (listed(redis, one.list_key), listed(redis)) == (["a"], ["b"])


def test_each_marked_job_becomes_a_poison_candidate_and_keeps_its_crashes(redis: Redis) -> None:
    """The counts of a job that nobody runs again expire after a week."""
    enqueue(redis, "a", "b", "c")
    one = reservations_of(redis)
    one.reserve(3)
    redis.hset(CRASHES, "b", 2)
    one.mark_candidates()
    assert redis.hgetall(CRASHES) == {b"a": b"0", b"b": b"2", b"c": b"0"}
    assert 6 * DAY < redis.ttl(CRASHES) <= 7 * DAY


@pytest.mark.parametrize(
    ("jobs", "is_alone", "before", "after"),
    [
        ("a", True, {}, {"a": "1"}),
        ("a", True, {"a": "2"}, {"a": "3"}),
        ("a", False, {}, {"a": "0"}),
        ("a", False, {"a": "2"}, {"a": "2"}),
        ("abc", True, {}, {"a": "0", "b": "0", "c": "0"}),
    ],
)
def test_a_crash_counts_only_against_a_job_that_ran_alone(
    redis: Redis, jobs: str, is_alone: bool, before: dict[Any, Any], after: dict[str, str]
) -> None:
    """Each job of a dead owner returns to the front of the queue as a poison candidate; the owner is forgotten.

    A candidate keeps the crashes that it has.
    """
    enqueue(redis, *jobs, "later")
    if before:
        redis.hset(CRASHES, mapping=before)
    dead, living = reservations_of(redis, "dead"), reservations_of(redis, "living")
    dead.reserve(len(jobs))
    living.renew_lease()
    assert redis.hget(OWNERS, owner_of(living)) == b""
    if is_alone:
        dead.run_alone()
        dead.renew_lease()
    assert requeue_expired(redis, history_queue(redis)) == []
    expire(redis, dead)

    assert requeue_expired(redis, history_queue(redis)) == [*jobs]
    assert redis.hgetall(CRASHES) == {name.encode(): count.encode() for name, count in after.items()}
    assert 6 * DAY < redis.ttl(CRASHES) <= 7 * DAY
    assert listed(redis) == [*jobs, "later"]
    assert redis.hkeys(OWNERS) == [owner_of(living).encode()]


def test_a_job_no_longer_counts_as_running_alone_after_a_stalled_database_or_another_reservation(redis: Redis) -> None:
    """A crash is not counted then."""
    enqueue(redis, "a")
    one = reservations_of(redis)
    one.reserve(1)
    one.run_alone()
    states = []
    for stalled in (False, True):
        one.renew_lease(database_stalled=stalled)
        states.append(redis.hget(OWNERS, owner_of(one)))
    one.reserve(1)
    one.renew_lease()
    states.append(redis.hget(OWNERS, owner_of(one)))
    assert states == [b"alone", b"", b""]


def test_a_crash_count_that_is_not_a_number_begins_again(redis: Redis) -> None:
    """The crash that is counted then is the first."""
    enqueue(redis, "a")
    dead = reservations_of(redis, "dead")
    dead.reserve(1)
    dead.run_alone()
    redis.hset(CRASHES, "a", "abc")
    expire(redis, dead)
    assert requeue_expired(redis, history_queue(redis)) == ["a"]
    assert redis.hgetall(CRASHES) == {b"a": b"1"}


def test_crash_counts_of_another_type_do_not_keep_jobs_from_the_queue(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Their key is renamed, which is logged, and counts begin again."""
    enqueue(redis, "a")
    dead = reservations_of(redis, "dead")
    dead.reserve(1)
    redis.set(CRASHES, "x")
    expire(redis, dead)
    assert requeue_expired(redis, history_queue(redis)) == ["a"]
    assert (redis.get(f"{CRASHES}:quarantined"), redis.hgetall(CRASHES)) == (b"x", {b"a": b"0"})
    assert caplog.messages == [f"Redis key {CRASHES} has the wrong type and was renamed to {CRASHES}:quarantined"]


def test_a_lease_without_an_expiry_gets_one(redis: Redis) -> None:
    """A restored Redis may have it. The owner keeps its jobs for at most another 20 seconds.

    A lease that is no longer than that is never extended: many workers that look at it could keep it for ever.
    """
    enqueue(redis, "a")
    one = reservations_of(redis)
    one.reserve(1)
    lease = f"history:lease:history:{owner_of(one)}"
    redis.persist(lease)
    assert requeue_expired(redis, history_queue(redis)) == []
    assert 0 < redis.ttl(lease) <= LEASE_SECONDS
    for seconds in (LEASE_SECONDS - 0.3, LEASE_SECONDS - 10):  # Redis rounds the first one to 20 s
        redis.pexpire(lease, round(1000 * seconds))
        requeue_expired(redis, history_queue(redis))
        assert redis.pttl(lease) <= 1000 * seconds


def test_keys_of_a_wrong_type_are_renamed_and_all_others_stay(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """Each renamed key is named in the log. Its content is kept."""
    enqueue(redis, "a")
    one = reservations_of(redis)
    one.reserve(1)
    assert not one.quarantine_keys()
    redis.set(CRASHES, "x")
    redis.set(QUARANTINE, "z")
    redis.delete(OWNERS)
    redis.rpush(OWNERS, "y")
    assert one.quarantine_keys()
    assert (redis.get(f"{CRASHES}:quarantined"), listed(redis, f"{OWNERS}:quarantined")) == (b"x", ["y"])
    assert redis.get(f"{QUARANTINE}:quarantined") == b"z"
    assert listed(redis, one.list_key) == ["a"]
    assert sorted(caplog.messages) == [
        f"Redis key {key} has the wrong type and was renamed to {key}:quarantined"
        for key in (CRASHES, OWNERS, QUARANTINE)
    ]
    redis.delete(one.list_key)
    redis.set(one.list_key, "a")
    assert one.quarantine_keys()
    assert redis.get(f"{one.list_key}:quarantined") == b"a"


def test_an_orphan_in_no_list_is_requeued_30_seconds_after_it_was_first_seen(redis: Redis) -> None:
    """The time is noted by Redis' clock, and the note expires ten minutes after the last one."""
    enqueue(redis, "later")
    enqueue(redis, "new", "early", "due", "finished", "unread")
    redis.ltrim(QUEUE, 0, 0)
    now = int(redis.time()[0])
    redis.hset("rq:job:finished", "status", "finished")
    seen = {"early": now - ORPHAN_SECONDS + 20, "due": now - ORPHAN_SECONDS - 1, "finished": 0, "unread": "abc"}
    redis.hset(ORPHANS, mapping={job_id: str(at) for job_id, at in seen.items()})

    assert sorted(Orphans(redis, history_queue(redis)).requeue()) == ["due", "unread"]
    assert sorted(listed(redis)[:2]) == ["due", "unread"]
    assert listed(redis)[2:] == ["later"]
    noted: Any = redis.hgetall(ORPHANS)
    assert sorted(noted) == [b"early", b"finished", b"new"]
    assert now <= int(noted[b"new"]) <= now + 20
    assert 500 < redis.ttl(ORPHANS) <= 600


@pytest.mark.parametrize(("status", "is_listed"), [("queued", True), ("finished", False), ("started", False)])
def test_a_job_that_moves_on_after_the_scan_is_no_orphan(redis: Redis, status: str, is_listed: bool) -> None:
    """It was enqueued, or another worker took it, after the scan had read the lists. The note of it is deleted."""
    enqueue(redis, "a", status=status)
    if not is_listed:
        redis.delete(QUEUE)
    redis.hset(ORPHANS, "a", 1)
    script = scripts.load(redis, "requeue_unlisted")
    assert script(keys=[QUEUE, "rq:job:a", ORPHANS], args=["a", ORPHAN_SECONDS]) == 0
    assert listed(redis) == (["a"] if is_listed else [])
    assert redis.exists(ORPHANS) == 0


def test_notes_of_orphans_under_a_key_of_another_type_begin_again(redis: Redis) -> None:
    """The key is renamed."""
    enqueue(redis, "a")
    redis.delete(QUEUE)
    redis.set(ORPHANS, "x")
    assert Orphans(redis, history_queue(redis)).requeue() == []
    assert (redis.get(f"{ORPHANS}:quarantined"), redis.hkeys(ORPHANS)) == (b"x", [b"a"])


def test_a_job_that_stays_in_the_intermediate_list_returns_to_the_front(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live stock worker removes its job within milliseconds."""
    enqueue(redis, "later")
    redis.rpush(f"{QUEUE}:intermediate", "a", "b")
    dead = Orphans(redis, history_queue(redis))
    assert dead.requeue() == []
    monkeypatch.setattr(orphans, "ORPHAN_SECONDS", -1.0)
    assert dead.requeue() == ["a", "b"]
    assert (listed(redis), listed(redis, f"{QUEUE}:intermediate")) == (["b", "a", "later"], [])
    assert dead.requeue() == []


def test_a_job_that_left_its_list_since_it_was_read_is_not_requeued(redis: Redis) -> None:
    """Another worker has requeued it, or its own worker lives and has finished it."""
    redis.hset("rq:job:a", "status", "finished")
    intermediate, started = scripts.load(redis, "requeue_intermediate"), scripts.load(redis, "requeue_started")
    assert intermediate(keys=[f"{QUEUE}:intermediate", QUEUE], args=["a"]) == 0
    assert started(keys=["rq:wip:history", QUEUE, "rq:job:a"], args=["a:1", "a"]) == 0
    assert (listed(redis), redis.hget("rq:job:a", "status")) == ([], b"finished")


def test_an_expired_job_of_a_stock_worker_is_queued_again_at_the_front(redis: Redis) -> None:
    """A registered job whose key is no hash is only removed from the registry."""
    enqueue(redis, "later")
    redis.hset("rq:job:started", mapping={"status": "started"})
    redis.set("rq:job:string", "x")
    redis.zadd("rq:wip:history", {"started:1": 1, "string:1": 1, "running:1": int(redis.time()[0]) + 60})

    assert Orphans(redis, history_queue(redis)).requeue() == ["started"]
    assert (listed(redis), redis.hget("rq:job:started", "status")) == (["started", "later"], b"queued")
    assert redis.zrange("rq:wip:history", 0, -1) == [b"running:1"]
