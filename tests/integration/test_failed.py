"""Many and large rejections are listed, requeued and discarded: memory, round trips, kill -9, two operators at once."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import typer
from redis import Redis, RedisError
from rq.job import Dependency
from sqlalchemy import text

from consumers.cli.failed import failed_list
from consumers.db.engine import get_db
from consumers.errors import StoreUnavailable
from consumers.operations import get_portfolio_history
from consumers.ops.failed import discard, kind_of, requeue
from consumers.ops.rejections import Rejection, Selection, count_rejections, rejections
from consumers.terminal import MOST_REJECTIONS
from producers.errors import HistoryError
from producers.events import ARCHIVE_TYPE, SNAPSHOT_TYPE
from tests.controllers import cli
from tests.deliveries import burst, history_queue
from tests.histories import store_rejection
from tests.rejections import NOON, reject_conflicts, store_rejections
from tests.rq_programs import until

_MIB = 1024 * 1024

_STORE_LARGE = text("""
    INSERT INTO event_outcomes (job_id, outcome, reason, event)
    SELECT 'job-' || number, 'rejected', 'why', '{"type":"' || :type || '","data":"' || repeat('x', :bytes) || '"}'
    FROM generate_series(1, :count) AS number
""")


def _store_large(count: int) -> None:
    with get_db() as db:
        db.execute(_STORE_LARGE, {"type": ARCHIVE_TYPE, "bytes": 4 * _MIB, "count": count})


def _peak_bytes(act: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _list(as_json: bool) -> None:
    with pytest.raises(typer.Exit):
        failed_list(each=True, as_json=as_json)


@pytest.mark.parametrize("as_json", [False, True])
def test_failed_list_does_not_load_the_texts(
    redis: Redis, database_url: str, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """It reads only the beginning of each text, which names the event's type."""
    _store_large(8)
    assert _peak_bytes(lambda: _list(as_json)) < _MIB
    assert capsys.readouterr().out.count("archive") == 8


def test_discard_does_not_load_the_texts(redis: Redis, database_url: str) -> None:
    _store_large(8)
    assert _peak_bytes(lambda: discard(rejections(Selection(kind="archive")), redis, "history", "known")) < _MIB
    assert list(rejections()) == []


def test_requeue_loads_one_text_at_a_time(redis: Redis, database_url: str) -> None:
    """Only if Redis has lost the jobs; otherwise no text is loaded."""
    _store_large(1)
    of_one = _peak_bytes(lambda: requeue(rejections(), redis, "history"))
    redis.flushall()
    with get_db() as db:
        db.execute(text("TRUNCATE event_outcomes"))
    _store_large(8)
    assert _peak_bytes(lambda: requeue(rejections(), redis, "history")) < 1.5 * of_one
    assert history_queue(redis).count == 8


def test_call_of_a_job_is_neither_decompressed_nor_rewritten(redis: Redis, database_url: str) -> None:
    """The worker decides whether the call is supported."""
    bomb = zlib.compress(b"[" + b" " * 60 * _MIB, 1)
    queue = history_queue(redis)
    for job_id in ("to-requeue", "to-discard"):
        store_rejection(job_id, "why")
        queue.enqueue("f", job_id=job_id)
        redis.hset(f"rq:job:{job_id}", mapping={"data": bomb, "exc_info": bomb, "status": "failed"})
        redis.zadd(queue.failed_job_registry.key, {job_id: 1})
    redis.delete(queue.key)

    assert _peak_bytes(lambda: requeue(rejections(Selection(name="to-requeue")), redis, "history")) < 4 * _MIB
    assert _peak_bytes(lambda: discard(rejections(Selection(name="to-discard")), redis, "history", "known")) < 4 * _MIB

    assert (queue.get_job_ids(), queue.failed_job_registry.get_job_ids(cleanup=False)) == (["to-requeue"], [])
    assert redis.hmget("rq:job:to-requeue", "data", "status") == [bomb, b"queued"]
    assert not redis.exists("rq:job:to-discard")


