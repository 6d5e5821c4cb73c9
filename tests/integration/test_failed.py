"""Many and large rejections are listed, requeued and discarded in constant memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import typer
from redis import Redis
from sqlalchemy import text

from consumers.cli.failed import failed_list
from consumers.db.engine import get_db
from consumers.ops.failed import Rejection, discard, kind_of, rejections, requeue
from consumers.terminal import MOST_REJECTIONS
from producers.errors import HistoryError
from producers.events import ARCHIVE_TYPE, SNAPSHOT_TYPE
from tests.deliveries import history_queue
from tests.histories import store_rejection

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
        failed_list(as_json=as_json)


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
    assert _peak_bytes(lambda: discard(rejections(kind="archive"), redis, "history", "known")) < _MIB
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

    assert _peak_bytes(lambda: requeue(rejections("to-requeue"), redis, "history")) < 4 * _MIB
    assert _peak_bytes(lambda: discard(rejections("to-discard"), redis, "history", "known")) < 4 * _MIB

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
    program = [sys.executable, "-m", "consumers.cli", "failed", "list"]
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


def test_lost_job_whose_text_is_not_an_event_cannot_be_requeued(redis: Redis, database_url: str) -> None:
    store_rejection("a", "why")
    with pytest.raises(HistoryError, match="job a cannot be requeued: Redis no longer has it"):
        requeue(rejections(), redis, "history")


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
