"""Programs that fork while a producer is open: a daemon, a pool of processes, a program with threads."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from redis import Redis

ROOT = Path(__file__).parents[2]

_PRELUDE = """
import os, sys, threading, time
from datetime import timedelta
from redis import Redis
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot

def record(producer, first, count=20):
    for number in range(first, first + count):
        producer.record(a_snapshot(after=timedelta(seconds=number)))

producer = HistoryProducer(Redis.from_url(os.environ["REDIS_URL"]), outbox=sys.argv[1])
"""

# The child outlives its parent, as a daemon does after its double fork, and continues with the same producer.
_DAEMON = """
record(producer, 0)
if os.fork():
    sys.exit(0)
time.sleep(0.3)
record(producer, 100)
sys.exit(0 if producer.flush(10) == 0 else 1)
"""

_OTHER = "record(producer, int(sys.argv[2]))"

# The process forks while three threads record.
_THREADS = """
threads = [threading.Thread(target=record, args=(producer, 1000 * n, 100)) for n in range(3)]
for thread in threads:
    thread.start()
children = []
for n in range(10):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            record(producer, 10_000 + 100 * n, 3)
            status = 0
        finally:
            os._exit(status)
    children.append(child)
statuses = [os.waitpid(child, 0)[1] for child in children]
for thread in threads:
    thread.join()
assert statuses == [0] * 10, statuses
assert producer.flush(20) == 0
"""


def _start(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _PRELUDE + script, *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env=os.environ.copy(),
    )


def _assert_intact(outbox: Path, expected: int) -> None:
    with closing(sqlite3.connect(outbox)) as db:
        (integrity,) = db.execute("PRAGMA integrity_check").fetchone()
        count, distinct, last = db.execute(
            "SELECT count(*), count(DISTINCT sequence), max(sequence) FROM entries"
        ).fetchone()
        (pending,) = db.execute("SELECT count(*) FROM pending").fetchone()
    assert (integrity, count, distinct, last, pending) == ("ok", expected, expected, expected, 0)


@pytest.mark.usefixtures("redis")
def test_a_child_that_outlives_its_parent_records_and_relays(tmp_path: Path) -> None:
    """Another process uses the same outbox. Each event has a separate sequence, and all reach Redis."""
    outbox = tmp_path / "outbox.db"
    daemon, other = _start(_DAEMON, outbox), _start(_OTHER, outbox, 5000)
    # The pipe is closed when the last child has ended.
    errors = [process.communicate(timeout=60)[1] for process in (daemon, other)]

    assert ([daemon.returncode, other.returncode], errors) == ([0, 0], [b"", b""])
    _assert_intact(outbox, 60)


def test_children_forked_while_threads_record_can_record(redis: Redis, tmp_path: Path) -> None:
    """None of them waits for a lock of a thread that exists only in the parent."""
    outbox = tmp_path / "outbox.db"
    process = _start(_THREADS, outbox)
    _, errors = process.communicate(timeout=100)

    assert (process.returncode, errors) == (0, b"")
    _assert_intact(outbox, 330)
    assert len(set(redis.lrange("rq:queue:history", 0, -1))) == 330