def test_table_of_rejections_is_limited_and_json_is_complete(database_url: str) -> None:
    """The table says how many it leaves out. Both are in the order of rejection."""
    with get_db() as db:
        db.execute(
            text("INSERT INTO event_outcomes (job_id, outcome, reason, event)"
                 " SELECT 'job-' || n, 'rejected', 'why', '{}' FROM generate_series(1, :count) AS n"),
            {"count": MOST_REJECTIONS + 2},
        )  # fmt: skip
    program = [sys.executable, "-m", "consumers.cli", "failed", "list", "--each"]
    table = subprocess.run(program, capture_output=True, text=True, check=False)
    whole = subprocess.run([*program, "--json"], capture_output=True, text=True, check=False)
    assert (table.returncode, whole.returncode) == (1, 1)
    lines = table.stdout.splitlines()
    assert lines[-1] == "2 more are not shown; --json prints all of them."
    assert len(lines) == 1 + MOST_REJECTIONS + 1
    listed = [one["job_id"] for one in json.loads(whole.stdout)]
    assert len(listed) == MOST_REJECTIONS + 2
    assert [line.split()[0] for line in lines[1:-1]] == listed[:MOST_REJECTIONS]


def test_job_that_is_no_longer_rejected_is_not_discarded(redis: Redis, database_url: str) -> None:
    """If another process was faster, the job is not counted, and stays."""
    for name in ("a", "b"):
        store_rejection(name, "why")
    chosen = list(rejections())
    with get_db() as db:
        db.execute(text("DELETE FROM event_outcomes WHERE job_id = 'a'"))
    history_queue(redis).enqueue("f", job_id="a")
    assert discard(chosen, redis, "history", "known", "me") == 1
    assert discard(chosen, redis, "history", "known", "you") == 0
    assert redis.exists("rq:job:a")
    with get_db() as db:
        (discarded,) = db.execute(text("SELECT outcome, reason, actor FROM event_outcomes")).all()
    assert tuple(discarded) == ("discarded", "known; it was rejected: why", "me")


def test_event_that_was_stored_meanwhile_is_not_requeued(redis: Redis, database_url: str) -> None:
    """Its rejection was deleted together with the text."""
    store_rejection("a", "why")
    chosen = list(rejections())
    with get_db() as db:
        db.execute(text("DELETE FROM event_outcomes"))
    assert requeue(chosen, redis, "history") == 0
    assert history_queue(redis).count == 0


def test_event_that_was_rejected_again_meanwhile_is_left_for_the_next_run(redis: Redis, database_url: str) -> None:
    """Its reason may be another one, which nobody has selected."""
    store_rejections("why", 3)
    chosen = list(rejections(Selection(reason="why")))
    with get_db() as db:
        db.execute(
            text("UPDATE event_outcomes SET reason = 'other', created_at = now() WHERE job_id = :job_id"),
            {"job_id": chosen[1].job_id},
        )
    assert requeue(chosen[1:2], redis, "history") == 0
    assert discard(chosen, redis, "history", "test data") == 2
    assert [one.reason for one in rejections()] == ["other"]


def test_lost_job_whose_text_is_not_an_event_cannot_be_requeued(redis: Redis, database_url: str) -> None:
    store_rejection("a", "why")
    with pytest.raises(HistoryError, match="job a cannot be requeued: Redis no longer has it"):
        requeue(rejections(), redis, "history")


def test_a_job_that_cannot_be_requeued_does_not_stop_the_others(redis: Redis, database_url: str) -> None:
    """The error comes at the end, and says how many were requeued."""
    good = reject_conflicts(redis, 2)
    store_rejections("why", 2, prefix="text-", at=NOON - timedelta(days=365), event="{}")
    message = r"^job text-1 and 1 more cannot be requeued: Redis no longer has them, .*; 2 others were requeued$"
    with pytest.raises(HistoryError, match=message):
        requeue(rejections(), redis, "history")
    assert history_queue(redis).get_job_ids() == good


def _round_trips(redis: Redis, act: Callable[[], object]) -> int:
    def reads() -> int:
        return int(redis.info("stats")["total_reads_processed"])

    before = reads()
    act()
    return reads() - before


def test_requeue_and_discard_take_a_few_round_trips_for_hundreds_of_jobs(redis: Redis, database_url: str) -> None:
    """A large batch takes more than one read of the server, so their number is not exactly that of round trips."""
    reject_conflicts(redis, 600)
    assert _round_trips(redis, lambda: requeue(rejections(), redis, "history")) < 150
    redis.delete(history_queue(redis).key)
    assert _round_trips(redis, lambda: discard(rejections(), redis, "history", "known")) < 150
    redis.flushall()
    with get_db() as db:
        db.execute(text("UPDATE event_outcomes SET outcome = 'rejected'"))
    assert _round_trips(redis, lambda: requeue(rejections(), redis, "history")) < 150
    assert history_queue(redis).count == 600


def test_a_requeued_job_is_the_same_as_one_that_rq_requeues(redis: Redis, database_url: str) -> None:
    reject_conflicts(redis, 2)
    queue = history_queue(redis)
    queue.failed_job_registry.requeue("job-000000")
    assert requeue(rejections(Selection(name="job-000001")), redis, "history") == 1
    found: Any = [redis.hgetall(f"rq:job:job-00000{n}") for n in (0, 1)]
    by_rq, ours = found
    assert json.loads(zlib.decompress(by_rq.pop(b"data")))[0] == json.loads(zlib.decompress(ours.pop(b"data")))[0]
    times = {b"enqueued_at", b"created_at", b"description"}
    assert {k: v for k, v in ours.items() if k not in times} == {k: v for k, v in by_rq.items() if k not in times}
    assert redis.ttl("rq:job:job-000000") == redis.ttl("rq:job:job-000001")
    assert queue.get_job_ids() == ["job-000000", "job-000001"]
    assert queue.failed_job_registry.get_job_ids() == []


def test_nothing_of_a_discarded_job_is_left_in_redis(redis: Redis, database_url: str) -> None:
    """In the failed registry, in the queue, and one that RQ cannot read."""
    jobs = reject_conflicts(redis, 3)
    requeue(rejections(Selection(name=jobs[1])), redis, "history")
    redis.hset(f"rq:job:{jobs[2]}", "timeout", "abc")
    assert discard(rejections(), redis, "history", "known") == 3
    queue = history_queue(redis)
    assert (queue.get_job_ids(), queue.failed_job_registry.get_job_ids()) == ([], [])
    assert redis.keys("*job-0*") == []


class _Meddled(Redis):
    """Client that lets another program act, once, after the reads: RQ asks for the version then."""

    act: Callable[[], object] | None = None

    def info(self, section: str | None = None, *args: str, **kwargs: Any) -> Any:
        if self.act is not None:
            act, self.act = self.act, None
            act()
        return super().info(section, *args, **kwargs)


def test_a_job_that_rq_requeues_meanwhile_is_queued_once(redis: Redis, database_url: str) -> None:
    """As with the button of RQ Dashboard."""
    jobs = reject_conflicts(redis, 3)
    queue = history_queue(redis)
    meddled = _Meddled(connection_pool=redis.connection_pool)
    meddled.act = lambda: queue.failed_job_registry.requeue(jobs[1])
    assert requeue(rejections(), meddled, "history") == 2
    assert meddled.act is None
    assert sorted(queue.get_job_ids()) == sorted(jobs)


class _Busy(Redis):
    """Client that changes a job before each reading of jobs."""

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        if not transaction:
            self.hincrby("rq:job:job-000000", "changes", 1)
        return super().pipeline(transaction, shard_hint)


def test_a_job_that_others_change_all_the_time_is_not_requeued(redis: Redis, database_url: str) -> None:
    reject_conflicts(redis, 1)
    with pytest.raises(HistoryError, match="other programs change the same jobs all the time: run this again later"):
        requeue(rejections(), _Busy(connection_pool=redis.connection_pool), "history")
    assert history_queue(redis).count == 0
    assert requeue(rejections(), redis, "history") == 1


def test_a_rejected_job_that_waited_for_another_one_is_requeued_and_deleted_as_rq_does(
    redis: Redis, database_url: str
) -> None:
    """RQ also keeps a list of its dependencies. A job that RQ has deleted is made anew from the recorded text."""
    queue = history_queue(redis)
    text_of_event = f'{{"type":"{SNAPSHOT_TYPE}"}}'
    for job_id in ("first", "by-rq", "anew", "discarded"):
        dependency = None if job_id == "first" else Dependency(["first"], allow_failure=True)
        queue.enqueue(
            "consumers.handlers.record_portfolio_snapshot", text_of_event, job_id=job_id, depends_on=dependency
        )
    burst(redis)
    assert {one.job_id for one in rejections()} == {"first", "by-rq", "anew", "discarded"}
    redis.zrem(queue.failed_job_registry.key, "anew")

    for job_id in ("by-rq", "anew"):
        assert requeue(rejections(Selection(name=job_id)), redis, "history") == 1
    assert discard(rejections(Selection(name="discarded")), redis, "history", "known") == 1
    assert (queue.get_job_ids(), queue.failed_job_registry.get_job_ids()) == (["by-rq", "anew"], ["first"])
    found = [redis.hmget(f"rq:job:{job_id}", "status", "dependency_ids") for job_id in queue.get_job_ids()]
    assert found == [[b"queued", b'["first"]'], [b"queued", None]]
    assert redis.keys("*discarded*") == []


@contextmanager
def _locked(job_id: str) -> Iterator[None]:
    """Lock the outcome of a job during the block: who requeues or discards it waits."""
    with get_db() as db:
        db.execute(text("SELECT FROM event_outcomes WHERE job_id = :job FOR UPDATE"), {"job": job_id})
        yield


def _failed(*arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "consumers.cli", "failed", *arguments]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_requeue_that_is_killed_continues_in_a_second_run(redis: Redis, database_url: str) -> None:
    """No job is lost, and none is queued twice."""
    jobs, queue = reject_conflicts(redis, 600), history_queue(redis)
    with _locked(jobs[-1]):
        killed = _failed("requeue", "--all")
        until(lambda: queue.count == 500)
        killed.kill()
        killed.communicate()
    assert queue.get_job_ids() == jobs[:500]
    again = _failed("requeue", "--all")
    assert again.communicate() == ("100 requeued; 500 left: queued or rejected again, or no longer rejected\n", "")
    assert queue.get_job_ids() == jobs
    burst(redis)
    assert (len(get_portfolio_history()), list(rejections()), queue.failed_job_registry.count) == (600, [], 0)


def test_a_discard_that_is_killed_continues_in_a_second_run(redis: Redis, database_url: str) -> None:
    jobs, queue = reject_conflicts(redis, 600), history_queue(redis)
    with _locked(jobs[-1]):
        killed = _failed("discard", "--all", "--because", "test data")
        until(lambda: count_rejections() == 100)
        killed.kill()
        killed.communicate()
    again = _failed("discard", "--all", "--because", "test data")
    assert again.communicate() == ("100 discarded\n", "")
    assert (list(rejections()), queue.failed_job_registry.count, redis.keys("rq:job:*")) == ([], 0, [])


def test_a_discard_whose_commit_fails_can_be_repeated(redis: Redis, database_url: str) -> None:
    """The jobs are deleted before the commit: otherwise a discarded event could stay in the failed registry."""
    reject_conflicts(redis, 3)
    with get_db() as db:
        db.execute(text("CREATE FUNCTION away() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''away''; END'"))
        db.execute(text("CREATE TRIGGER away BEFORE UPDATE ON event_outcomes FOR EACH ROW EXECUTE FUNCTION away()"))
    with pytest.raises(StoreUnavailable):
        discard(rejections(), redis, "history", "known")
    assert count_rejections() == 3
    with get_db() as db:
        db.execute(text("DROP TRIGGER away ON event_outcomes"))
    assert discard(rejections(), redis, "history", "known") == 3
    assert (count_rejections(), history_queue(redis).failed_job_registry.count) == (0, 0)


def test_nothing_is_discarded_while_redis_is_away(redis: Redis, database_url: str) -> None:
    reject_conflicts(redis, 3)
    with pytest.raises(RedisError):
        discard(rejections(), Redis(port=1), "history", "known")
    assert count_rejections() == 3


def test_two_operators_may_requeue_the_same_events_at_once(redis: Redis, database_url: str) -> None:
    """Each job is queued once."""
    jobs = reject_conflicts(redis, 600)
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(requeue, rejections(), redis, "history") for _ in range(2)]
    assert sum(one.result() for one in both) == 600
    assert sorted(history_queue(redis).get_job_ids()) == sorted(jobs)


def test_two_operators_may_requeue_lost_jobs_at_once(redis: Redis, database_url: str) -> None:
    jobs = reject_conflicts(redis, 600)
    redis.flushall()
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(requeue, rejections(), redis, "history") for _ in range(2)]
    assert sum(one.result() for one in both) == 600
    assert sorted(history_queue(redis).get_job_ids()) == sorted(jobs)


def test_a_selection_does_not_discard_what_was_requeued(redis: Redis, database_url: str) -> None:
    """Until a worker has rejected it again. A job id or event id means the event wherever it is."""
    jobs = reject_conflicts(redis, 4)
    assert requeue(rejections(Selection(limit=2)), redis, "history") == 2
    discarded = cli("failed", "discard", "--all", "--because", "x")
    assert discarded.stdout == "2 discarded; 2 left: queued or rejected again, or no longer rejected\n"
    assert history_queue(redis).get_job_ids() == jobs[:2]
    assert (
        cli("failed", "requeue", "--all").stdout
        == "0 requeued; 2 left: queued or rejected again, or no longer rejected\n"
    )
    assert cli("failed", "discard", jobs[0], "--because", "x").stdout == "1 discarded\n"
    assert history_queue(redis).get_job_ids() == jobs[1:2]


def test_one_operator_may_discard_what_another_one_requeues(redis: Redis, database_url: str) -> None:
    """Each event ends as a row or as discarded, and no job is left over."""
    reject_conflicts(redis, 600)
    with ThreadPoolExecutor() as pool:
        pool.submit(requeue, rejections(), redis, "history")
        one = pool.submit(discard, rejections(), redis, "history", "known")
        other = pool.submit(requeue, rejections(), redis, "history")
    assert one.exception() is None
    assert other.exception() is None
    burst(redis)
    with get_db() as db:
        (discarded,) = db.execute(text("SELECT count(*) FROM event_outcomes WHERE outcome = 'discarded'")).one()
    assert (discarded, len(get_portfolio_history())) == (one.result(), 600 - one.result())
    queue = history_queue(redis)
    assert (queue.count, queue.failed_job_registry.count, list(rejections())) == (0, 0, [])


@pytest.mark.parametrize(
    ("beginning", "kind"),
    [
        (f'{{"specversion":"1.0","type":"{SNAPSHOT_TYPE}","data":{{"bal', "snapshot"),
        (f' {{ "a" : [1, {{"type": "x"}}] ,\n"type" : "{ARCHIVE_TYPE}" }} ', "archive"),
        (f'{{"data":{{"type":"{SNAPSHOT_TYPE}"}},"type":"{ARCHIVE_TYPE}"}}', "archive"),
        (f'{{"data":{{"type":"{SNAPSHOT_TYPE}"}},"more":"', None),
        (f'{{"type":"{SNAPSHOT_TYPE[:-1]}', None),
        (f'["type","{SNAPSHOT_TYPE}"]', None),
        ('{"type":["x"]}', None),
        ('{"type":1', None),
        ('{"a":1', None),
        ("{}", None),
        ("", None),
        ("[" * 200_000, None),
        ('{"a":' * 200_000, None),
    ],
)
def test_kind_is_read_from_the_beginning_of_a_text(beginning: str, kind: str | None) -> None:
    """A type inside the data is ignored. A deeply nested text causes no error."""
    found = kind_of(beginning)
    assert (found and found.name) == kind


def test_rejection_does_not_contain_the_text() -> None:
    """Callers read it with rejected_text."""
    assert "event" not in Rejection.__dataclass_fields__
